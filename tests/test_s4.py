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


def perturbed(layer, scale=0.1, seed=1):
    """Every parameter away from its start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p += scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return layer


class Dense:
    """Ab (H, N, N), Bb (H, N, 1) and C (channels, H, 1, N) of a layer, complex128."""

    def __init__(self, layer):
        array = {k: v.detach().double().numpy() for k, v in layer.named_parameters()}

        def both(x):  # (..., M) -> (..., N): the stored half, then its conjugates
            return np.concatenate([x, x.conj()], -1)

        lam = both(-np.exp(array["log_A_real"]) + 1j * array["A_imag"])
        p, b, ct = (both(x[..., 0] + 1j * x[..., 1]) for x in (array["P"], array["B"], array["C"]))
        eye = np.eye(lam.shape[-1])
        a = lam[:, :, None] * eye - p[:, :, None] * p[:, None, :].conj()
        dt = np.exp(array["log_dt"])[:, None, None]
        left = eye - dt / 2 * a
        self.Ab = np.linalg.solve(left, eye + dt / 2 * a)
        self.Bb = np.linalg.solve(left, dt * b[:, :, None])
        back = eye - np.linalg.matrix_power(self.Ab, layer.l_max)  # stored is C (I - Ab^l_max)
        c = np.linalg.solve(np.swapaxes(back, -1, -2), ct[..., None])
        self.C = np.swapaxes(c, -1, -2)

    def kernel(self, length):
        """Every tap, (channels, H, length)."""
        x, power = self.Bb, self.Ab
        while x.shape[-1] < length:
            x, power = np.concatenate([x, power @ x], -1), power @ power
        taps = (self.C @ x[..., :length])[..., 0, :]
        assert np.abs(taps.imag).max() < 1e-9 * np.abs(taps.real).max()
        return taps.real


def relative_error(kernel, truth):
    """Largest error as a fraction of the largest tap, of the worst feature."""
    kernel = kernel.detach().double().numpy()
    error = np.abs(kernel[..., : truth.shape[-1]] - truth)
    return (error / np.abs(kernel).max(-1, keepdims=True)).max()


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
    a = v @ (np.diag(lam) - np.outer(p, p.conj())) @ v.conj().T
    np.testing.assert_allclose(a, dense, atol=1e-9 * n)
    np.testing.assert_allclose(v @ b, root, atol=1e-9 * n)


def test_a_new_layer_is_hippo_with_log_uniform_steps():
    """Start: Lambda, P, B of HiPPO-LegS, dt log-uniform in [1e-3, 1e-1], C of unit variance."""
    torch.manual_seed(0)
    layer = S4(1000, 4, 16)
    P, B = torch.view_as_complex(layer.P)[0], torch.view_as_complex(layer.B)[0]
    started = [torch.complex(-layer.log_A_real.exp(), layer.A_imag)[0], P, B]
    torch.testing.assert_close(started, [x.to(torch.complex64) for x in hippo_legs(4)])
    quantiles = layer.log_dt.exp().quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    expected = torch.tensor([1e-3, 10**-2.5, 1e-2, 10**-1.5, 1e-1])
    torch.testing.assert_close(quantiles, expected, rtol=0.2, atol=0)
    assert 0.9 < np.mean(np.abs(Dense(layer).C[0, :, 0, :2]) ** 2) < 1.1


@pytest.mark.parametrize("size", ["d_state=0", "d_state=-2", "d_state=63", "d_model=0", "l_max=0"])
def test_sizes_that_make_no_state_space_are_refused(size):
    """Pitfall: an odd d_state silently drops a state elsewhere."""
    name, value = size.split("=")
    with pytest.raises(ValueError, match=size):
        S4(**({"d_model": 4} | {name: int(value)}))


LENGTHS = [(100, 1), (100, 99), (101, 40), (101, 101), (101, 102), (100, 256), (33, 1000), (1, 7),
           (1024, 1024), (16000, 16000)]  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("l_max", "length"), LENGTHS)
def test_float32_kernel_of_any_length_is_c_ab_l_bb(l_max, length, tied):
    """Within 5e-6 of max|K|, at the start and away from it; shorter and longer than l_max: Ct
    doubled, Ct (I + Ab^n), is exact and leaves C alone."""
    layer = make(4 if length <= 1024 else 2, l_max=l_max, tied=tied)
    layer = perturbed(layer, 0.03) if l_max in (101, 1024) else layer
    before, kernel = layer.C.clone(), layer.kernel(length)
    assert kernel.shape == (1, layer.d_model, length) and kernel.dtype == torch.float32
    assert torch.equal(layer.C, before)
    truth = Dense(layer).kernel(max(length, l_max))
    error = np.abs(kernel.detach().numpy() - truth[..., :length])
    assert (error / np.abs(truth).max(-1, keepdims=True)).max() < 5e-6


@pytest.mark.parametrize("case", KERNELS)
def test_kernels_of_other_implementations(case):
    """K from the Ct that two other implementations stored is the first-principles K they meant,
    tied or not, l_max below, at and above the length. Float32 rounding of a short Ct costs up to
    3e-6. The published CPU fallback forgets the conjugate poles and is not matched."""
    parameters = case["parameters"]
    layer = S4(2, 64, case["l_max"], tied=len(parameters["B"]) == 1)
    layer.load_state_dict(parameters, strict=False)
    kernel, first = layer.kernel(case["length"]), case["truth"].shape[1]
    assert relative_error(kernel, Dense(layer).kernel(first)) < 1e-6

    kernel, scale = kernel[0].detach().double(), case["truth"].abs().max()
    bound = 1e-6 if case["l_max"] >= 400 else 5e-6
    assert (kernel[:, :first] - case["truth"]).abs().max() < bound * scale
    if "tail" in case:
        assert (kernel[:, -32:] - case["tail"]).abs().max() < bound * scale
    if "as_shipped" in case:
        wrong = case["as_shipped"].shape[1]
        assert (kernel[:, :wrong] - case["as_shipped"]).abs().max() > 0.3 * scale


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 77])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_convolution_is_the_direct_sum(bidirectional, length):
    """y[t] = sum_l K0[l] u[t-l] (+ sum_l K1[l] u[t+1+l]) + D u[t], around l_max = 32."""
    layer = make(l_max=32, bidirectional=bidirectional).double()
    u = torch.randn(2, 4, length, dtype=torch.float64)
    kernels = layer.kernel(length)
    expected = layer.D[:, None] * u
    for t in range(length):
        expected[..., t] += (u[..., : t + 1].flip(-1) * kernels[0, :, : t + 1]).sum(-1)
        if bidirectional:
            expected[..., t] += (u[..., t + 1 :] * kernels[1, :, : length - t - 1]).sum(-1)
    torch.testing.assert_close(layer.convolve(u), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [5, 8, 19])
@pytest.mark.parametrize(("tied", "bidirectional"), [(True, False), (False, True)])
def test_gradients_of_every_parameter(tied, bidirectional, length):
    """Analytic gradients are the numerical ones in double, for input and every parameter."""
    layer = make(2, 4, 8, tied=tied, bidirectional=bidirectional)  # shorter, equal, longer
    layer = perturbed(layer.double(), 0.05)
    names = [name for name, _ in layer.named_parameters()]

    def f(u, *parameters):
        return functional_call(layer, dict(zip(names, parameters, strict=True)), u)

    u = torch.randn(2, length, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, (u, *layer.parameters()), atol=1e-7)


def test_training_keeps_no_tensor_of_features_times_states_times_samples():
    """What the backward pass holds grows as H L, not as H N L."""
    layer, kept = make(8, 64, 4096), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(1, 4096, 8)).sum()
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert 0 < sum(sizes.values()) < 8 * 64 * 4096 * 4


@pytest.mark.parametrize("glu", [True, False])
def test_output_is_the_gated_projection_of_the_state_space(glu):
    """forward = GLU(W gelu(K * u + D u)), or without the gate W gelu(K * u + D u); dropout acts in
    training only."""
    layer, u = make(l_max=32, glu=glu, dropout=0.5), torch.randn(2, 20, 4)
    y = nn.functional.gelu(layer.convolve(u.transpose(1, 2)).transpose(1, 2))
    y = y @ layer.output.weight.T + layer.output.bias
    torch.testing.assert_close(layer(u), y[..., :4] * y[..., 4:].sigmoid() if glu else y)
    assert not torch.equal(layer.train()(u), layer(u))


def test_the_state_space_computes_in_float32_under_autocast():
    """Kernel and convolution are the same with bfloat16 autocast as without, and can be trained."""
    layer, u = make(l_max=500), torch.randn(2, 4, 500)
    expected = layer.convolve(u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.convolve(u), expected)
        assert torch.equal(layer.convolve(u.bfloat16()), layer.convolve(u.bfloat16().float()))
        y = layer(u.transpose(1, 2))
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in layer.parameters())


@pytest.fixture
def calls(monkeypatch):
    """Arguments of `nplr_kernel` and `forget_stale`, as lengths and numbers of layers, in order."""
    lists = {"nplr_kernel": [], "forget_stale": []}
    for name, measure in [("nplr_kernel", int), ("forget_stale", len)]:
        own = getattr(sashimi.s4, name)

        def counting(*args, found=lists[name], measure=measure, own=own):
            found.append(measure(args[-1]))
            return own(*args)

        monkeypatch.setattr(sashimi.s4, name, counting)
    return lists


def test_inference_computes_a_kernel_once(calls):
    """Under inference_mode, for a layer made there too, the same output as under no_grad."""
    layer, u = make(l_max=64), torch.randn(1, 64, 4)
    with torch.no_grad():
        first = layer(u)
        assert torch.equal(layer(u), first)
        layer(u[:, :20])  # a part of the same kernel
    assert calls["nplr_kernel"] == [64]
    layer(u), layer(u)  # gradients need the computation itself
    assert calls["nplr_kernel"] == [64, 64, 64]
    other = make(l_max=64)
    with torch.inference_mode():
        assert all(torch.equal(each(u), first) for each in (layer, other, make(l_max=64)))
    other(u).sum().backward()  # nothing kept from there is in the way of training
    assert other.C.grad.isfinite().all()


HOW = ["in place", "data", "numpy", "averaging", "optimizer", "load", "assign", "double"]


def write(layer, how, name, value):
    """Change a parameter, its version or not."""
    p, state = layer.get_parameter(name), layer.state_dict() | {name: value}
    if how == "optimizer":
        p.grad = p.detach() - value
        torch.optim.SGD([p], lr=1.0).step()
    elif how in ("load", "assign"):
        layer.load_state_dict({k: v.clone() for k, v in state.items()}, assign=how == "assign")
    elif how == "numpy":
        np.copyto(p.detach().numpy(), value.numpy())
    elif how == "averaging":
        torch._foreach_lerp_([p.data], [value], 1.0)
    else:
        (p.data if how == "data" else p).copy_(value)
    if how == "double":
        layer.double()


@pytest.mark.parametrize("name", [*S4.SSM_PARAMETERS, "C"])
@pytest.mark.parametrize("how", HOW)
def test_a_changed_parameter_makes_a_new_kernel(how, name):
    """What inference keeps is never older than the parameters, however they were changed."""
    layer, u = make(l_max=64), torch.randn(1, 64, 4)
    with torch.no_grad():
        old = layer(u)
        write(layer, how, name, perturbed(make(l_max=64)).state_dict()[name])
        u = u.to(layer.D.dtype)
        fresh = make(l_max=64).to(u.dtype)
        fresh.load_state_dict(layer.state_dict())
        torch.testing.assert_close(layer(u), fresh(u))
        assert not torch.allclose(layer(u).float(), old, atol=1e-4)


@torch.no_grad()
def test_a_model_looks_at_its_parameters_once_a_pass(calls):
    """Each look is a wait for the GPU: one for all layers, none in training, none in a step."""
    net, looks = Sashimi(4, 2, [2], d_state=4, l_max=32).eval(), calls["forget_stale"]
    x = torch.randn(1, 32, 4)
    with torch.enable_grad():
        net(x)
    assert looks == []
    first = net(x)
    assert torch.equal(net(x), first) and looks == [4, 4]
    other = copy.deepcopy(net)
    other.up[0][0].layer.C.data.mul_(2)
    torch.testing.assert_close(other(x), copy.deepcopy(other).train()(x))
    assert not torch.allclose(other(x), first)
    with pytest.raises(RuntimeError):
        net(x.to(torch.int64))
    looks.clear()
    net.up[0][0].layer(x)  # by itself, also after a pass that failed
    state = net.default_state(1)
    net.absorb(x, state)
    assert looks == [1, 4]
    net.setup_rnn()
    looks.clear()
    for sample in x.unbind(1):
        net.step(sample, state)
    assert looks == []
    with torch.enable_grad():
        for p in net.requires_grad_(False).parameters():  # gone on from with gradients enabled
            p.data.mul_(1.1)
        fresh = copy.deepcopy(net).train().eval()  # has kept nothing
        outputs = [model.absorb(x, state.copy()) for model in (net, fresh)]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


@torch.no_grad()
def stepped(layer, u):
    """Outputs (B, L, H) of stepping through u (B, L, H), and the last state."""
    layer.setup_rnn()
    state, out = layer.default_state(len(u)), []
    for x in u.unbind(1):
        y, state = layer.step(x, state)
        out.append(y)
    return torch.stack(out, 1), state


@pytest.mark.parametrize("tied", [True, False])
def test_recurrence_constants_are_the_dense_matrices(tied):
    """a x - p (q x) + b u over both halves is Ab x + Bb u, and c is C, to double precision; five
    (H, M) per layer, no N x N matrices."""
    layer = perturbed(make(l_max=50, tied=tied), 0.03)
    assert all(x.shape == (4, 32) and x.dtype == torch.complex64 for x in layer.setup_rnn())
    constants = (x.numpy() for x in layer.double().setup_rnn())
    a, p, q, b, c = (np.concatenate([x, x.conj()], -1) for x in constants)
    dense = Dense(layer)
    ab = a[:, :, None] * np.eye(64) - p[:, :, None] * q[:, None, :]
    np.testing.assert_allclose(ab, dense.Ab, atol=1e-11)
    np.testing.assert_allclose(b, dense.Bb[:, :, 0], atol=1e-11)
    np.testing.assert_allclose(c, dense.C[0, :, 0], atol=1e-8 * np.abs(c).max())
    assert relative_error(layer.kernel(200), dense.kernel(200)) < 1e-9


@pytest.mark.parametrize("place", ["the start", "center", "up.0", "up.1"])
def test_convolution_is_recurrence(place):
    """Over 16,000 steps in float32 within 1e-4, at the HiPPO start and with trained weights: the
    diagonalised recurrence is off by 0.4 here."""
    if place == "the start":
        layer = make(16, 64, 16000)
    else:  # the published trainer's, l_max = 1024
        backbone = load_checkpoint(FIXTURES / "published_ar.pt").backbone
        layer = backbone.get_submodule(place)[0].layer
    layer.project = lambda y: y  # the state space alone
    u = torch.randn(1, 16000, layer.d_model, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(stepped(layer, u)[0], layer(u), rtol=0, atol=1e-4)


@pytest.mark.parametrize("sizes", [[1], [2], [3], [255], [256], [700], [1, 1, 98], [63, 128, 65]])
def test_advancing_in_pieces_is_the_convolution(sizes):
    """Each from the state of the one before: outputs of the whole, state of stepping through it."""
    layer = perturbed(make(l_max=60, tied=False), 0.03).double()
    u, state, out = torch.randn(3, sum(sizes), 4, dtype=torch.float64), None, []
    with torch.no_grad():
        for part in u.split(sizes, 1):
            y, state = layer.advance(part, state)
            out.append(y)
        torch.testing.assert_close(torch.cat(out, 1), layer(u), rtol=1e-9, atol=1e-10)
        from_zeros = layer.advance(u, layer.default_state(3))  # None is the same state
    torch.testing.assert_close(state, stepped(layer, u)[1], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(from_zeros[1], state, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("how", ["in place", "data", "double"])
def test_step_prepares_itself_and_setup_follows_the_parameters(how):
    """The first step sets the constants up; setup_rnn takes over changed parameters, and a layer
    made double steps in double without it."""
    layer, u = make(l_max=64), torch.randn(2, 4)
    with torch.no_grad():
        first, _ = layer.step(u, layer.default_state(2))
        torch.testing.assert_close(first, layer(u[:, None])[:, 0])
        for name, value in perturbed(make(l_max=64)).state_dict().items():
            write(layer, how, name, value)
        if how != "double":
            layer.setup_rnn()
        u = u.to(layer.D.dtype)
        second, _ = layer.step(u, layer.default_state(2))
        torch.testing.assert_close(second, layer(u[:, None])[:, 0])
        assert not torch.allclose(first.to(u.dtype), second)


@pytest.mark.parametrize("call", ["setup_rnn", "step", "advance"])
def test_a_bidirectional_layer_has_no_recurrence(call):
    layer = make(l_max=64, bidirectional=True)
    arguments = {"setup_rnn": (), "step": (torch.zeros(1, 4), layer.default_state(1))}
    with pytest.raises(ValueError, match="bidirectional"):
        getattr(layer, call)(*arguments.get(call, (torch.zeros(1, 5, 4),)))


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_own_their_memory_and_are_all_that_is_saved(tied):
    """Expanded parameters cannot be loaded into or trained; forward changes no parameter."""
    layer = make(l_max=64, tied=tied)
    assert layer.P.shape == (1 if tied else 4, 32, 2)
    for p in layer.parameters():
        assert p.is_contiguous() and p.untyped_storage().nbytes() == p.numel() * p.element_size()
    parameters = list(layer.parameters())
    assert len({p.data_ptr() for p in parameters}) == len(parameters)
    layer.load_state_dict(make(l_max=64, tied=tied, seed=1).state_dict())
    before = copy.deepcopy(layer.state_dict())
    for length in (10, 64, 65, 300):
        with torch.no_grad():
            layer(torch.randn(2, length, 4))
        layer(torch.randn(2, length, 4)).square().sum().backward()
    layer.setup_rnn()
    after = layer.state_dict()
    assert before.keys() == after.keys() == dict(layer.named_parameters()).keys()
    assert all(torch.equal(before[k], after[k]) for k in before) and not list(layer.buffers())
    torch.optim.AdamW(layer.parameters()).step()
    assert all((p != before[k]).any() for k, p in layer.named_parameters())
