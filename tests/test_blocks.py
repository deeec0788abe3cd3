"""The compiled blocks of the backbone: the same function as plain PyTorch, and its gradients."""

import pytest
import torch

from sashimi import blocks
from sashimi.backbone import Block, Sashimi, feed_forward
from sashimi.s4 import S4

CASES = [  # clips, length, features, bidirectional, tied, gate, features that condition
    (3, 600, 48, False, True, True, 5),
    (2, 77, 32, True, False, False, 3),
    (1, 1, 16, False, True, True, 0),
    (5, 130, 80, True, True, True, 0),
    (1, 1031, 64, False, True, True, 0),
]


@pytest.fixture(autouse=True)
def compiled():
    if blocks.library() is None:
        pytest.skip("no compiler, or SASHIMI_KERNEL=torch")


def plainly(monkeypatch):
    monkeypatch.setattr(blocks, "serves", lambda *_: False)


def make(kind, case):
    """A block, and its input and what conditions it, in double."""
    clips, length, n, bidirectional, tied, glu, d_global = case
    torch.manual_seed(length)
    s4 = kind == "s4"
    layer = S4(n, 16, 100, bidirectional, 0.0, tied, glu) if s4 else feed_forward(n, 2, 0.0)
    block = Block(layer, n, 0.0, d_global if s4 else 0)
    for p in block.norm.parameters():
        torch.nn.init.normal_(p, 0.5, 0.5)
    told = torch.randn(clips, d_global).double() if s4 and d_global else None
    return block.double(), torch.randn(clips, length, n).double(), told


def outputs(block, x, told, dtype, autocast=False):
    """Output and all gradients of a block in a precision, by name."""
    block.to(dtype).zero_grad()
    x = x.to(dtype).clone().requires_grad_()
    told = None if told is None else told.to(dtype).clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = block(x, told)
    weights = torch.rand(y.shape, generator=torch.Generator().manual_seed(0))
    (y * weights.to(dtype)).sum().backward()
    found = {"y": y.detach(), "x": x.grad} | {k: p.grad for k, p in block.named_parameters()}
    return found | ({} if told is None else {"told": told.grad})


def errors(found, expected):
    """Relative, in the Euclidean norm."""
    assert found.keys() == expected.keys()
    return {k: float((found[k] - v).norm() / v.norm()) for k, v in expected.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", ["s4", "feed-forward"])
def test_a_block_and_its_gradients_are_those_of_double(kind, case, monkeypatch):
    """To 1e-5 in float32, with or without gradients; under autocast as near as PyTorch's own."""
    block, x, told = make(kind, case)
    expected = outputs(block, x, told, torch.float64)
    found = outputs(block, x, told, torch.float32)
    assert max(errors(found, expected).values()) < 1e-5
    half = errors(outputs(block, x, told, torch.float32, autocast=True), expected)
    with torch.no_grad():
        y = block(x.float(), None if told is None else told.float())
    torch.testing.assert_close(y, found["y"], rtol=1e-5, atol=1e-5)
    plainly(monkeypatch)
    plain = errors(outputs(block, x, told, torch.float32, autocast=True), expected)
    assert max(half.values()) < 1.5 * max(plain.values())


def test_the_bits_are_the_same_for_any_number_of_threads_and_place_in_memory():
    """Sums are cut by shape alone; tensors that do not start on a cache line are taken too."""
    block, x, told = make("s4", CASES[0])
    net = torch.nn.Sequential(block.float(), make("feed-forward", CASES[0])[0].float())

    def run(x):
        net.zero_grad()
        y = net[1](net[0](x, told.float()))
        y.square().sum().backward()
        return [y, *(p.grad for p in net.parameters())]

    threads, first = torch.get_num_threads(), run(x.float())
    moved = torch.cat([torch.zeros(1), x.float().flatten()])[1:].view_as(x)
    try:
        for count in (1, 3, 16):
            torch.set_num_threads(count)
            assert all(map(torch.equal, run(moved), first))
    finally:
        torch.set_num_threads(threads)


def test_what_is_not_served_goes_plainly(monkeypatch):
    """Double, odd widths, dropout, other norms, what is local or heard: it works as before."""
    called = []
    for name in ("feed_forward", "s4", "s4_known"):
        monkeypatch.setattr(blocks, name, lambda *_, name=name: called.append(name))
    x = torch.randn(1, 8, 16)
    for net, u in [
        (Sashimi(16, 1, [2], d_state=4, l_max=8).double(), x.double()),
        (Sashimi(12, 1, [], d_state=4, l_max=8), x[..., :12]),
        (Sashimi(16, 1, [2], d_state=4, l_max=8, dropout=0.1).train(), x),
        (Sashimi(16, 1, [2], d_state=4, l_max=8, scalar_norm="blocks"), x),
    ]:
        assert net(u).shape == u.shape and not called
    net = Sashimi(16, 1, [], ff=0, d_state=4, l_max=8, d_local=3, bidirectional=True)
    assert net(x, local=torch.randn(1, 8, 3)).shape == x.shape and not called
    net = Sashimi(16, 1, [], ff=0, d_state=4, l_max=8, bidirectional=True)
    assert net(x, hear=lambda slot, length: x).shape == x.shape and not called


def test_changed_parameters_count_at_once():
    """The spectrum that is kept without gradients is not one of other parameters."""
    net, x = Sashimi(16, 1, [2], d_state=4, l_max=40).eval(), torch.randn(2, 40, 16)
    with torch.no_grad():
        before = net(x)
        net.center[0].layer.C.data.mul_(2)
        after = net(x)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(net(x).detach(), after)
