"""The backbone: one function of the past, for all positions at once or sample by sample."""

from pathlib import Path

import pytest
import torch

import sashimi.s4
from rawaudio.checkpoint import load_checkpoint
from sashimi.backbone import Sashimi, State
from sashimi.s4 import S4

FIXTURES = Path(__file__).parent / "fixtures"
POOLS = [[], [4], [2, 3, 2], [4, 4], [1, 2]]


def make(d_model=4, n_layers=1, pool=(4, 4), d_state=4, l_max=16, seed=0, **kwargs):
    """A small backbone in double: identities then hold to 1e-10."""
    torch.manual_seed(seed)
    return Sashimi(d_model, n_layers, pool, d_state=d_state, l_max=l_max, **kwargs).double().eval()


def noise(batch, length, d_model=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, d_model, generator=generator, dtype=torch.float64)


@torch.no_grad()
def step_through(net, x, state):
    """Outputs (B, L, D) of stepping through x (B, L, D) from `state`, which moves on."""
    out = []
    for x_t in x.unbind(1):
        y, state = net.step(x_t, state)
        out.append(y)
    return torch.stack(out, 1)


def close(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# ---- the parallel form ------------------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("unet", [False, True])
@pytest.mark.parametrize("pool", POOLS)
def test_output_has_the_shape_of_the_input(pool, unet, bidirectional):
    """y.shape == x.shape for every length from 1, multiples of the pooling or not."""
    net = make(pool=pool, unet=unet, bidirectional=bidirectional, n_layers=2)
    for length in (1, 2, 5, 12, 16, 33):
        y = net(noise(2, length))
        assert y.shape == (2, length, 4) and y.isfinite().all()


@pytest.mark.parametrize("unet", [False, True])
@pytest.mark.parametrize("ff", [0, 2])
def test_every_parameter_takes_part(unet, ff):
    """Each parameter gets a gradient that is not zero, and no two are one tensor."""
    net = make(unet=unet, n_layers=2, ff=ff)
    net(noise(2, 64)).square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.any(), name
    assert len({p.data_ptr() for p in net.parameters()}) == len(list(net.parameters()))


@pytest.mark.parametrize("unet", [False, True])
@pytest.mark.parametrize("pool", POOLS)
def test_the_future_changes_no_output(pool, unet):
    """Changing the input at t changes the output at t and none before it, for every t of an odd
    length: through pooling, the up-pool's shift and the padding of the last block."""
    length = 23
    net, x = make(pool=pool, unet=unet), noise(1, length)
    changed = x.repeat(length, 1, 1)
    changed[range(length), range(length), 0] += 1.0
    with torch.no_grad():
        difference = (net(changed) - net(x)).abs().amax(2)  # (changed at, seen at)
    assert difference.tril(-1).max() < 1e-12
    assert difference.diagonal().min() > 1e-3


@pytest.mark.parametrize("pool", POOLS)
def test_a_cut_input_gives_the_cut_output(pool):
    """net(x[:, :t]) == net(x)[:, :t]: padding to the pooling is causally exact."""
    net, x = make(pool=pool), noise(1, 40)
    with torch.no_grad():
        whole = net(x)
        for t in range(1, 40):
            close(net(x[:, :t]), whole[:, :t])


def test_a_bidirectional_backbone_sees_the_future():
    """The last sample reaches the first output, through every tier."""
    net, x = make(bidirectional=True, unet=True), noise(1, 32)
    other = x.clone()
    other[:, -1, 0] += 1.0
    with torch.no_grad():
        assert (net(x) - net(other))[:, 0].abs().max() > 1e-6


def test_samples_of_a_batch_do_not_mix():
    net, x = make(), noise(3, 20)
    with torch.no_grad():
        close(net(x), torch.cat([net(row) for row in x.split(1)]))


@pytest.mark.parametrize("shape", [(20, 4), (1, 20, 3), (1, 0, 4), (1, 1, 20, 4)])
def test_inputs_of_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="expected"):
        make()(torch.zeros(shape, dtype=torch.float64))


# ---- sizes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [{"d_model": 0}, {"n_layers": 0}, {"n_layers": [1, 2]}, {"n_layers": [1, 0, 1]},
     {"expand": 0}, {"ff": -1}, {"pool": [4, 0]}, {"pool": [-2]},
     {"d_state": 3}, {"d_state": 0}, {"l_max": 0}, {"l_max": [64, 16]}],
)  # fmt: skip
def test_a_bad_size_is_named(sizes):
    name = next(iter(sizes))
    with pytest.raises(ValueError, match=f"{name}="):
        Sashimi(**({"d_model": 4, "pool": [4, 4], "d_state": 4, "l_max": 64} | sizes))


@pytest.mark.parametrize("unet", [False, True])
def test_each_tier_computes_kernels_of_its_own_length(unet, monkeypatch):
    """l_max over the pooling so far, rounded up, for inputs of l_max samples: never doubled, not
    even where l_max is no multiple of the pooling. Pitfall: 16,000 points in every tier."""
    lengths = []
    original = sashimi.s4.nplr_kernel
    monkeypatch.setattr(sashimi.s4, "nplr_kernel", lambda *a: lengths.append(a[-1]) or original(*a))
    for l_max, expected in [(960, [960, 240, 80]), (1000, [1008, 252, 84])]:
        make(l_max=l_max, pool=[4, 3], unet=unet)(noise(1, l_max))
        assert lengths == (expected[:2] if unet else []) + expected[::-1]
        lengths.clear()


def test_lengths_can_be_given_per_tier():
    """As weights of other implementations need, which used one length for all tiers."""
    net = make(l_max=[64, 64, 32], unet=True)
    stored = [layer.l_max for layer in net.modules() if isinstance(layer, S4)]
    assert sorted(stored) == [32, 64, 64, 64, 64]


def test_layers_and_widths():
    """n_layers (S4, feed-forward) pairs per tier, features growing by `expand`, as documented."""
    net = make(6, n_layers=3, pool=[4, 2], expand=3, ff=5, unet=True)
    s4 = [m for m in net.modules() if isinstance(m, S4)]
    assert sorted(m.d_model for m in s4) == [6] * 6 + [18] * 6 + [54] * 3
    assert [len(net.center), *map(len, net.down), *map(len, net.up)] == [6] * 5
    assert net.center[1].layer[0].out_features == 5 * 54
    assert len(make(ff=0, n_layers=3).center) == 3
    assert not any(len(stage) for stage in make(unet=False).down)


# ---- the recurrence ---------------------------------------------------------------------------


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("n_layers", [1, 3, "each"])
@pytest.mark.parametrize("unet", [False, True])
def test_stepping_is_the_parallel_form(unet, n_layers, pool):
    """step == forward at every position, beyond l_max and between multiples of the pooling.

    Pitfall: elsewhere `step` crashes with unet and n_layers >= 3.
    """
    n_layers = list(range(1, len(pool) + 2)) if n_layers == "each" else n_layers
    net, x = make(unet=unet, n_layers=n_layers, pool=pool), noise(2, 53)
    net.setup_rnn()
    with torch.no_grad():
        close(step_through(net, x, net.default_state(2)), net(x))


@pytest.mark.parametrize("unet", [False, True])
@pytest.mark.parametrize("kwargs", [{"ff": 0}, {"expand": 1}, {"glu": False}, {"tied": False}])
def test_stepping_is_the_parallel_form_of_every_variant(kwargs, unet):
    net, x = make(unet=unet, n_layers=2, pool=[2, 3], **kwargs), noise(1, 29)
    net.setup_rnn()
    with torch.no_grad():
        close(step_through(net, x, net.default_state(1)), net(x))


@pytest.mark.parametrize("unet", [False, True])
@pytest.mark.parametrize("pool", POOLS)
def test_the_collected_state_is_the_stepped_state(pool, unet):
    """forward(x, State()) leaves what stepping through x leaves, at any length, and going on from
    it gives the rest of the parallel output."""
    net, x = make(pool=pool, unet=unet), noise(2, 40)
    net.setup_rnn()
    stepped = net.default_state(2)
    with torch.no_grad():
        whole = net(x)
        for length in (1, 2, 3, 4, 5, 7, 11, 12, 13, 15, 16, 17, 24, 29):
            step_through(net, x[:, stepped.position : length], stepped)
            absorbed = State()
            close(net(x[:, :length], absorbed), whole[:, :length])
            assert absorbed.position == stepped.position == length
            assert len(absorbed.s4) == len(stepped.s4)
            for a, b in zip(absorbed.s4 + absorbed.up, stepped.s4 + stepped.up, strict=True):
                close(a, b)
            for i, p in enumerate(pool):  # of the rest, nothing is read before it is written
                waiting = length // net.strides[i] % p
                close(absorbed.down[i][:, :waiting], stepped.down[i][:, :waiting])
            close(step_through(net, x[:, length:], absorbed), whole[:, length:])


@pytest.mark.parametrize("unet", [False, True])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("d_global", [0, 3])
def test_pieces_are_the_whole(pool, unet, d_global):
    """forward with the state of the piece before == forward of all at once, and the same state in
    the end: for pieces of any length, shorter than the pooling and longer than l_max."""
    net, x = make(pool=pool, unet=unet, n_layers=2, d_global=d_global), noise(2, 101)
    given = noise(2, 1, 3)[:, 0] if d_global else None
    with torch.no_grad():
        whole, expected = State(), net(x, global_=given)
        close(net(x, whole, global_=given), expected)
        for sizes in ([1, 2, 3, 1, 94], [48, 48, 5], [7] * 14 + [3], [16, 1, 40, 44]):
            state, out = State(), []
            for i, part in enumerate(x.split(sizes, 1)):
                out.append(net(part, state, global_=None if i else given))
            close(torch.cat(out, 1), expected)
            assert state.position == whole.position
            for name in ("s4", "global_", "up"):
                for a, b in zip(getattr(state, name), getattr(whole, name), strict=True):
                    close(a, b)
            for i, p in enumerate(pool):  # of the rest, nothing is read before it is written
                waiting = 101 // net.strides[i] % p
                close(state.down[i][:, :waiting], whole.down[i][:, :waiting])


@pytest.mark.parametrize("unet", [False, True])
def test_pieces_stay_with_the_whole_in_float32(unet):
    """Over 6,000 samples, odd lengths, at the HiPPO start: within 1e-4."""
    net = make(8, d_state=64, l_max=2000, unet=unet).float()
    x, state, out = noise(1, 6001, 8).float(), State(), []
    with torch.no_grad():
        for part in x.split([999, 2001, 1, 2000, 1000], 1):
            out.append(net(part, state))
        close(torch.cat(out, 1), net(x), atol=1e-4)


def test_a_state_that_cannot_be_gone_on_from_is_refused():
    """Of other clips, with a condition of the next piece's own, or with gradients that it lacks."""
    net, x = make(d_global=3), noise(2, 9)
    given, state = noise(2, 1, 3)[:, 0], State()
    net(x, state, global_=given)
    cases = {
        "under torch.no_grad": lambda: net(x, state),
        "state of 2 clips": lambda: net(x[:1], state),
        "global_ of shape": lambda: net(x, state, global_=given),
    }
    for words, call in cases.items():
        with pytest.raises(ValueError, match=words), torch.set_grad_enabled("no_grad" in words):
            call()


@pytest.mark.parametrize("unet", [False, True])
def test_coarse_tiers_run_only_when_due(unet):
    """With pool [4, 4] the middle tier steps once per 4 samples, the centre once per 16."""
    net = make(n_layers=2, unet=unet, pool=[4, 4])
    calls = {}

    def count(name, layer):
        original = layer.step
        calls[name] = 0

        def step(*args):
            calls[name] += 1
            return original(*args)

        layer.step = step

    for name, layer in net.named_modules():
        if isinstance(layer, S4):
            count(name, layer)
    step_through(net, noise(1, 47), net.default_state(1))
    per_tier = {"up.0": 47, "down.0": 47, "up.1": 11, "down.1": 11, "center": 2}
    assert len(calls) == (10 if unet else 6)
    for name, n in calls.items():
        assert n == next(v for k, v in per_tier.items() if name.startswith(k)), name


@pytest.mark.parametrize("call", ["setup_rnn", "step", "forward"])
def test_a_bidirectional_backbone_has_no_recurrence(call):
    net, x = make(bidirectional=True), noise(1, 16)
    calls = {
        "setup_rnn": lambda: net.setup_rnn(),
        "step": lambda: net.step(x[:, 0], net.default_state(1)),
        "forward": lambda: net(x, State()),
    }
    with pytest.raises(ValueError, match="bidirectional"):
        calls[call]()


def test_states_follow_the_models_precision():
    net = make().float()
    state = net.default_state(3)
    assert state.position == 0
    assert all(s.dtype == torch.complex64 and len(s) == 3 for s in state.s4)
    assert all(s.dtype == torch.float32 and len(s) == 3 for s in state.down + state.up)
    net.setup_rnn()
    x = noise(3, 40).float()
    with torch.no_grad():
        close(step_through(net, x, state), net(x), atol=1e-4)


# ---- weights of state-spaces/s4 ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["ar", "unet", "unet_bidir"])
def test_state_spaces_weights_give_their_outputs(name):
    """Their weights, their input, their outputs in double with exact nodes: within 1e-5.

    Pitfalls: untied parameters, one kernel length per tier in the file, the reversed kernel.
    """
    path = FIXTURES / f"state_spaces_{name}.pt"
    fixture = torch.load(path, weights_only=True)
    net = load_checkpoint(path)
    assert isinstance(net, Sashimi) and net.unet == ("unet" in name)
    assert net.bidirectional == ("bidir" in name)
    with torch.no_grad():
        y = net(fixture["x"])
        close(y, fixture["y_exact"], atol=1e-5)
        if "step" in fixture:
            net.setup_rnn()
            stepped = step_through(net, fixture["x"][:, :64], net.default_state(1))
            close(stepped, fixture["y_exact"][:, :64], atol=1e-5)
            close(stepped, fixture["step"], atol=1e-4)  # theirs, in float32


# ---- memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("unet", [False, True])
@pytest.mark.parametrize("tiers", [1, 3])
def test_recomputed_tiers_have_the_same_gradients_and_keep_less(unet, tiers):
    """Activations that are computed again for the backward, with the same dropout, give the same
    output and gradients; what is kept until then is less."""
    kinds = dict(unet=unet, n_layers=2, dropout=0.2, d_global=3, d_local=2, shift=True)
    x, conditions = noise(2, 64), (noise(2, 1, 3)[:, 0], noise(2, 64, 2))
    found = []
    for recomputed in (0, tiers):
        net = make(**kinds).train()
        net.recomputed_tiers = recomputed
        kept = {}

        def keep(tensor, kept=kept):
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = net(x, None, *conditions)
        y.square().mean().backward()
        found.append((y.detach(), [p.grad for p in net.parameters()], sum(kept.values())))
    (y, grads, kept), (y_again, grads_again, kept_again) = found
    close(y_again, y, atol=1e-12)
    for a, b in zip(grads_again, grads, strict=True):
        close(a, b, atol=1e-12)
    assert kept_again < 0.7 * kept
