"""cauchy_kernel: the compiled operations, their plain reference, and the way they are built.

The first principles are here in dense matrices: A = diag(Lambda) - P P*, the bilinear Ab and Bb,
K[l] = C Ab^l Bb and Ct = C (I - Ab^L), in complex128.
"""

import ctypes
import multiprocessing
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cauchy_kernel
from cauchy_kernel import __main__, benchmark, build, cuda, functions, native, plain

HERE = Path(__file__).parent
NAMES = ["Lambda", "P", "B", "Ct", "dt"]
C64, C128 = torch.complex64, torch.complex128


def reason(find) -> str:
    """Why something cannot be found; empty if it can."""
    try:
        find()
        return ""
    except build.BuildError as error:
        return str(error)


needs_compiler = pytest.mark.skipif(bool(reason(build.compiler)), reason="no C++ compiler")
needs_nvrtc = pytest.mark.skipif(bool(reason(cuda.nvrtc)), reason=reason(cuda.nvrtc))


@pytest.fixture(autouse=True)
def force(monkeypatch):
    """Chooses a backend; in each test the environment is read anew."""
    clear = native.backend.cache_clear

    def choose(name):
        monkeypatch.setenv("SASHIMI_KERNEL", name)
        clear()

    torch.manual_seed(0)
    clear()
    yield choose
    clear()


@pytest.fixture(params=["torch", pytest.param("cpu", marks=needs_compiler)])
def backend(request, force):
    """Each test that asks for it runs on plain PyTorch and compiled."""
    force(request.param)
    return request.param


def example(n_features, n_states, dtype=C64, shared=False, device="cpu"):
    """Parameters with n_states stored states; `shared`: one set of states for all features."""
    Lambda, P, B, Ct, dt = benchmark.example(n_features, 2 * n_states, dtype, device)
    return [x[:1] if shared else x for x in (Lambda, P, B)] + [Ct, dt]


def double(parameters):
    return [x.cpu().to(torch.promote_types(x.dtype, torch.float64)) for x in parameters]


def single(parameters):
    return [x.to(C64 if x.is_complex() else torch.float32) for x in parameters]


def dense(Lambda, P, B, C, dt, L):
    """K (H, L) and Ct (H, M) from C (H, M), by matrices."""
    kernels, corrected = [], []
    for h in range(len(C)):
        s = h if len(P) > 1 else 0
        lam, p, b, c = (torch.cat([x, x.conj()]) for x in (Lambda[s], P[s], B[s], C[h]))
        A, one = torch.diag(lam) - torch.outer(p, p.conj()), torch.eye(len(lam), dtype=C128)
        Ab = torch.linalg.solve(one - dt[h] / 2 * A, one + dt[h] / 2 * A)
        Bb = torch.linalg.solve(one - dt[h] / 2 * A, dt[h] * b)
        corrected.append((c @ (one - torch.linalg.matrix_power(Ab, L)))[: len(lam) // 2])
        x, power = Bb[:, None], Ab  # Krylov matrix by doubling
        while x.shape[1] < L:
            x, power = torch.cat([x, power @ x], 1), power @ power
        kernels.append((c @ x[:, :L]).real)
    return torch.stack(kernels), torch.stack(corrected)


def kernel_of(parameters, L):
    return torch.fft.irfft(cauchy_kernel.nplr_kernel(*parameters, L), n=L)


def gradients(parameters, L):
    return benchmark.gradients(cauchy_kernel.nplr_kernel, parameters, L)


def largest_error(values, truth):
    return max(benchmark.largest_errors([x.cpu() for x in values], truth))


def equal(values, truth):
    return all(torch.equal(x, y) for x, y in zip(values, truth, strict=True))


@pytest.mark.parametrize("kind", ["untied", "tied", "diagonal"])
@pytest.mark.parametrize("L", [1, 2, 3, 100, 101, 16000])
def test_kernel_is_c_ab_to_the_l_bb(backend, kind, L, monkeypatch):
    """In float32 too, also where the small case is not computed in double."""
    Lambda, P, B, C, dt = example(2, 32, C128, shared=kind == "tied")
    P = 0 * P if kind == "diagonal" else P
    truth, Ct = dense(Lambda, P, B, C, dt, L)
    parameters = [Lambda, P, B, Ct, dt]
    assert largest_error([kernel_of(parameters, L)], [truth]) < 1e-11
    for small in (functions.SMALL, 0):
        monkeypatch.setattr(functions, "SMALL", small)
        assert largest_error([kernel_of(single(parameters), L)], [truth]) < 6e-6


SHAPES = [(1, 1, 1), (1, 2, 2), (64, 1, 3), (256, 2, 100), (1, 64, 101), (64, 32, 1024),
          (64, 2, 32000), (1, 32, 2**17)]  # fmt: skip


@pytest.mark.parametrize("H, M, L", SHAPES)
def test_float32_and_its_gradient_are_the_complex128_ones(H, M, L, backend):
    """The truth in complex128 is plain PyTorch, which other tests hold against dense matrices."""
    if backend == "torch" and H * M * L > 2e6:
        pytest.skip("slow, and the same code as at smaller sizes")
    parameters = example(H, M)
    assert largest_error(gradients(parameters, L), gradients(double(parameters), L)) < 1e-5


@pytest.mark.parametrize("L", [1, 7, 8])
@pytest.mark.parametrize("shared", [False, True], ids=["untied", "tied"])
def test_gradient_is_the_derivative(backend, L, shared):
    Lambda, P, B, _, dt = example(2, 2, C128, shared)
    Lambda[0, 0] = Lambda[0, 0].conj()  # either half of a pair may be the stored one
    inputs = [Lambda, P, B, torch.randn(2, 2, 2, dtype=C128), dt]
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: cauchy_kernel.nplr_kernel(*x, L), inputs)


def test_the_stored_half_channels_and_ties_make_no_difference(backend):
    Lambda, P, B, _, dt = example(3, 4, C128, shared=True)
    Ct = torch.randn(5, 3, 4, dtype=C128)
    tied = gradients([Lambda, P, B, Ct, dt], 101)
    for c in range(5):
        one = cauchy_kernel.nplr_kernel(Lambda, P, B, Ct[c], dt, 101)
        torch.testing.assert_close(tied[0][c], one)
    repeated = [x.expand(3, -1) for x in (Lambda, P, B)]
    untied = gradients([*repeated, Ct, dt], 101)
    summed = [x.sum(0, keepdim=True) for x in untied[1:4]]
    torch.testing.assert_close(tied, [untied[0], *summed, *untied[4:]])
    flip = torch.rand(3, 4) < 0.5
    views = [x.conj() for x in (*repeated, Ct)]  # not yet conjugated
    for other in (views, [torch.where(flip, x.conj(), x) for x in (*repeated, Ct)]):
        torch.testing.assert_close(cauchy_kernel.nplr_kernel(*other, dt, 101), untied[0])


@needs_compiler
def test_results_repeat_bit_by_bit_whatever_the_threads(force):
    force("cpu")
    parameters, runs = example(3, 8), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(gradients(parameters, 30000))
    assert equal(runs[0], runs[1]) and equal(runs[0], runs[2])


@pytest.mark.parametrize("symmetric", [False, True])
def test_cauchy_mult_is_the_sum_of_the_fixtures_and_has_its_gradient(symmetric, monkeypatch):
    """Fixture F: sums of two other implementations, plain and with the conjugate half."""
    for case in torch.load(HERE / "fixtures" / "F_cauchy.pt", weights_only=True)["cases"]:
        truth = case["sum_conj_symmetric" if symmetric else "sum_plain"]
        for dtype, tolerance in ((C128, 1e-13), (C64, 1e-5)):
            inputs = [case[name].to(dtype) for name in "vzw"]
            y = cauchy_kernel.cauchy_mult(*inputs, symmetric=symmetric)
            assert y.shape == truth.shape and y.dtype == dtype
            assert largest_error([y], [truth]) < tolerance
    monkeypatch.setattr(plain, "block_size", lambda _: 50)  # two nodes at a time
    v, w = torch.randn(2, 3, 4, dtype=C128), torch.randn(3, 4, dtype=C128)
    inputs = [x.requires_grad_() for x in (v, 3 * torch.randn(5, dtype=C128), w)]
    assert torch.autograd.gradcheck(lambda *x: cauchy_kernel.cauchy_mult(*x, symmetric), inputs)


@pytest.mark.parametrize("dtype", [C64, C128])
def test_opcheck(dtype):
    inputs = example(2, 2, dtype)
    inputs[3] = inputs[3][None]
    torch.library.opcheck(functions.nplr, (*[x.requires_grad_() for x in inputs], 10))


@pytest.mark.parametrize("channels", [1, 2])
def test_gradients_lie_in_memory_as_compiled_code_expects(backend, channels):
    """Contiguous, as the fake operation says: torch.compile fails at others (bidirectional S4)."""
    Lambda, P, B, Ct, dt = example(4, 3)
    inputs = [Lambda, P, B, Ct.expand(channels, 4, 3).contiguous(), dt]
    grads = functions.nplr_backward(torch.randn(channels, 4, 6, dtype=C64), *inputs, 10)
    for x, g in zip(inputs, grads, strict=True):
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
    truth = gradients(parameters, 2000)
    with torch.autocast("cpu", torch.bfloat16):
        values = gradients(parameters, 2000)
        Khat = cauchy_kernel.nplr_kernel(*parameters[:4], parameters[4].bfloat16(), 2000)
    assert equal(values, truth) and Khat.dtype == C64


def test_memory_is_of_the_order_of_the_spectrum(backend):
    """L = 2^16, H = 4, M = 32: the naive products would take 770 MiB, the spectrum takes 1 MiB."""
    parameters = example(4, 32)
    before = benchmark.peak_bytes("cpu", reset=True)
    gradients(parameters, 2**16)
    assert benchmark.peak_bytes("cpu") - before < 50 * 2**20


NAN, INF = (torch.full((4, 3), complex(x), dtype=C64) for x in ("nan", "inf"))
GOOD = dict(zip(NAMES, example(4, 3), strict=True), L=10)
VZW = {name: torch.ones(shape, dtype=C64) for name, shape in (("v", (2, 3)), ("z", 5), ("w", 3))}
BAD_TYPES = {"Lambda": torch.ones(4, 3), "P": torch.ones(4, 3, dtype=C128), "B": [1.0],
             "Ct": torch.ones(4, 3), "dt": torch.ones(4, dtype=torch.float64), "L": 10.0,
             "v": torch.ones(2, 3), "z": torch.ones(5, dtype=C128), "w": 3.0}  # fmt: skip
BAD_SHAPES = [("Lambda", (3, 3)), ("Lambda", (4, 2)), ("P", (1, 3)), ("B", 3), ("Ct", 3),
              ("Ct", (4, 0)), ("z", (5, 1)), ("v", (2, 4))]  # fmt: skip
BAD = [(TypeError, *bad) for bad in BAD_TYPES.items()]
BAD += [(ValueError, name, torch.ones(shape, dtype=C64)) for name, shape in BAD_SHAPES]
BAD += [(ValueError, "Lambda", NAN), (ValueError, "P", INF), (ValueError, "P", NAN.to("meta")),
        (ValueError, "dt", torch.ones(4, 1)), (ValueError, "L", 0), (ValueError, "L", -3),
        (ValueError, "dt", torch.tensor([0.1, 0.1, float("inf"), 0.1]))]  # fmt: skip


@pytest.mark.parametrize("error, name, value", BAD)
def test_bad_argument_is_named(error, name, value):
    function, good = ("nplr_kernel", GOOD) if name in GOOD else ("cauchy_mult", VZW)
    with pytest.raises(error, match=rf"{function}: {name}\b"):
        getattr(cauchy_kernel, function)(**good | {name: value})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and quick builds."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "FLAGS", [x for x in build.FLAGS if x != "-O3"])
    return tmp_path / "cache"


FAILURES = {
    "no compiler": "no C\\+\\+ compiler found: install one",
    "a compiler that fails": "kernel.cpp: error: no such luck",
    "a cache that is a file": "cannot write .*TORCH_EXTENSIONS_DIR",
    "no home folder": "no home folder .*TORCH_EXTENSIONS_DIR",
}


@pytest.mark.parametrize("failure", FAILURES)
def test_what_cannot_be_compiled_runs_in_plain_pytorch_and_one_line_says_why(
    failure, force, cache, monkeypatch, tmp_path, caplog
):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho kernel.cpp: error: no such luck >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    if failure == "no compiler":
        monkeypatch.setenv("CXX", "")
        monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    elif failure == "a cache that is a file":
        cache.write_text("")
    elif failure == "no home folder":
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    force("")
    for _ in range(2):
        assert cauchy_kernel.nplr_kernel(*example(2, 2), 10).isfinite().all()
    (message,) = caplog.messages
    assert re.search(f"plain PyTorch on cpu.*slower.*{FAILURES[failure]}", message)
    assert "\n" not in message and not list(tmp_path.rglob("kernel-*"))
    force("cpu")
    with pytest.raises(build.DemandError, match=f"SASHIMI_KERNEL=cpu: .*{FAILURES[failure]}"):
        cauchy_kernel.nplr_kernel(*example(2, 2), 10)


def test_without_nvrtc_gpus_run_plain_pytorch(force, monkeypatch, caplog):
    def missing():
        raise build.BuildError("no NVRTC")

    monkeypatch.setattr(cuda, "nvrtc", missing)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    cuda.kernels.cache_clear()
    assert native.backend("cuda") == (None, "no NVRTC")
    assert "plain PyTorch on cuda" in caplog.text and len(caplog.messages) == 1
    for name, message in (("cuda", "SASHIMI_KERNEL=cuda: no NVRTC"), ("gpu", "must be torch, cpu")):
        force(name)
        with pytest.raises(build.DemandError, match=message):
            native.backend("cuda")


@needs_compiler
def test_a_library_is_built_once_and_again_only_if_it_is_damaged(tmp_path, cache):
    """One that was cut short gives a bus error when it is loaded, at every start."""
    source = tmp_path / "answer.cpp"
    source.write_text('extern "C" int answer() { return 42; }')
    with ThreadPoolExecutor(4) as pool:  # as processes do that start at the same time
        (library,) = set(pool.map(build.cached_library, [source] * 4))
    assert ctypes.CDLL(str(library)).answer() == 42
    whole, built = library.read_bytes(), library.stat().st_mtime_ns
    assert build.cached_library(source).stat().st_mtime_ns == built
    third = len(whole) // 3
    for content in (b"", whole[:third], whole[:third] + b"x" + whole[third + 1 :]):
        library.unlink()  # it is loaded
        library.write_bytes(content)
        assert build.cached_library(source).read_bytes() == whole
    assert [x for x in cache.rglob("*") if x.is_file()] == [library]
    source.write_text(source.read_text().replace("42", "43"))
    assert ctypes.CDLL(str(build.cached_library(source))).answer() == 43


def test_what_a_source_includes_belongs_to_it(tmp_path, cache):
    """In any folder, and by way of others: a change compiles again."""
    files = {"a/x.cpp": '#include "../b/x.h"', "b/x.h": '#pragma once\n#include "y.h"', "b/y.h": ""}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    made = []
    for name in (None, *files, "a/other.cpp"):
        if name:
            with open(tmp_path / name, "a") as file:
                file.write("\n// changed")
        made.append(build.cached(tmp_path / "a/x.cpp", [], ".so", lambda path: path.touch()))
    assert len(set(made)) == 4 and made[-1] == made[-2]


def test_import_builds_nothing():
    code = "import cauchy_kernel.native as n, rawaudio.engine as r; "
    code += "assert not n.backend.cache_info().currsize + r.library.cache_info().currsize"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE.parent)


def test_self_check_finds_the_backends_right_and_tells_a_wrong_one(force, monkeypatch, capsys):
    force("torch")
    monkeypatch.setattr(functions, "SMALL", 0)  # as the check sets it
    assert __main__.main([]) == 0
    assert "cpu tensors: plain PyTorch (SASHIMI_KERNEL=torch)" in capsys.readouterr().out
    monkeypatch.setattr(plain, "last_node", lambda weight, *_: weight.new_zeros(1, len(weight)))
    assert __main__.main([]) == 1 and "FAILED" in capsys.readouterr().out
    force("gpu")
    assert __main__.main([]) == 2 and "SASHIMI_KERNEL" in capsys.readouterr().err


def test_benchmark_prints_a_table_and_draws_a_plot(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "BACKENDS", {"plain": ("cpu", "torch")})
    fork = multiprocessing.get_context("fork")  # quicker to start
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: fork)
    path = tmp_path / "plot.png"
    benchmark.main(["-l", "500", "-f", "2", "-n", "8", "--plot", str(path)])
    table = capsys.readouterr().out.splitlines()
    assert table[2].split()[:3] == ["backend", "seconds", "MiB"] and table[3].startswith("plain")
    assert float(table[3].split()[4]) < 1e-5 and path.stat().st_size > 1000


@needs_nvrtc
def test_nvrtc_compiles_every_kernel_or_says_in_one_line_what_it_does_not_accept(
    tmp_path, monkeypatch
):
    for capability in (80, 90):
        cuda.compile_to(tmp_path / "kernel.cubin", capability)
        code = (tmp_path / "kernel.cubin").read_bytes()
        assert code.startswith(b"\x7fELF") and all(name.encode() in code for name in cuda.NAMES)
    monkeypatch.setattr(cuda, "OPTIONS", [*cuda.OPTIONS, "--no-such-option"])
    with pytest.raises(build.BuildError, match="^NVRTC failed: .*no-such-option"):
        cuda.compile_to(tmp_path / "kernel.cubin", 90)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """A CUDA driver that runs kernel.cu on the CPU."""
    path = tmp_path_factory.mktemp("driver") / "driver.so"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", f"-I{HERE.parent}/cauchy_kernel"]
    source = str(HERE / "cuda_on_cpu.cpp")
    subprocess.run([build.compiler(), *flags, source, "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


@needs_compiler
@pytest.mark.parametrize("H, M, L, channels", [(2, 3, 300, 1), (1, 40, 2100, 2), (1, 130, 20, 1)])
def test_cuda_kernels_give_what_plain_pytorch_gives(H, M, L, channels, driver, monkeypatch, cache):
    """kernel.cu, its launches and their arguments, on tensors of the CPU."""
    Lambda, P, B, Ct, dt = example(H, M, C128)
    parameters = [Lambda, P, B, torch.stack([Ct, Ct.flip(1)][:channels]), dt]
    truth = gradients(parameters, L)
    current, splits = SimpleNamespace(cuda_stream=0), native._splits
    for owner, name, value in [
        (torch.cuda, "device", lambda _: nullcontext()),
        (torch.cuda, "current_stream", lambda _: current),
        (torch.cuda, "get_device_capability", lambda _: (9, 0)),
        (torch.cuda, "synchronize", lambda: None),
        (cuda, "_driver", lambda: driver),
        (cuda, "nvrtc", lambda: SimpleNamespace(nvrtcVersion=lambda *_: 0)),
        (cuda, "compile_to", lambda path, capability: path.write_bytes(b"code")),
        (native, "backend", lambda _: (cuda.run, "")),
        (native, "_splits", lambda *args: splits("cuda", *args[1:])),
        (functions, "SMALL", 0),
    ]:
        monkeypatch.setattr(owner, name, value)
    cuda.kernels.cache_clear()
    assert largest_error(gradients(parameters, L), truth) < 1e-9
    assert largest_error(gradients(single(parameters), L), truth) < 1e-5
    monkeypatch.setattr(cuda, "NAMES", ["sideways_float_1"])
    cuda.kernels.cache_clear()
    with pytest.raises(RuntimeError, match="cuModuleGetFunction: named symbol not found"):
        gradients(parameters, L)
    cuda.kernels.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnAGpu:
    @pytest.mark.parametrize("name", ["torch", "cuda"])
    @pytest.mark.parametrize("H, M, L", [*SHAPES, (64, 32, 16000), (3, 200, 700)])
    def test_value_and_gradient_are_the_complex128_ones(self, H, M, L, name, force, monkeypatch):
        """Also with TF32 on, as after the trainer's `set_float32_matmul_precision("high")`."""
        parameters = example(H, M)
        truth = gradients(double(parameters), L)
        force(name)
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
        for inputs, tolerance in ((parameters, 1e-5), (double(parameters), 1e-9)):
            assert largest_error(gradients([x.cuda() for x in inputs], L), truth) < tolerance

    def test_compiled_is_faster_than_plain_in_little_memory(self):
        results = benchmark.run(16000, 256, 64, 5)
        assert results["plain (GPU)"]["seconds"] > 2 * results["CUDA"]["seconds"]
        assert results["CUDA"]["MiB"] < 8 * 256 * 16000 * 4 / 2**20

    def test_runs_on_the_current_stream_and_in_a_graph(self, force):
        force("cuda")
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
