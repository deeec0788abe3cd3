"""cauchy_kernel: the compiled operations, their plain reference, and the way they are built.

The first principles are here in dense matrices: A = diag(Lambda) - P P*, the bilinear Ab and Bb,
K[l] = C Ab^l Bb and Ct = C (I - Ab^L), in complex128.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cauchy_kernel
from cauchy_kernel import benchmark, build, native, ops, plain

ROOT = Path(__file__).parent.parent
FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ["Lambda", "P", "B", "Ct", "dt"]
C64, C128 = torch.complex64, torch.complex128


def has_compiler(backend):
    try:
        return bool(build.compiler(backend))
    except build.BuildError:
        return False


needs_compiler = pytest.mark.skipif(not has_compiler("cpu"), reason="needs a C++ compiler")


@pytest.fixture(params=["torch", pytest.param("cpu", marks=needs_compiler)])
def backend(request, monkeypatch):
    """Each test that asks for it runs on plain PyTorch and compiled."""
    return force(request.param, monkeypatch)


def force(name, monkeypatch):
    monkeypatch.setenv("SASHIMI_KERNEL", name)
    native.library.cache_clear()
    return name


@pytest.fixture(autouse=True)
def _fresh():
    """The environment is read anew in each test; one thread, for busy machines."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    native.library.cache_clear()


def example(n_features, n_states, dtype=C64, shared=False, device="cpu"):
    """Parameters with n_states stored states; `shared`: one set of states for all features."""
    Lambda, P, B, Ct, dt = benchmark.example(n_features, 2 * n_states, dtype, device)
    return [x[:1] if shared else x for x in (Lambda, P, B)] + [Ct, dt]


def double(parameters):
    return [x.cpu().to(torch.promote_types(x.dtype, torch.float64)) for x in parameters]


def dense(Lambda, P, B, C, dt, L, taps=None):
    """K (H, taps) and Ct (H, M) from C (H, M), by matrices."""
    kernels, corrected = [], []
    for h in range(len(C)):
        s = h if len(P) > 1 else 0
        lam, p, b, c = (torch.cat([x, x.conj()]) for x in (Lambda[s], P[s], B[s], C[h]))
        A, one = torch.diag(lam) - torch.outer(p, p.conj()), torch.eye(len(lam), dtype=C128)
        Ab = torch.linalg.solve(one - dt[h] / 2 * A, one + dt[h] / 2 * A)
        Bb = torch.linalg.solve(one - dt[h] / 2 * A, dt[h] * b)
        corrected.append((c @ (one - torch.linalg.matrix_power(Ab, L)))[: len(lam) // 2])
        x, power = Bb[:, None], Ab  # Krylov matrix by doubling
        while x.shape[1] < (taps or L):
            x, power = torch.cat([x, power @ x], 1), power @ power
        kernels.append((c @ x[:, : taps or L]).real)
    return torch.stack(kernels), torch.stack(corrected)


def kernel_of(parameters, L):
    return torch.fft.irfft(cauchy_kernel.nplr_kernel(*parameters, L), n=L)


def relative(x, y):
    return ((x.cpu() - y).abs().max() / y.abs().max().clamp(min=1e-300)).item()


# --- the formula -------------------------------------------------------------------------------


LENGTHS = [(False, L) for L in (1, 2, 3, 16, 101, 1024)]
LENGTHS += [(True, L) for L in (1, 2, 3, 16, 100, 16000, 64000)]


@pytest.mark.parametrize("shared, L", LENGTHS)
def test_kernel_is_c_ab_to_the_l_bb(backend, shared, L):
    Lambda, P, B, C, dt = example(2, 32, C128, shared)
    truth, Ct = dense(Lambda, P, B, C, dt, L)
    parameters = [Lambda, P, B, Ct, dt]
    assert relative(kernel_of(parameters, L), truth) < 1e-11
    single = [x.to(C64) for x in parameters[:4]] + [dt.float()]
    assert relative(kernel_of(single, L), truth) < 5e-6


def test_float32_kernel_is_exact_without_double(backend, monkeypatch):
    """As above where the small case, otherwise computed in double, is computed in float32."""
    monkeypatch.setattr(ops, "SMALL", 0)
    for L in (16, 100, 101, 1024, 16000):
        Lambda, P, B, C, dt = example(4, 32, C128)
        truth, Ct = dense(Lambda, P, B, C, dt, L)
        single = [x.to(C64) for x in (Lambda, P, B, Ct)] + [dt.float()]
        assert relative(kernel_of(single, L), truth) < 5e-6


class TensorFloat32(TorchDispatchMode):
    """Matrix products of float32 as a GPU makes them with TF32: operands of 10 bits after the 1."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if re.fullmatch("matmul|b?mm|mv|dot|addb?mm|baddbmm|einsum", func.overloadpacket.__name__):
            args = [self.rounded(x) for x in args]
        return func(*args, **(kwargs or {}))

    @staticmethod
    def rounded(x):
        if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
            return x
        return ((x.contiguous().view(torch.int32) + (1 << 12)) & -(1 << 13)).view(x.dtype)


def in_tf32(function):
    def run(*args):
        with TensorFloat32():
            return function(*args)

    return run


def test_tf32_changes_no_bit_of_the_plain_kernel_and_its_gradient(monkeypatch):
    """The trainer switches TF32 on where there is a GPU; products of three digits would follow."""
    force("torch", monkeypatch)
    monkeypatch.setattr(ops, "SMALL", 0)
    parameters = example(4, 32)
    truth = benchmark.gradients(cauchy_kernel.nplr_kernel, parameters, 4000)
    for name in ("coefficients", "forward", "backward", "coefficients_backward"):
        monkeypatch.setattr(plain, name, in_tf32(getattr(plain, name)))  # operations are opaque
    values = benchmark.gradients(cauchy_kernel.nplr_kernel, parameters, 4000)
    assert all(torch.equal(x, y) for x, y in zip(values, truth, strict=True))
    x = torch.randn(50, 50)
    with TensorFloat32():
        assert 1e-4 < relative(x @ x, x.double() @ x.double()) < 1e-2  # the emulation emulates


def test_nodes_are_exact_for_any_length():
    mpmath = pytest.importorskip("mpmath")
    for L in (3, 100, 101, 16000, 2**18, 2**18 + 1):
        y = plain.nodes(L)
        for j in {0, 1, L // 4, L // 3, (L + 1) // 2 - 1}:
            with mpmath.workdps(40):
                exact = 2 * mpmath.tan(mpmath.pi * j / L)
                assert abs(y[j].item() - exact) <= 4e-16 * abs(exact), (L, j)


SHAPES = [
    (1, 1, 1), (1, 2, 2), (64, 1, 3), (256, 2, 100), (1, 64, 101), (64, 32, 1024),
    (256, 64, 1024), (64, 32, 16000), (64, 2, 64000), (1, 32, 2**18),
]  # fmt: skip


@pytest.mark.parametrize("H, M, L", SHAPES)
def test_float32_and_its_gradient_are_the_complex128_ones(H, M, L, backend):
    """The truth in complex128 is plain PyTorch, which other tests hold against dense matrices."""
    if backend == "torch" and H * M * L > 5e6:
        pytest.skip("slow, and the same code as at smaller sizes")
    parameters = example(H, M)
    values = benchmark.gradients(cauchy_kernel.nplr_kernel, parameters, L)
    truth = benchmark.gradients(cauchy_kernel.nplr_kernel, double(parameters), L)
    errors = dict(zip(["Khat", *NAMES], benchmark.largest_errors(values, truth), strict=True))
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("L", [1, 2, 3, 100, 101])
@pytest.mark.parametrize("M", [1, 2, 32])
def test_value_and_gradient_are_those_of_the_formula_as_written(backend, L, M):
    parameters = example(3, M, C128)
    values = benchmark.gradients(cauchy_kernel.nplr_kernel, parameters, L)
    truth = benchmark.gradients(benchmark.naive, parameters, L)
    errors = dict(zip(["Khat", *NAMES], benchmark.largest_errors(values, truth), strict=True))
    if L == 1:  # z = 0: dt cancels, and the formula as written finds rounding errors instead of 0
        assert values[5].abs().max() < 1e-12 and errors.pop("dt") is not None
    assert max(errors.values()) < 1e-10, errors


@pytest.mark.parametrize("L", [1, 7, 8])
@pytest.mark.parametrize("shared", [False, True], ids=["untied", "tied"])
def test_gradient_is_the_derivative(backend, L, shared):
    Lambda, P, B, _, dt = example(2, 2, C128, shared)
    Lambda[0, 0] = Lambda[0, 0].conj()  # either half of a pair may be the stored one
    inputs = [Lambda, P, B, torch.randn(2, 2, 2, dtype=C128), dt]
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: cauchy_kernel.nplr_kernel(*x, L), inputs)


def test_either_half_of_a_pair_may_be_stored(backend):
    parameters = example(3, 4, C128)
    flip = torch.rand(3, 4) < 0.5
    spectrum = cauchy_kernel.nplr_kernel(*parameters, 100)
    other = [torch.where(flip, x.conj(), x) for x in parameters[:4]] + [parameters[4]]
    torch.testing.assert_close(cauchy_kernel.nplr_kernel(*other, 100), spectrum)
    views = [x.conj() for x in parameters[:4]] + [parameters[4]]  # views, not yet conjugated
    torch.testing.assert_close(cauchy_kernel.nplr_kernel(*views, 100), spectrum)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_channels_are_independent(backend, channels):
    Lambda, P, B, _, dt = example(3, 4, C128)
    Ct = torch.randn(channels, 3, 4, dtype=C128)
    together = benchmark.gradients(cauchy_kernel.nplr_kernel, [Lambda, P, B, Ct, dt], 101)[0]
    for c in range(channels):
        one = cauchy_kernel.nplr_kernel(Lambda, P, B, Ct[c], dt, 101)
        torch.testing.assert_close(together[c], one)


def test_tied_states_are_untied_states_repeated(backend):
    Lambda, P, B, Ct, dt = example(5, 4, C128, shared=True)
    tied = benchmark.gradients(cauchy_kernel.nplr_kernel, [Lambda, P, B, Ct, dt], 100)
    repeated = [x.expand(5, -1) for x in (Lambda, P, B)]
    untied = benchmark.gradients(cauchy_kernel.nplr_kernel, [*repeated, Ct, dt], 100)
    for i in (1, 2, 3):
        untied[i] = untied[i].sum(0, keepdim=True)
    torch.testing.assert_close(tied, untied)


def test_without_low_rank_part_it_is_a_diagonal_state_space(backend):
    Lambda, P, B, Ct, dt = example(2, 4, C128)
    truth, Ct = dense(Lambda, 0 * P, B, Ct, dt, 50)
    assert relative(kernel_of([Lambda, 0 * P, B, Ct, dt], 50), truth) < 1e-12


def test_dt_has_no_gradient_at_length_1(backend):
    """At z = 0 the step cancels: the gradient is 0, not what rounding leaves of it."""
    assert benchmark.gradients(cauchy_kernel.nplr_kernel, example(64, 32), 1)[5].abs().max() == 0


@needs_compiler
def test_results_repeat_bit_by_bit_whatever_the_threads(monkeypatch):
    force("cpu", monkeypatch)
    parameters, runs = example(3, 8), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(benchmark.gradients(cauchy_kernel.nplr_kernel, parameters, 60000))
    for run in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], run, strict=True))


# --- cauchy_mult -------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
def test_cauchy_mult_is_the_sum_of_the_fixtures(symmetric):
    """Fixture F: sums of two other implementations, plain and with the conjugate half."""
    for case in torch.load(FIXTURES / "F_cauchy.pt", weights_only=True)["cases"]:
        v, z, w = case["v"], case["z"], case["w"]
        truth = case["sum_conj_symmetric" if symmetric else "sum_plain"]
        y = cauchy_kernel.cauchy_mult(v, z, w, symmetric=symmetric)
        assert y.shape == truth.shape and relative(y, truth) < 1e-13
        y = cauchy_kernel.cauchy_mult(v.to(C64), z.to(C64), w.to(C64), symmetric=symmetric)
        assert y.dtype == C64 and relative(y, truth) < 1e-5


@pytest.mark.parametrize("symmetric", [False, True])
def test_cauchy_mult_gradient_is_the_derivative(symmetric):
    v, w = torch.randn(2, 3, 4, dtype=C128), torch.randn(3, 4, dtype=C128)
    inputs = [x.requires_grad_() for x in (v, 3 * torch.randn(5, dtype=C128), w)]
    assert torch.autograd.gradcheck(lambda *x: cauchy_kernel.cauchy_mult(*x, symmetric), inputs)


def test_cauchy_mult_in_blocks_is_cauchy_mult_at_once(monkeypatch):
    v, z, w = torch.randn(5, 6, dtype=C128), torch.randn(70, dtype=C128), torch.randn(5, 6).to(C128)
    monkeypatch.setattr(plain, "BLOCK", 50)
    truth = (v[..., None] / (z - w[..., None])).sum(1)
    torch.testing.assert_close(cauchy_kernel.cauchy_mult(v, z, w, False), truth)


# --- PyTorch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [C64, C128])
def test_opcheck(dtype):
    inputs = [x.requires_grad_() for x in example(2, 2, dtype)]
    inputs[3] = inputs[3].detach()[None].requires_grad_()
    torch.library.opcheck(ops.nplr, (*inputs, 10))
    v, z, w = (torch.randn(3, 4, dtype=dtype, requires_grad=True) for _ in range(3))
    torch.library.opcheck(ops.cauchy, (v, z.detach()[0].requires_grad_(), w, True))


@pytest.mark.parametrize("channels", [1, 2])
def test_gradients_lie_in_memory_as_compiled_code_expects(backend, channels):
    """Contiguous, as the fake operation says: torch.compile fails at others (bidirectional S4)."""
    Lambda, P, B, Ct, dt = (x.detach() for x in example(4, 3, C64))
    Ct = Ct.expand(channels, *Ct.shape[-2:]).contiguous()
    grad = torch.randn(channels, 4, 6, dtype=C64)
    for x, g in zip((Lambda, P, B, Ct, dt),
                    ops.nplr_backward(grad, Lambda, P, B, Ct, dt, 10), strict=True):  # fmt: skip
        assert g.shape == x.shape and g.is_contiguous()


def test_compiles_without_a_graph_break():
    def loss(*parameters):
        return kernel_of(parameters, 20).square().sum()

    parameters = [x.requires_grad_() for x in example(2, 2, C128)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    truth = torch.autograd.grad(loss(*parameters), parameters)
    torch.testing.assert_close(torch.autograd.grad(compiled(*parameters), parameters), truth)


def test_autocast_computes_in_float32(backend):
    parameters = example(3, 4)
    truth = benchmark.gradients(cauchy_kernel.nplr_kernel, parameters, 2000)
    with torch.autocast("cpu", torch.bfloat16):
        values = benchmark.gradients(cauchy_kernel.nplr_kernel, parameters, 2000)
        Khat = cauchy_kernel.nplr_kernel(*parameters[:4], parameters[4].bfloat16(), 2000)
    assert all(torch.equal(x, y) for x, y in zip(values, truth, strict=True))
    assert Khat.dtype == C64


def test_vmap_is_a_loop():
    Lambda, P, B, Ct, dt = example(2, 3, C128)
    steps = torch.stack([dt, 2 * dt, 3 * dt])
    spectra = torch.func.vmap(lambda x: cauchy_kernel.nplr_kernel(Lambda, P, B, Ct, x, 12))(steps)
    for spectrum, step in zip(spectra, steps, strict=True):
        torch.testing.assert_close(
            spectrum, cauchy_kernel.nplr_kernel(Lambda, P, B, Ct, step, 12), rtol=0, atol=0
        )


# --- bad input ---------------------------------------------------------------------------------


def replaced(**changes):
    arguments = dict(zip(NAMES, example(4, 3), strict=True))
    return {**arguments, "L": 10, **changes}


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("Lambda", torch.randn(4, 3), TypeError),
        ("Lambda", torch.randn(3, 3, dtype=C64), ValueError),
        ("Lambda", torch.randn(4, 2, dtype=C64), ValueError),
        ("Lambda", torch.full((4, 3), complex("nan"), dtype=C64), ValueError),
        ("P", torch.randn(4, 3, dtype=C128), TypeError),
        ("P", torch.randn(1, 3, dtype=C64), ValueError),
        ("P", torch.randn(4, 3, dtype=C64, device="meta"), ValueError),
        ("P", torch.full((4, 3), complex("inf"), dtype=C64), ValueError),
        ("B", [1.0], TypeError),
        ("B", torch.randn(3, dtype=C64), ValueError),
        ("Ct", torch.randn(4, 3), TypeError),
        ("Ct", torch.randn(3, dtype=C64), ValueError),
        ("Ct", torch.randn(4, 0, dtype=C64), ValueError),
        ("dt", torch.rand(4, dtype=torch.float64), TypeError),
        ("dt", torch.rand(4, 1), ValueError),
        ("dt", torch.tensor([0.1, 0.1, float("inf"), 0.1]), ValueError),
        ("L", 0, ValueError),
        ("L", -3, ValueError),
        ("L", 10.0, TypeError),
    ],
)
def test_bad_argument_is_named(name, value, error, backend):
    with pytest.raises(error, match=rf"nplr_kernel: {name}\b"):
        cauchy_kernel.nplr_kernel(**replaced(**{name: value}))


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("v", torch.randn(2, 3), TypeError),
        ("z", torch.randn(5, dtype=C128), TypeError),
        ("z", torch.randn(5, 1, dtype=C64), ValueError),
        ("w", 3.0, TypeError),
        ("v", torch.randn(2, 4, dtype=C64), ValueError),
    ],
)
def test_bad_argument_of_cauchy_mult_is_named(name, value, error):
    shapes = {"v": (2, 3), "z": (5,), "w": (2, 3)}
    arguments = {key: torch.randn(*shape, dtype=C64) for key, shape in shapes.items()}
    with pytest.raises(error, match=rf"cauchy_mult: .*\b{name}\b"):
        cauchy_kernel.cauchy_mult(**{**arguments, name: value})


# --- the build ---------------------------------------------------------------------------------


def test_without_a_compiler_plain_pytorch_runs_and_says_so_once(monkeypatch, tmp_path, caplog):
    force("", monkeypatch)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    parameters = example(2, 2)
    cauchy_kernel.nplr_kernel(*parameters, 10)
    cauchy_kernel.nplr_kernel(*parameters, 10)
    assert len(caplog.messages) == 1 and "\n" not in caplog.messages[0]
    assert re.search("plain PyTorch on cpu.*no C\\+\\+ compiler", caplog.messages[0])
    force("cpu", monkeypatch)
    with pytest.raises(build.DemandError, match="SASHIMI_KERNEL=cpu: no C"):
        cauchy_kernel.nplr_kernel(*parameters, 10)
    force("gpu", monkeypatch)
    with pytest.raises(ValueError, match="must be torch, cpu or cuda"):
        cauchy_kernel.nplr_kernel(*parameters, 10)


@pytest.mark.parametrize("what", ["compiler that fails", "folder that cannot be written"])
def test_failed_build_falls_back_and_says_why(what, monkeypatch, tmp_path, caplog):
    force("", monkeypatch)
    folder = tmp_path / "cache"
    if what == "compiler that fails":
        broken = tmp_path / "c++"
        broken.write_text("#!/bin/sh\necho kernel.cpp: error: no such luck >&2\nexit 1\n")
        broken.chmod(0o755)
        monkeypatch.setenv("CXX", str(broken))
    else:
        folder.write_text("a file, not a folder")
        if not has_compiler("cpu"):
            pytest.skip("needs a C++ compiler")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    assert cauchy_kernel.nplr_kernel(*example(2, 2), 10).isfinite().all()
    assert re.search("no such luck|cannot write", caplog.text)
    if folder.is_dir():  # nothing half-built is left to be found by the next process
        assert not list(folder.rglob("*.so"))


LIBRARIES = [
    ("kernel.cpp", "import cauchy_kernel.native as n; library = n.library('cpu')"),
    ("realtime.cpp", "import sashimi.realtime as r; library = r._library()"),
]


@pytest.mark.parametrize("source, load", LIBRARIES)
def test_a_missing_compiler_is_one_line_on_stderr(source, load, tmp_path):
    """For the kernel and the step engine: no line of source code follows, as `warnings` prints."""
    environment = {**os.environ, "PATH": "", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    environment = {k: v for k, v in environment.items() if not k.startswith(("CXX", "SASHIMI"))}
    done = subprocess.run(
        [sys.executable, "-c", load], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "" and done.stderr.count("\n") == 1, done
    assert "slower" in done.stderr and "no C++ compiler found" in done.stderr


@needs_compiler
@pytest.mark.parametrize("source, load", LIBRARIES)
def test_a_damaged_library_is_built_again(source, load, tmp_path):
    """One that was cut short gives a bus error when it is loaded, at every start."""
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    command = [sys.executable, "-c", f"{load}; assert library[0]; print(library[1])"]
    library = Path(subprocess.check_output(command, cwd=ROOT, env=environment, text=True).strip())
    whole, digest = library.read_bytes(), library.with_name(f"{library.name}.sha256")
    assert library.is_relative_to(tmp_path) and build.is_whole(library)
    at = len(whole) // 3
    for content in (b"", whole[:-1], whole[:at] + b"x" + whole[at + 1 :], whole[:at]):
        library.write_bytes(content)
        assert not build.is_whole(library)
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and again.stderr == "", again
    assert build.is_whole(library) and library.read_bytes() == whole
    for content in (b"", b"\xff", digest.read_bytes()[:10]):
        digest.write_bytes(content)
        assert not build.is_whole(library)
    digest.unlink()
    assert not build.is_whole(library)


@needs_compiler
def test_a_library_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """fsync before rename, or a power cut leaves a file of the right size and nothing in it."""
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)

        def noting(*args, name=name, original=original):
            calls.append(name)
            return original(*args)

        monkeypatch.setattr(os, name, noting)
    monkeypatch.setattr(build, "flags", lambda *_: ["-O0", "-std=c++17", "-shared", "-fPIC"])
    build.compile_library("cpu", tmp_path / "a.so")
    assert calls == ["fsync", "replace"] * 2
    assert {x.name for x in tmp_path.iterdir()} == {"a.so", "a.so.sha256"}


@needs_compiler
def test_processes_that_build_at_once_get_one_library(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(build.HERE)!r}); import build, ctypes; "
    code += "path = build.cached_library('cpu'); ctypes.CDLL(str(path)); print(path)"
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    command = [sys.executable, "-S", "-c", code]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    paths = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    assert paths == {str(x) for x in tmp_path.rglob("*.so")} and len(paths) == 1


def test_import_builds_nothing_and_self_check_passes():
    code = "import sys, cauchy_kernel.native as n; assert not n.library.cache_info().currsize; "
    code += "from cauchy_kernel.__main__ import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cpu tensors:" in done.stdout and "ok" in done.stdout


@pytest.mark.skipif(not has_compiler("cuda"), reason="needs nvcc")
def test_cuda_source_compiles_without_warnings(tmp_path):
    output = tmp_path / "kernel.so"
    command = [build.compiler("cuda"), *build.flags("cuda"), "-Xcompiler=-Wall,-Wextra"]
    done = subprocess.run(
        [*command, str(build.HERE / "kernel.cu"), "-o", str(output)], capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stdout + done.stderr, done.stdout + done.stderr
    if shutil.which("cuobjdump"):
        options = ["--list-elf", "--list-ptx"]
        found = [subprocess.check_output(["cuobjdump", x, str(output)], text=True) for x in options]
        assert "sm_80" in found[0] and "sm_90" in found[0] and "sm_75" in found[1]


def test_benchmark_prints_a_table_and_draws_a_plot(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "BACKENDS", {"plain": ("cpu", "torch")})
    path = str(tmp_path / "plot.png")
    monkeypatch.setattr(sys, "argv", ["", "-l", "500", "-f", "2", "-n", "8", "--plot", path])
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    benchmark.main()
    table = capsys.readouterr().out.splitlines()
    assert table[2].split()[:3] == ["backend", "seconds", "MiB"] and table[3].startswith("plain")
    assert Path(path).stat().st_size > 1000


def test_memory_is_of_the_order_of_the_spectrum(backend):
    """L = 2^17, H = 4, M = 32: the naive products would take 1.5 GiB, the spectrum takes 2 MiB."""
    parameters = example(4, 32)
    before = benchmark.peak_bytes("cpu", reset=True)
    benchmark.gradients(cauchy_kernel.nplr_kernel, parameters, 2**17)
    assert benchmark.peak_bytes("cpu") - before < 50 * 2**20 < benchmark.naive_bytes(4, 64, 2**17)


# --- on a GPU ----------------------------------------------------------------------------------

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@gpu
@needs_gpu
@pytest.mark.parametrize("name", ["torch", "cuda"])
@pytest.mark.parametrize("H, M, L", [*SHAPES, (256, 32, 16000), (3, 200, 700)])
def test_gpu_value_and_gradient_are_the_complex128_ones(H, M, L, name, monkeypatch):
    parameters = example(H, M)
    truth = benchmark.gradients(cauchy_kernel.nplr_kernel, double(parameters), L)
    force(name, monkeypatch)
    for dtype, tolerance in ((C64, 1e-5), (C128, 1e-9)):
        inputs = [x.cuda() for x in (parameters if dtype == C64 else double(parameters))]
        values = benchmark.gradients(cauchy_kernel.nplr_kernel, inputs, L)
        assert max(benchmark.largest_errors([x.cpu() for x in values], truth)) < tolerance


@gpu
@needs_gpu
@pytest.mark.parametrize("name", ["torch", "cuda"])
def test_gpu_kernel_has_its_digits_with_tf32_on(name, monkeypatch):
    """As after `torch.set_float32_matmul_precision("high")`, which the trainer calls."""
    force(name, monkeypatch)
    monkeypatch.setattr(ops, "SMALL", 0)
    parameters = example(64, 32, device="cuda")
    truth = benchmark.gradients(benchmark.naive, double(parameters), 16000)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        x = torch.randn(500, 500, device="cuda")
        assert relative(x @ x, (x.double() @ x.double()).cpu()) > 1e-5  # it is on
        values = benchmark.gradients(cauchy_kernel.nplr_kernel, parameters, 16000)
    finally:
        torch.set_float32_matmul_precision(before)
    errors = benchmark.largest_errors([x.cpu() for x in values], truth)
    assert errors[0] < 2e-6 and max(errors) < 1e-5, errors


@gpu
@needs_gpu
def test_gpu_is_ten_times_as_fast_as_plain_in_little_memory(monkeypatch):
    results = benchmark.run(16000, 256, 64, 5)
    assert results["plain (GPU)"]["seconds"] > 10 * results["CUDA"]["seconds"]
    assert results["CUDA"]["MiB"] < 8 * 256 * 16000 * 4 / 2**20


@gpu
@needs_gpu
def test_gpu_runs_on_the_current_stream_and_in_a_graph(monkeypatch):
    force("cuda", monkeypatch)
    parameters = example(8, 16, device="cuda")
    truth = cauchy_kernel.nplr_kernel(*parameters, 4000)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        cauchy_kernel.nplr_kernel(*parameters, 4000)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cauchy_kernel.nplr_kernel(*parameters, 4000)
    graph.replay()
    torch.testing.assert_close(captured, truth)
