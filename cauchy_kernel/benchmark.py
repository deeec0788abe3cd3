"""Time, peak memory and error of every backend, forward and backward.

    python -m cauchy_kernel.benchmark -l 64000    # a table, and a plot in cauchy_kernel.png

Each backend runs in a process of its own, so that its peak memory is its own.
"""

import argparse
import contextlib
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import cauchy_kernel

from . import native

# name: device, SASHIMI_KERNEL
BACKENDS = {
    "naive": ("cpu", "torch"),
    "plain": ("cpu", "torch"),
    "native": ("cpu", "cpu"),
    "naive (GPU)": ("cuda", "torch"),
    "plain (GPU)": ("cuda", "torch"),
    "CUDA": ("cuda", "cuda"),
}
NAIVE_BYTES = 8 << 30  # more of its memory is not asked for
COLUMNS = ("seconds", "MiB", "error", "gradient error")


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
    """Most memory that this process has held, or its tensors on a GPU, since the last reset.

    0 for a CPU where the system is not Linux.
    """
    if device.startswith("cuda"):
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    return 0


def measure(name: str, length: int, n_features: int, n_states: int, repeats: int) -> dict:
    """Seconds, extra peak MiB and errors of one backend. For a fresh process."""
    device, os.environ["SASHIMI_KERNEL"] = BACKENDS[name]
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
            mib = (peak_bytes(device) - before) / 2**20
    native.backend.cache_clear()
    os.environ["SASHIMI_KERNEL"] = "torch"
    double = [x.to(torch.promote_types(x.dtype, torch.float64)) for x in parameters]
    errors = largest_errors(values, gradients(cauchy_kernel.nplr_kernel, double, length))
    return dict(zip(COLUMNS, (min(seconds), mib, errors[0], max(errors[1:])), strict=True))


def run(length: int, n_features: int, n_states: int, repeats: int) -> dict[str, dict]:
    """Every backend that this machine has, one after the other; prints the table as it grows."""
    print(f"L = {length}, H = {n_features}, N = {n_states}, complex64, forward and backward")
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'backend':12}" + "".join(f"{column:>16}" for column in COLUMNS))
    results = {}
    for name, (device, _) in BACKENDS.items():
        if device == "cuda" and not torch.cuda.is_available():
            continue
        need = 12 * 8 * n_features * n_states * (length // 2 + 1)  # 12 products of complex64
        if name.startswith("naive") and need > NAIVE_BYTES:
            print(f"{name:12} not run: needs about {need / 2**30:.0f} GiB")
            continue
        times = min(2, repeats) if name.startswith("naive") else repeats
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                row = pool.submit(measure, name, length, n_features, n_states, times).result()
            except Exception as error:  # killed, out of memory, or no such backend
                print(f"{name:12} failed: {error}")
                continue
        results[name] = row
        cells = (f"{row[x]:16.1e}" if "error" in x else f"{row[x]:16.4g}" for x in COLUMNS)
        print(f"{name:12}" + "".join(cells))
    return results


def plot(results: dict[str, dict], title: str, path: str) -> None:
    """Bars of time, memory and error, on logarithmic scales."""
    os.environ["MPLBACKEND"] = "agg"  # not a notebook's, which may not be installed here
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels = {"seconds": "time, s", "MiB": "peak memory, MiB", "gradient error": "gradient error"}
    for axis, (column, label) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        colors = [f"C{i}" for i in range(len(results))]
        bars = axis.bar(list(results), [row[column] for row in results.values()], color=colors)
        axis.bar_label(bars, fmt="%.2g")
        axis.set_yscale("log")
        axis.margins(y=0.2)
        axis.set_title(label)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    print(f"plot: {path}")


def main(argv: list[str] | None = None) -> None:
    sys.stdout.reconfigure(errors="replace")  # letters that the console has not: of paths
    about = "Time, peak memory and error of every backend, forward and backward."
    parser = argparse.ArgumentParser(
        "python -m cauchy_kernel.benchmark",
        description=about,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("-l", "--length", type=int, default=16000, help="samples")
    parser.add_argument("-f", "--features", type=int, default=64, help="features (H)")
    parser.add_argument("-n", "--states", type=int, default=64, help="real states each (N)")
    parser.add_argument("-r", "--repeats", type=int, default=5, help="the fastest run counts")
    parser.add_argument("--plot", default="cauchy_kernel.png", help="image file; empty for none")
    args = parser.parse_args(argv)
    results = run(args.length, args.features, args.states, args.repeats)
    if args.plot:
        title = f"Cauchy kernel, L = {args.length}, H = {args.features}, N = {args.states}"
        plot(results, title, args.plot)


if __name__ == "__main__":
    main()
