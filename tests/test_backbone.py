"""The backbone: one function of the past, for all positions at once or sample by sample."""

import re
from pathlib import Path

import pytest
import torch

import sashimi.s4
from rawaudio.checkpoint import load_checkpoint
from sashimi.backbone import Sashimi
from sashimi.s4 import S4

FIXTURES = Path(__file__).parent / "fixtures"
unets = pytest.mark.parametrize("unet", [False, True])
pools = pytest.mark.parametrize("pool", [[], [4], [2, 3, 2], [4, 4], [1, 2]], ids=str)


def make(d_model=4, n_layers=1, pool=(4, 4), d_state=4, l_max=16, seed=0, **kwargs):
    """A small backbone in double: identities then hold to 1e-10."""
    torch.manual_seed(seed)
    return Sashimi(d_model, n_layers, pool, d_state=d_state, l_max=l_max, **kwargs).double().eval()


def noise(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@torch.no_grad()
def step_through(net, x, state):
    """Outputs (B, L, D) of stepping through x (B, L, D) from `state`, which moves on."""
    return torch.stack([net.step(sample, state)[0] for sample in x.unbind(1)], 1)


def close(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def s4_layers(net):
    return [module for module in net.modules() if isinstance(module, S4)]


@unets
@pools
def test_output_has_the_shape_of_the_input_and_clips_do_not_mix(pool, unet):
    """For every length, multiples of the pooling or not, and no clips; both ways in time or one."""
    for bidirectional in (False, True):
        net = make(pool=pool, unet=unet, bidirectional=bidirectional, n_layers=2)
        for batch, length in [(2, 1), (2, 5), (2, 12), (2, 33), (0, 33)]:
            x = noise(batch, length, 4)
            y = net(x)
            assert y.shape == x.shape and y.isfinite().all()
            close(net(x[:1]), y[:1])


@unets
@pytest.mark.parametrize("ff", [0, 2])
def test_every_parameter_takes_part(unet, ff):
    """And no two are one tensor."""
    net = make(unet=unet, n_layers=2, ff=ff)
    net(noise(2, 64, 4)).square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.any(), name
    assert len({p.data_ptr() for p in net.parameters()}) == len(list(net.parameters()))


@unets
@pools
@torch.no_grad()
def test_the_future_changes_no_output(pool, unet):
    """Changing the input at t changes the output at t and none before it; cutting it off changes
    nothing either. Bidirectional, the last sample reaches the first output."""
    net, x, length = make(pool=pool, unet=unet), noise(1, 23, 4), 23
    changed, whole = x.repeat(length, 1, 1), net(x)
    changed[range(length), range(length), 0] += 1.0
    difference = (net(changed) - whole).abs().amax(2)  # (changed at, seen at)
    assert difference.tril(-1).max() < 1e-12
    assert difference.diagonal().min() > 1e-3
    for t in range(1, length):
        close(net(x[:, :t]), whole[:, :t])
    both = make(pool=pool, unet=unet, bidirectional=True)
    assert (both(changed[-1:]) - both(x))[:, 0].abs().max() > 1e-6


BAD_SIZES = [
    ("d_model", 0), ("n_layers", 0), ("n_layers", [1, 2]), ("n_layers", [1, 0, 1]), ("expand", 0),
    ("ff", -1), ("d_global", -1), ("d_local", -1), ("pool", [4, 0]), ("pool", [-2]),
    ("d_state", 3), ("d_state", 0), ("l_max", 0), ("l_max", [64, 16]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_SIZES)
def test_a_bad_size_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name}="):
        make(**{name: value})


@unets
def test_each_tier_computes_kernels_of_its_own_length(unet, monkeypatch):
    """l_max over the pooling so far, rounded up: never doubled, not even where l_max is no multiple
    of the pooling. Pitfall: 16,000 points in every tier."""
    lengths = []
    original = sashimi.s4.nplr_kernel
    monkeypatch.setattr(sashimi.s4, "nplr_kernel", lambda *a: lengths.append(a[-1]) or original(*a))
    for l_max, expected in [(960, [960, 240, 80]), (1000, [1008, 252, 84])]:
        make(l_max=l_max, pool=[4, 3], unet=unet)(noise(1, l_max, 4))
        assert lengths == (expected[:2] if unet else []) + expected[::-1]
        lengths.clear()


def test_layers_and_widths():
    """And lengths per tier, for weights of other implementations, which used one for all."""
    net = make(6, n_layers=3, pool=[4, 2], expand=3, ff=5, unet=True, l_max=[64, 64, 32])
    sizes = sorted((layer.d_model, layer.l_max) for layer in s4_layers(net))
    assert sizes == [(6, 64)] * 6 + [(18, 64)] * 6 + [(54, 32)] * 3
    assert [len(net.center), *map(len, net.down), *map(len, net.up)] == [6] * 5
    assert net.center[1].layer[0].out_features == 5 * 54
    assert net.strides == [1, 4, 8] and net.period == 8
    assert len(make(ff=0, n_layers=3).center) == 3
    assert not any(len(stage) for stage in make(unet=False).down)


@unets
@pools
@pytest.mark.parametrize(
    "kwargs",
    [{"n_layers": 3}, {"n_layers": "each"}, {"ff": 0, "expand": 1}, {"glu": False, "tied": False}],
    ids=str,
)
def test_stepping_is_the_parallel_form(kwargs, pool, unet):
    """Beyond l_max too. Pitfall: elsewhere `step` crashes with unet and n_layers >= 3."""
    if kwargs.get("n_layers") == "each":
        kwargs = {"n_layers": list(range(1, len(pool) + 2))}
    net, x = make(unet=unet, pool=pool, **kwargs), noise(2, 35, 4)
    net.setup_rnn()
    close(step_through(net, x, net.default_state(2)), net(x))


@unets
@pools
@pytest.mark.parametrize("d_global", [0, 3])
@torch.no_grad()
def test_absorbing_is_stepping(pool, unet, d_global):
    """In pieces of any length, shorter than the pooling and longer than l_max: outputs, state, and
    outputs after it. A copied state stays."""
    net, x = make(pool=pool, unet=unet, n_layers=2, d_global=d_global), noise(2, 104, 4)
    given = noise(2, 3) if d_global else None
    whole, state, stepped = net(x, given), net.default_state(2, given), {}
    for t in range(101):
        stepped[t] = state.copy()
        net.step(x[:, t], state)
    cuts = [1], [3], [11], [12], [13], [16], [48, 48], [1, 2, 3, 1, 93], [7] * 12, [16, 1, 40, 43]
    for sizes in cuts:
        state, length = net.default_state(2, given), sum(sizes)
        y = [net.absorb(part, state) for part in x[:, :length].split(sizes, 1)]
        close(torch.cat(y, 1), whole[:, :length])
        expected = stepped[length]
        assert state.position == expected.position == length
        for i, p in enumerate(pool):  # of the rest, nothing is read before it is written
            waiting = length // net.strides[i] % p
            close(state.down[i][:, :waiting], expected.down[i][:, :waiting])
        for name in ("s4", "global_", "up"):
            close(getattr(state, name), getattr(expected, name))
        close(step_through(net, x[:, length : length + 4], state), whole[:, length : length + 4])


@unets
@torch.no_grad()
def test_pieces_stay_with_the_whole_in_float32(unet):
    """Over 6,000 samples, odd lengths, at the HiPPO start: within 1e-4. So do states."""
    net, x = make(8, d_state=64, l_max=2000, unet=unet).float(), noise(2, 6001, 8).float()
    state = net.default_state(2)
    y = [net.absorb(part, state) for part in x.split([999, 2001, 1, 2000, 1000], 1)]
    close(torch.cat(y, 1), net(x), atol=1e-4)
    assert len({tensor.data_ptr() for tensor in state.tensors()}) == len(state.tensors()) > 6
    for tensor in state.tensors():
        assert len(tensor) == 2 and tensor.dtype in (torch.complex64, torch.float32)


REFUSED = {  # a call on a net with d_global = 3, x of 2 clips, their condition and a state
    "input of shape (20, 4)": lambda net, x, given, state: net(x[0], given),
    "input of shape (2, 20, 3)": lambda net, x, given, state: net(x[..., :3], given),
    "input of shape (2, 0, 4)": lambda net, x, given, state: net(x[:, :0], given),
    "input of shape (1, 2, 20, 4)": lambda net, x, given, state: net.absorb(x[None], state),
    "global_ of shape None": lambda net, x, given, state: net(x),
    "global_ of shape (1, 3)": lambda net, x, given, state: net.default_state(2, given[:1]),
    "local of shape (2, 20, 4)": lambda net, x, given, state: net(x, given, x),
    "state of 2 clips": lambda net, x, given, state: net.absorb(x[:1], state),
    "under torch.no_grad": lambda net, x, given, state: net.absorb(x, state),
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_call_that_does_not_fit_is_refused(words):
    """Of other shapes; from a state of other clips, or with gradients that it lacks."""
    net, x, given = make(d_global=3), noise(2, 20, 4), noise(2, 3)
    state = net.default_state(2, given)
    net.absorb(x, state).sum().backward()  # the first piece may be trained on
    with pytest.raises(ValueError, match=re.escape(words)):
        REFUSED[words](net, x, given, state)


@unets
def test_coarse_tiers_run_only_when_due(unet, monkeypatch):
    steps, original = [], S4.step
    monkeypatch.setattr(S4, "step", lambda *a: steps.append(a[0].d_model) or original(*a))
    net = make(n_layers=2, unet=unet, pool=[4, 4])
    step_through(net, noise(1, 47, 4), net.default_state(1))
    each = 4 if unet else 2  # layers of a tier
    assert [steps.count(width) for width in (4, 8, 16)] == [47 * each, 11 * each, 2 * 2]


@pytest.mark.parametrize("kwargs", [{"bidirectional": True}, {"d_local": 2}, {"shift": False}])
@pytest.mark.parametrize("call", ["setup_rnn", "absorb"])
def test_some_backbones_have_no_recurrence(call, kwargs):
    net = make(**kwargs)
    arguments = (noise(1, 16, 4), net.default_state(1)) if call == "absorb" else ()
    with pytest.raises(ValueError, match="bidirectional" if net.bidirectional else "recurrence"):
        getattr(net, call)(*arguments)


@pytest.mark.parametrize("name", ["ar", "unet", "unet_bidir"])
@torch.no_grad()
def test_state_spaces_weights_give_their_outputs(name):
    """Pitfalls: untied parameters, one kernel length per tier, the reversed kernel."""
    path = FIXTURES / f"state_spaces_{name}.pt"
    fixture = torch.load(path, weights_only=True)
    net = load_checkpoint(path)
    assert isinstance(net, Sashimi) and net.unet == ("unet" in name)
    assert net.bidirectional == ("bidir" in name)
    close(net(fixture["x"]), fixture["y_exact"], atol=1e-5)
    if "step" in fixture:
        stepped = step_through(net, fixture["x"][:, :64], net.default_state(1))
        close(stepped, fixture["y_exact"][:, :64], atol=1e-5)
        close(stepped, fixture["step"], atol=1e-4)  # theirs, in float32


@unets
@pytest.mark.parametrize("tiers", [1, 3])
def test_recomputed_tiers_have_the_same_gradients_and_keep_less(unet, tiers):
    """With dropout and conditions."""
    x, conditions = noise(2, 64, 4), (noise(2, 3), noise(2, 64, 2))
    results = []
    for recomputed in (0, tiers):
        net = make(unet=unet, n_layers=2, dropout=0.2, d_global=3, d_local=2).train()
        net.recomputed_tiers, kept = recomputed, {}

        def keep(tensor, kept=kept):
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = net(x, *conditions)
        y.square().mean().backward()
        results.append(([y.detach(), *(p.grad for p in net.parameters())], sum(kept.values())))
    (tensors, kept), (tensors_again, kept_again) = results
    close(tensors_again, tensors, atol=1e-12)
    assert kept_again < 0.7 * kept
