"""S4: one state space, three forms. Each form is compared with the dense matrices A, B, C.

The oracle is complex128 numpy and knows nothing of the library's formulas: A = diag(Lambda) - P P*
over both halves, bilinear discretisation by `solve`, K[l] = C Ab^l Bb.
"""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

import sashimi.s4
from rawaudio.checkpoint import load_checkpoint
from sashimi.backbone import Sashimi
from sashimi.s4 import S4, hippo_legs

FIXTURES = Path(__file__).parent / "fixtures"
KERNELS = torch.load(FIXTURES / "s4_kernels.pt", weights_only=True)


def make(d_model=4, d_state=64, l_max=1024, seed=0, **kwargs):
    """A layer whose steps reach both ends of the range of dt."""
    torch.manual_seed(seed)
    layer = S4(d_model, d_state, l_max, **kwargs)
    with torch.no_grad():
        layer.log_dt.copy_(torch.linspace(np.log(1e-3), np.log(1e-1), d_model))
    return layer.eval()


def bare(layer):
    """The state space alone: no activation, no projection."""
    layer.project = lambda y: y
    return layer


def perturbed(layer, scale=0.1, seed=1):
    """Every parameter away from its start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p += scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return layer


# ---- the oracle -----------------------------------------------------------------------------


class Dense:
    """Ab (H, N, N), Bb (H, N, 1) and C (channels, H, 1, N) of a layer, complex128."""

    def __init__(self, layer):
        array = {k: v.detach().double().numpy() for k, v in layer.named_parameters()}
        h = layer.d_model

        def both(x):  # (..., M) -> (..., N): the stored half, then its conjugates
            return np.concatenate([x, x.conj()], -1)

        def complex_(x):
            return x[..., 0] + 1j * x[..., 1]

        lam = both(-np.exp(array["log_A_real"]) + 1j * array["A_imag"])
        p, b = both(complex_(array["P"])), both(complex_(array["B"]))
        n = lam.shape[-1]
        a = lam[:, :, None] * np.eye(n) - p[:, :, None] * p[:, None, :].conj()
        a = np.broadcast_to(a, (h, n, n))
        dt = np.exp(array["log_dt"])[:, None, None]
        left = np.eye(n) - dt / 2 * a
        self.Ab = np.linalg.solve(left, np.eye(n) + dt / 2 * a)
        self.Bb = np.linalg.solve(left, dt * np.broadcast_to(b, (h, n))[:, :, None])
        ct = both(complex_(array["C"]))[:, :, None, :]  # what is stored: C (I - Ab^l_max)
        back = np.eye(n) - np.linalg.matrix_power(self.Ab, layer.l_max)
        self.C = np.linalg.solve(np.swapaxes(back, -1, -2), np.swapaxes(ct, -1, -2))
        self.C = np.swapaxes(self.C, -1, -2)

    def kernel(self, length):
        """Every tap, step by step: (channels, H, length)."""
        x, taps = self.Bb, []
        for _ in range(length):
            taps.append((self.C @ x)[..., 0, 0])
            x = self.Ab @ x
        taps = np.stack(taps, -1)
        assert np.abs(taps.imag).max() < 1e-9 * np.abs(taps.real).max()
        return taps.real

    def taps(self, at):
        """Single taps by the binary digits of their index: (channels, H, len(at))."""
        powers = [self.Ab]
        while 2 ** len(powers) <= max(at):
            powers.append(powers[-1] @ powers[-1])
        out = []
        for index in at:
            x = self.Bb
            for bit, power in enumerate(powers):
                if index >> bit & 1:
                    x = power @ x
            out.append((self.C @ x)[..., 0, 0].real)
        return np.stack(out, -1)


def relative_error(kernel, truth, at=slice(None)):
    """Largest error as a fraction of the largest tap, of the worst feature."""
    kernel = kernel.detach().double().numpy()
    return (np.abs(kernel[..., at] - truth) / np.abs(kernel).max(-1, keepdims=True)).max()


# ---- the start ------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 8, 64])
def test_hippo_eigenbasis_gives_back_the_dense_hippo_matrices(n):
    """V (diag(Lambda) - P P*) V* is HiPPO-LegS's A, V B its B, for a unitary V = [v, conj(v)]."""
    root = np.sqrt(2 * np.arange(n) + 1)
    dense = -np.tril(np.outer(root, root), -1) - np.diag(np.arange(n) + 1.0)
    low_rank = np.sqrt(np.arange(n) + 0.5)
    lam, p, b = (x.numpy() for x in hippo_legs(n))
    assert lam.dtype == np.complex128 and lam.shape == (n // 2,)
    assert (lam.real == -0.5).all() and (lam.imag > 0).all() and (np.diff(lam.imag) > 0).all()

    # eigenvectors by the general solver; their phases follow from P = v* low_rank
    values, v = np.linalg.eig(dense + np.outer(low_rank, low_rank))
    v = v[:, np.argsort(values.imag)][:, n // 2 :]
    v = v * (p / (v.conj().T @ low_rank)).conj()
    v = np.concatenate([v, v.conj()], 1)
    lam, p, b = (np.concatenate([x, x.conj()]) for x in (lam, p, b))
    np.testing.assert_allclose(v.conj().T @ v, np.eye(n), atol=1e-9)
    np.testing.assert_allclose(
        v @ (np.diag(lam) - np.outer(p, p.conj())) @ v.conj().T, dense, atol=1e-9 * n
    )
    np.testing.assert_allclose(v @ b, root, atol=1e-9 * n)


def test_a_new_layer_is_hippo_with_log_uniform_steps():
    """Start: Lambda, P, B of HiPPO-LegS, dt log-uniform in [1e-3, 1e-1], C of unit variance."""
    torch.manual_seed(0)
    layer = S4(1000, 4, 16)
    lam, p, b = hippo_legs(4)
    torch.testing.assert_close(-layer.log_A_real.exp()[0], lam.real.float())
    torch.testing.assert_close(layer.A_imag[0], lam.imag.float())
    torch.testing.assert_close(torch.view_as_complex(layer.P)[0], p.to(torch.complex64))
    torch.testing.assert_close(torch.view_as_complex(layer.B)[0], b.to(torch.complex64))
    quantiles = layer.log_dt.exp().quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    expected = torch.tensor([1e-3, 10**-2.5, 1e-2, 10**-1.5, 1e-1])
    torch.testing.assert_close(quantiles, expected, rtol=0.2, atol=0)
    c = Dense(layer).C[0, :, 0, :2]
    assert 0.9 < np.mean(np.abs(c) ** 2) < 1.1


@pytest.mark.parametrize("d_state", [0, -2, 1, 63])
def test_odd_or_empty_states_are_refused(d_state):
    """Pitfall: an odd d_state silently drops a state elsewhere."""
    with pytest.raises(ValueError, match=f"d_state={d_state}"):
        S4(4, d_state)


@pytest.mark.parametrize("sizes", [{"d_model": 0}, {"d_model": 4, "l_max": 0}])
def test_sizes_below_one_are_refused(sizes):
    name, value = list(sizes.items())[-1]
    with pytest.raises(ValueError, match=f"{name}={value}"):
        S4(**sizes)


# ---- the kernel -----------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("length", [16, 100, 101, 1024])
def test_float32_kernel_is_c_ab_l_bb(length, tied):
    """K[l] = C Ab^l Bb for every l, within 5e-6 of max|K|.

    Pitfalls: the sum without conjugate poles; nodes in float32; the Nyquist node (even lengths);
    `irfft` without its length (odd lengths).
    """
    layer = perturbed(make(l_max=length, tied=tied), 0.03)
    kernel = layer.kernel(length)
    assert kernel.shape == (1, 4, length) and kernel.dtype == torch.float32
    assert relative_error(kernel, Dense(layer).kernel(length)) < 5e-6


@pytest.mark.parametrize("length", [16000, 64000])
def test_long_float32_kernel_is_c_ab_l_bb(length):
    """The first 2,000 taps step by step, 200 others and the last ones by powers of Ab."""
    layer, rng = make(l_max=length), np.random.default_rng(0)
    kernel, dense = layer.kernel(length), Dense(layer)
    assert relative_error(kernel, dense.kernel(2000), slice(2000)) < 5e-6
    at = np.append(rng.integers(2000, length, 200), [length - 2, length - 1])
    assert relative_error(kernel, dense.taps(at), at) < 5e-6


@pytest.mark.parametrize(("l_max", "length"), [(100, 1), (100, 99), (101, 40), (101, 102),
                                               (100, 256), (33, 1000), (1, 7)])  # fmt: skip
def test_any_length_gives_the_taps_of_the_same_kernel(l_max, length):
    """Shorter and longer than l_max: Ct doubled, Ct (I + Ab^n), is exact and leaves C alone."""
    layer = make(l_max=l_max)
    before = layer.C.clone()
    kernel = layer.kernel(length)
    assert kernel.shape[-1] == length
    truth = Dense(layer).kernel(length)
    scale = np.abs(Dense(layer).kernel(max(length, l_max))).max(-1, keepdims=True)
    assert (np.abs(kernel.detach().double().numpy() - truth) / scale).max() < 5e-6
    assert torch.equal(layer.C, before)


def test_two_doublings_are_one_quadrupling():
    """Ct of 4 n by doubling twice, and Ct of 4 n stored by a layer of that length: one kernel."""
    short, long = make(l_max=64).double(), make(l_max=256).double()
    with torch.no_grad():
        c = Dense(short).C[:, :, 0]
        power = np.linalg.matrix_power(Dense(short).Ab, 256)
        ct = torch.from_numpy((c[:, :, None] @ (np.eye(64) - power))[:, :, 0, :32])
        long.C.copy_(torch.view_as_real(ct))
    torch.testing.assert_close(short.kernel(256), long.kernel(256), rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", range(len(KERNELS)))
def test_kernels_of_other_implementations(case):
    """K from the Ct that two other implementations stored is the first-principles K they meant.

    Both have perturbed parameters, tied or not, l_max below, at and above the length. What is
    stored means K to 1e-6; float32 rounding of a short Ct costs up to 3e-6 of the K they meant.
    Pitfalls: the published CPU fallback forgets the conjugate poles and is not matched; both
    peers' kernels of odd lengths lose a sample, ours do not.
    """
    case = KERNELS[case]
    parameters = case["parameters"]
    layer = S4(2, 64, case["l_max"], tied=len(parameters["B"]) == 1)
    layer.load_state_dict(parameters, strict=False)
    kernel = layer.kernel(case["length"])
    first = case["truth"].shape[1]
    assert relative_error(kernel, Dense(layer).kernel(first), slice(first)) < 1e-6

    kernel, scale = kernel[0].detach().double(), case["truth"].abs().max()
    bound = 1e-6 if case["l_max"] >= 400 else 5e-6
    assert (kernel[:, :first] - case["truth"]).abs().max() < bound * scale
    if "tail" in case:
        assert (kernel[:, -32:] - case["tail"]).abs().max() < bound * scale
    if "as_shipped" in case:
        wrong = case["as_shipped"].shape[1]
        assert (kernel[:, :wrong] - case["as_shipped"]).abs().max() > 0.3 * scale


def test_forward_changes_no_parameter():
    """Pitfall: elsewhere a long input doubles C in place; the module then saves another C."""
    layer = make(l_max=64, tied=False).train()
    before = copy.deepcopy(layer.state_dict())
    for length in (10, 64, 65, 300):
        layer(torch.randn(2, length, 4)).sum().backward()
        with torch.no_grad():
            layer(torch.randn(2, length, 4))
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


# ---- convolution ----------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 77])
def test_convolution_is_the_direct_sum(length):
    """y[t] = sum_l K[l] u[t-l] + D u[t], for lengths below, at and above l_max."""
    layer = make(l_max=32).double()
    u = torch.randn(2, 4, length, dtype=torch.float64)
    k = layer.kernel(length)[0]
    expected = layer.D[:, None] * u
    for t in range(length):
        expected[..., t] += (u[..., : t + 1].flip(-1) * k[:, : t + 1]).sum(-1)
    torch.testing.assert_close(layer.convolve(u), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 50])
def test_the_second_kernel_looks_ahead(length):
    """Bidirectional: y[t] = sum_l K0[l] u[t-l] + sum_l K1[l] u[t+1+l] + D u[t].

    Pitfall: other implementations flip the second kernel without a shift of their own; this is
    the same convention, so their weights give their outputs (see test_checkpoint.py).
    """
    layer = make(l_max=32, bidirectional=True).double()
    u = torch.randn(2, 4, length, dtype=torch.float64)
    past, future = layer.kernel(length)
    expected = layer.D[:, None] * u
    for t in range(length):
        for other in range(length):
            k = past[:, t - other] if other <= t else future[:, other - t - 1]
            expected[..., t] += k * u[..., other]
    torch.testing.assert_close(layer.convolve(u), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [5, 8, 19])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_every_parameter(tied, bidirectional, length):
    """Analytic gradients are the numerical ones in double, for input and every parameter."""
    layer = perturbed(
        make(2, 4, 8, tied=tied, bidirectional=bidirectional).double(), 0.05
    )  # l_max = 8: shorter, equal, longer
    names = [name for name, _ in layer.named_parameters()]
    assert {"log_dt", "log_A_real", "A_imag", "P", "B", "C", "D"} < set(names)

    def f(u, *parameters):
        return functional_call(layer, dict(zip(names, parameters, strict=True)), u)

    u = torch.randn(2, length, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, (u, *layer.parameters()), atol=1e-7)


def test_training_keeps_no_tensor_of_features_times_states_times_samples():
    """What the backward pass holds grows as H L, not as H N L (pitfall: 5 GB for one kernel)."""
    layer, kept = make(8, 64, 4096), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(1, 4096, 8)).sum()
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert 0 < sum(sizes.values()) < 8 * 64 * 4096 * 4


@pytest.mark.parametrize("glu", [True, False])
def test_output_is_the_gated_projection_of_the_state_space(glu):
    """forward = GLU(W gelu(K * u + D u)), or without the gate W gelu(K * u + D u)."""
    layer = make(l_max=32, glu=glu)
    u = torch.randn(2, 20, 4)
    y = nn.functional.gelu(layer.convolve(u.transpose(1, 2)).transpose(1, 2))
    y = y @ layer.output.weight.T + layer.output.bias
    if glu:
        y = y[..., :4] * y[..., 4:].sigmoid()
    torch.testing.assert_close(layer(u), y)


def test_dropout_acts_in_training_only():
    layer = make(l_max=32, dropout=0.5)
    u = torch.randn(1, 20, 4)
    assert torch.equal(layer(u), layer(u))
    layer.train()
    assert not torch.equal(layer(u), layer(u))


def test_the_state_space_computes_in_float32_under_autocast():
    """Kernel and convolution are the same with bfloat16 autocast as without, and can be trained."""
    layer = make(l_max=500)
    u = torch.randn(2, 4, 500)
    expected = layer.convolve(u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.convolve(u), expected)
        assert torch.equal(layer.convolve(u.bfloat16()), layer.convolve(u.bfloat16().float()))
        y = layer(u.transpose(1, 2))
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in layer.parameters())


# ---- kept kernels ---------------------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch):
    """The lengths at which a kernel's spectrum is computed, in order."""
    lengths = []
    original = sashimi.s4.nplr_kernel

    def counting(*args):
        lengths.append(args[-1])
        return original(*args)

    monkeypatch.setattr(sashimi.s4, "nplr_kernel", counting)
    return lengths


def test_inference_computes_a_kernel_once(computed):
    """Pitfall: kernels recomputed on every inference pass although no parameter changed."""
    layer = make(l_max=64)
    u = torch.randn(1, 64, 4)
    with torch.no_grad():
        first = layer(u)
        assert torch.equal(layer(u), first)
        layer(u[:, :20])  # a part of the same kernel
    assert computed == [64]
    layer(u), layer(u)  # gradients need the computation itself
    assert computed == [64, 64, 64]


WRITES = {  # what changes a parameter's version, and what does not
    "in place": lambda p, value: p.copy_(value),
    "data": lambda p, value: p.data.copy_(value),
    "numpy": lambda p, value: np.copyto(p.detach().numpy(), value.numpy()),
    "averaging": lambda p, value: torch._foreach_lerp_([p.data], [value], 1.0),
    "optimizer": None, "load_state_dict": None, "assign": None, "double": None,
}  # fmt: skip


@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("name", ["C", "log_dt", "log_A_real", "A_imag", "P", "B"])
def test_a_changed_parameter_makes_a_new_kernel(name, how):
    """What inference keeps is never older than the parameters, however they were changed."""
    layer, u = make(l_max=64), torch.randn(1, 64, 4)
    with torch.no_grad():
        old = layer(u)
    changed = perturbed(copy.deepcopy(layer))
    state = layer.state_dict() | {name: changed.state_dict()[name]}
    if WRITES[how]:
        with torch.no_grad():
            WRITES[how](layer.get_parameter(name), state[name])
    elif how == "optimizer":
        layer.get_parameter(name).grad = layer.get_parameter(name).detach() - state[name]
        torch.optim.SGD([layer.get_parameter(name)], lr=1.0).step()
    elif how == "double":
        layer.load_state_dict(state)
        layer.double()
        u, state = u.double(), {k: v.double() for k, v in state.items()}
    else:
        layer.load_state_dict({k: v.clone() for k, v in state.items()}, assign=how == "assign")
    fresh = make(l_max=64).to(u.dtype)
    fresh.load_state_dict(state)
    with torch.no_grad():
        new = layer(u)
        torch.testing.assert_close(new, fresh(u))
        assert not torch.allclose(new.float(), old, atol=1e-4)


def test_values_that_only_changed_places_make_a_new_kernel():
    """The values are compared, not a sum of them; nor where they lie and how often they changed."""
    layer, u = make(l_max=64), torch.randn(1, 64, 4)
    with torch.no_grad():
        old, state = layer(u), layer.state_dict()
        layer.C.data.copy_(layer.C.flip(1))
        flipped = layer(u)
        assert not torch.allclose(flipped, old, atol=1e-2)
        layer.C.data.copy_(layer.C.flip(1))
        torch.testing.assert_close(layer(u), old)
        for c in (state["C"], state["C"].flip(1)) * 3:  # freed and made again: the same address
            got = functional_call(layer, {"C": c.clone()}, u)
            torch.testing.assert_close(got, old if c is state["C"] else flipped)


@pytest.fixture
def comparisons(monkeypatch):
    """How many layers were compared with what they had kept, at each look."""
    looks, original = [], sashimi.s4.forget_stale

    def counting(layers):
        looks.append(len(layers))
        return original(layers)

    monkeypatch.setattr(sashimi.s4, "forget_stale", counting)
    return looks


def test_a_model_looks_at_its_parameters_once_a_pass(comparisons, computed):
    """Each look is a wait for the GPU: one for all layers, none in training, none in a step."""
    net = Sashimi(d_model=4, n_layers=2, pool=[2], d_state=4, l_max=32).eval()
    x = torch.randn(1, 32, 4)
    net(x)
    assert comparisons == []
    computed.clear()
    with torch.no_grad():
        first = net(x)
        assert torch.equal(net(x), first) and comparisons == [4, 4] and len(computed) == 4
        other = copy.deepcopy(net)
        other.up[0][0].layer.C.data.mul_(2)
        torch.testing.assert_close(other(x), copy.deepcopy(other).train()(x))
        assert not torch.allclose(other(x), first)
        with pytest.raises(RuntimeError):
            net(x.to(torch.int64))
        comparisons.clear()
        net.up[0][0].layer(x)  # by itself, also after a pass that failed
        assert comparisons == [1]
        net.setup_rnn()
        state = net.default_state(1)
        comparisons.clear()
        for sample in x.unbind(1):
            net.step(sample, state)
    assert comparisons == []


# ---- recurrence -----------------------------------------------------------------------------


def stepped(layer, u, state=None):
    """Outputs (B, L, H) of stepping through u (B, L, H), and the last state."""
    layer.setup_rnn()
    state = layer.default_state(len(u)) if state is None else state
    out = []
    with torch.no_grad():
        for x in u.unbind(1):
            y, state = layer.step(x, state)
            out.append(y)
    return torch.stack(out, 1), state


@pytest.mark.parametrize("tied", [True, False])
def test_recurrence_constants_are_the_dense_matrices(tied):
    """a x - p (q x) + b u over both halves is Ab x + Bb u, and c is C, to double precision."""
    layer = perturbed(make(l_max=50, tied=tied), 0.03).double()
    a, p, q, b, c = (x.numpy() for x in layer.setup_rnn())
    a, p, q, b, c = (np.concatenate([x, x.conj()], -1) for x in (a, p, q, b, c))
    dense = Dense(layer)
    ab = a[:, :, None] * np.eye(64) - p[:, :, None] * q[:, None, :]
    np.testing.assert_allclose(ab, dense.Ab, atol=1e-11)
    np.testing.assert_allclose(b, dense.Bb[:, :, 0], atol=1e-11)
    np.testing.assert_allclose(c, dense.C[0, :, 0], atol=1e-8 * np.abs(c).max())


def test_a_step_reads_numbers_of_order_n_not_matrices():
    """Pitfall: a dense recurrence reads N x N matrices per feature and sample; ours five (H, M)."""
    layer = make(8, 64, 50)
    assert [tuple(x.shape) for x in layer.setup_rnn()] in (
        [(8, 32), (8, 32), (shared, 32), (8, 32), (8, 32)] for shared in (1, 8)
    )
    assert all(x.dtype == torch.complex64 for x in layer.setup_rnn())


def test_convolution_is_recurrence_at_the_hippo_start():
    """Over 16,000 steps in float32 within 1e-4.

    Pitfall: the diagonalised recurrence is off by 0.4 here, its eigenvectors are ill-conditioned.
    """
    layer = bare(make(16, 64, 16000))
    u = torch.randn(1, 16000, 16)
    with torch.no_grad():
        torch.testing.assert_close(stepped(layer, u)[0], layer(u), rtol=0, atol=1e-4)


@pytest.mark.parametrize("place", ["center", "up.0", "up.1"])
def test_convolution_is_recurrence_with_trained_weights(place):
    """Over 16,000 steps in float32 within 1e-4, l_max = 1024: the published trainer's weights."""
    backbone = load_checkpoint(FIXTURES / "published_ar.pt").backbone
    layer = bare(backbone.get_submodule(place)[0].layer)
    assert layer.l_max == 1024
    u = torch.randn(1, 16000, layer.d_model, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(stepped(layer, u)[0], layer(u), rtol=0, atol=1e-4)


@pytest.mark.parametrize("length", [1, 2, 3, 255, 256, 257, 700])
def test_absorbing_is_stepping(length):
    """The state after a prefix, by blocks and in parallel, is the state of stepping through it."""
    layer = perturbed(make(l_max=300, tied=False), 0.03).double()
    u = torch.randn(3, length, 4, dtype=torch.float64)
    torch.testing.assert_close(layer.absorb(u), stepped(layer, u)[1], rtol=1e-9, atol=1e-10)


def test_absorbing_in_float32_goes_on_where_stepping_would():
    """Outputs after an absorbed prefix are those of the convolution over the whole."""
    layer = bare(make(l_max=2000))
    u = torch.randn(2, 2000, 4)
    with torch.no_grad():
        rest, _ = stepped(layer, u[:, 1500:], layer.absorb(u[:, :1500]))
        torch.testing.assert_close(rest, layer(u)[:, 1500:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("sizes", [[1, 1, 98], [33, 67], [64, 32, 4]])
def test_advancing_in_pieces_is_the_convolution(sizes):
    """Each from the state of the one before: outputs of the whole, state of stepping through it."""
    layer = perturbed(make(l_max=60, tied=False), 0.03).double()
    u, state, out = torch.randn(3, 100, 4, dtype=torch.float64), None, []
    with torch.no_grad():
        for part in u.split(sizes, 1):
            y, state = layer.advance(part, state)
            out.append(y)
        torch.testing.assert_close(torch.cat(out, 1), layer(u), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(state, stepped(layer, u)[1], rtol=1e-9, atol=1e-10)


def test_absorbing_nothing_is_the_default_state():
    layer = make(l_max=64)
    state = layer.absorb(torch.zeros(3, 0, 4))
    assert state.shape == (3, 4, 32) and state.dtype == torch.complex64 and not state.any()
    assert torch.equal(state, layer.default_state(3))


@pytest.mark.parametrize("through", ["the parameter", "data"])
def test_step_prepares_itself_and_setup_follows_the_parameters(through):
    """The first step sets the constants up; setup_rnn takes changed parameters over."""
    layer = bare(make(l_max=64))
    u = torch.randn(2, 4)
    with torch.no_grad():
        first, _ = layer.step(u, layer.default_state(2))
        torch.testing.assert_close(first, layer(u[:, None])[:, 0])
        changed = perturbed(copy.deepcopy(layer))
        for p, new in zip(layer.parameters(), changed.parameters(), strict=True):
            (p.data if through == "data" else p).copy_(new)
        layer.setup_rnn()
        second, _ = layer.step(u, layer.default_state(2))
        changed.forget()  # it was copied with what the layer kept
        torch.testing.assert_close(second, changed(u[:, None])[:, 0])
        assert not torch.allclose(first, second)


def test_double_recurrence_after_a_float_one():
    """Constants follow the module's precision: a layer made double steps in double."""
    layer = bare(make(l_max=64))
    with torch.no_grad():
        layer.step(torch.randn(2, 4), layer.default_state(2))
        layer.double()
        u = torch.randn(2, 40, 4, dtype=torch.float64)
        state, out = layer.default_state(2), []
        for x in u.unbind(1):
            y, state = layer.step(x, state)
            out.append(y)
        torch.testing.assert_close(torch.stack(out, 1), layer(u), rtol=0, atol=1e-12)


@pytest.mark.parametrize("call", ["setup_rnn", "step", "absorb"])
def test_a_bidirectional_layer_has_no_recurrence(call):
    layer = make(l_max=64, bidirectional=True)
    arguments = {
        "setup_rnn": (),
        "step": (torch.zeros(1, 4), layer.default_state(1)),
        "absorb": (torch.zeros(1, 5, 4),),
    }
    with pytest.raises(ValueError, match="bidirectional"):
        getattr(layer, call)(*arguments[call])


# ---- a module among modules -----------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_own_their_memory(tied):
    """Pitfall: stride-0 expanded parameters cannot be loaded into or trained."""
    layer = make(l_max=64, tied=tied)
    assert layer.P.shape == (1 if tied else 4, 32, 2)
    pointers = set()
    for p in layer.parameters():
        assert p.is_contiguous() and p.untyped_storage().nbytes() == p.numel() * p.element_size()
        pointers.add(p.data_ptr())
    assert len(pointers) == len(list(layer.parameters()))
    layer.load_state_dict(make(l_max=64, tied=tied, seed=1).state_dict())
    before = layer.P.detach().clone()
    layer(torch.randn(1, 64, 4)).square().sum().backward()
    torch.optim.AdamW(layer.parameters()).step()
    assert (layer.P != before).any()


def test_the_state_dict_holds_parameters_only():
    """Pitfall: nodes saved as buffers. What inference keeps is neither saved nor needed."""
    layer = make(l_max=64)
    with torch.no_grad():
        layer(torch.randn(1, 64, 4))
        layer.setup_rnn()
    assert layer.state_dict().keys() == dict(layer.named_parameters()).keys()
    assert not list(layer.buffers())


def test_inference_mode_is_no_grad():
    """Under inference_mode, for a layer made there too: the same output."""
    u = torch.randn(1, 64, 4)
    with torch.no_grad():
        expected = make(l_max=64)(u)
    layer = make(l_max=64)
    with torch.inference_mode():
        assert torch.equal(layer(u), expected)
        assert torch.equal(make(l_max=64)(u), expected)
    layer(u).sum().backward()  # and nothing kept from there is in the way of training
    assert layer.C.grad.isfinite().all()
