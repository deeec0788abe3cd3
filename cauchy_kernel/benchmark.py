"""Time, peak memory and error of every backend, forward and backward.

    python -m cauchy_kernel.benchmark -l 64000    # a table, and a plot in cauchy_kernel.png

Each backend runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"a whole number from 1 expected, not {text!r}")
    return int(text)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m cauchy_kernel.benchmark",
        description="Time, peak memory and error of every backend, forward and backward.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("-l", "--length", type=_positive, default=16000, help="samples")
    parser.add_argument("-f", "--features", type=_positive, default=64, help="features (H)")
    parser.add_argument("-n", "--states", type=_positive, default=64, help="real states each (N)")
    parser.add_argument("-r", "--repeats", type=_positive, default=5, help="the fastest run counts")
    parser.add_argument("--plot", default="cauchy_kernel.png", help="image file; empty for none")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":  # answered before the imports below, which take seconds
    sys.stdout.reconfigure(errors="replace")  # letters that the console has not: of paths
    parse()

import torch

import cauchy_kernel
from cauchy_kernel import native

# name: device, SASHIMI_KERNEL
BACKENDS = {
    "naive": ("cpu", "torch"),
    "plain": ("cpu", "torch"),
    "native": ("cpu", "cpu"),
    "naive (GPU)": ("cuda", "torch"),
    "plain (GPU)": ("cuda", "torch"),
    "CUDA": ("cuda", "cuda"),
}


def example(n_features: int, n_states: int, dtype=torch.complex64, device="cpu", seed: int = 0):
    """Lambda, P, B, Ct (H, N/2), dt (H,): HiPPO-LegS of N states, perturbed by 0.1 randn."""
    g = torch.Generator().manual_seed(seed)
    p = (torch.arange(n_states, dtype=torch.float64) + 0.5).sqrt()
    skew = torch.outer(p, p).triu(1) - torch.outer(p, p).tril(-1)  # A + P P^T + I / 2
    frequency, basis = torch.linalg.eigh(-1j * skew)
    keep = frequency > 0
    P, frequency = (basis.mH @ p.to(basis.dtype))[keep], frequency[keep]
    n = torch.randn(4, n_features, n_states // 2, dtype=torch.complex128, generator=g)
    Lambda = torch.complex(-0.5 * (0.1 * n[0].real).exp(), frequency + 0.1 * n[0].imag)
    dt = 10 ** (torch.rand(n_features, dtype=torch.float64, generator=g) * 2 - 3)
    parameters = Lambda, P + 0.1 * n[1], 2**0.5 * P + 0.1 * n[2], n[3]
    return *(x.to(device, dtype) for x in parameters), dt.to(device, dtype.to_real())


def naive(Lambda, P, B, Ct, dt, L):
    """`nplr_kernel` as the formula has it, with all H x N x L products in memory."""
    w = torch.exp(-2j * torch.pi / L * torch.arange((L + 1) // 2, dtype=torch.float64))
    w = w.to(Ct.device)
    z = (2 * (1 - w) / (1 + w)).to(Ct.dtype)
    v = torch.stack([Ct * B, Ct * P, P.conj() * B, P.conj() * P])
    v, poles = (torch.cat([x, x.conj()], -1) for x in (v, dt[:, None] * Lambda))
    cb, cp, qb, qp = dt[:, None] * (v[..., None] / (z - poles[..., None])).sum(-2)
    out = (2 / (1 + w)).to(Ct.dtype) * (cb - cp * qb / (1 + qp))
    if L % 2:
        return out
    last = dt * (Ct * B).real.sum(-1)  # w = -1, where z is infinite
    return torch.cat([out, last[:, None]], -1)


def naive_bytes(n_features: int, n_states: int, length: int) -> int:
    """About what `naive` needs: four products of complex64, and in backward as many again x 2."""
    return 12 * n_features * n_states * (length // 2 + 1) * 8


def gradients(function, parameters, L):
    """[spectrum, and the gradients of its product with fixed random numbers], in that order."""
    parameters = [x.detach().clone().requires_grad_() for x in parameters]
    spectrum = function(*parameters, L)
    g = torch.Generator().manual_seed(1)
    weights = torch.randn(*spectrum.shape, 2, generator=g).to(spectrum.device)
    weights = torch.view_as_complex(weights).to(spectrum.dtype)
    return [spectrum.detach(), *torch.autograd.grad(spectrum, parameters, weights)]


def largest_errors(values, truth) -> list[float]:
    """Largest error of each tensor, relative to the largest true value."""
    pairs = zip(values, truth, strict=True)
    return [((x - y).abs().max() / y.abs().max().clamp(min=1e-300)).item() for x, y in pairs]


def peak_bytes(device: str, reset: bool = False) -> int:
    """Most memory that this process has held, or its tensors on a GPU, since a reset if there was
    one (on Linux and on a GPU)."""
    if device.startswith("cuda"):
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):  # getrusage counts what the parent held at the fork, too
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure(name: str, length: int, n_features: int, n_states: int, repeats: int) -> dict:
    """Seconds, extra peak bytes and errors of one backend. For a fresh process."""
    device = BACKENDS[name][0]
    function = naive if name.startswith("naive") else cauchy_kernel.nplr_kernel
    parameters = example(n_features, n_states, device=device)
    gradients(function, example(2, 4, device=device), 64)  # loads what is loaded on first use
    before = peak_bytes(device, reset=True)
    seconds = []
    for i in range(repeats):
        start = time.perf_counter()
        values = gradients(function, parameters, length)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        if i == 0:
            peak = peak_bytes(device) - before
    native.library.cache_clear()
    os.environ["SASHIMI_KERNEL"] = "torch"
    double = [x.to(torch.promote_types(x.dtype, torch.float64)) for x in parameters]
    errors = largest_errors(values, gradients(cauchy_kernel.nplr_kernel, double, length))
    return {
        "seconds": min(seconds),
        "MiB": peak / 2**20,
        "error": errors[0],
        "gradient error": max(errors[1:]),
    }


def _available_bytes(device: str) -> float:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with contextlib.suppress(OSError):
        return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    return float("inf")


def run(length: int, n_features: int, n_states: int, repeats: int) -> dict[str, dict]:
    """Every backend that this machine has, one after the other; prints the table as it grows."""
    columns = ("seconds", "MiB", "error", "gradient error")
    print(f"L = {length}, H = {n_features}, N = {n_states}, complex64, forward and backward")
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'backend':12}" + "".join(f"{column:>16}" for column in columns))
    results = {}
    for name, (device, kernel) in BACKENDS.items():
        if device == "cuda" and not torch.cuda.is_available():
            continue
        need = naive_bytes(n_features, n_states, length)
        if name.startswith("naive") and need > 0.8 * _available_bytes(device):
            print(f"{name:12} not run: needs about {need / 2**30:.0f} GiB")
            continue
        command = [sys.executable, "-m", "cauchy_kernel.benchmark", "--worker", name]
        command += ["-l", str(length), "-f", str(n_features), "-n", str(n_states)]
        command += ["-r", str(min(2, repeats) if name.startswith("naive") else repeats)]
        environment = {**os.environ, "SASHIMI_KERNEL": kernel}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            print(f"{name:12} failed: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
            continue
        results[name] = json.loads(done.stdout.splitlines()[-1])
        cells = [results[name][column] for column in columns]
        print(f"{name:12}" + "".join(f"{x:16.4g}" for x in cells[:2]), end="")
        print("".join(f"{x:16.1e}" for x in cells[2:]))
    return results


def plot(results: dict[str, dict], title: str, path: str) -> None:
    """Bars of time, memory and error, on logarithmic scales."""
    os.environ["MPLBACKEND"] = "agg"  # no window, and none of a notebook
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: it needs the package matplotlib")
        return
    panels = {"seconds": "s", "MiB": "MiB", "gradient error": "relative"}
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels))
    for axis, (column, unit) in zip(axes, panels.items(), strict=True):
        values = [result[column] for result in results.values()]
        bars = axis.bar(list(results), values, color=[f"C{i}" for i in range(len(values))])
        axis.bar_label(bars, fmt="%.2g")
        axis.set_yscale("log")
        axis.margins(y=0.2)
        axis.set_title({"MiB": "peak memory", "seconds": "time"}.get(column, column))
        axis.set_ylabel(unit)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    print(f"plot: {path}")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    sizes = args.length, args.features, args.states, args.repeats
    if args.worker:
        print(json.dumps(measure(args.worker, *sizes)))
        return
    results = run(*sizes)
    if args.plot:
        title = f"Cauchy kernel, L = {args.length}, H = {args.features}, N = {args.states}"
        plot(results, title, args.plot)


if __name__ == "__main__":
    main()
