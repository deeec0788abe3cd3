"""Time, peak memory and error of every backend, forward and backward.

    python -m cauchy_kernel.benchmark -l 64000             # table, and the plot cauchy_kernel.png
    python -m cauchy_kernel.benchmark -l 16000 --naive     # ... even if it takes all the memory

Each backend runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time

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
    """Lambda, P, B (H, M), Ct (H, M), dt (H,): HiPPO-LegS with 5 % noise, M = n_states / 2."""
    g = torch.Generator().manual_seed(seed)
    n = torch.arange(n_states, dtype=torch.float64)
    p = (n + 0.5).sqrt()
    skew = 0.5 * (2 * p[:, None] * p).triu(1) - 0.5 * (2 * p[:, None] * p).tril(-1)
    frequency, basis = torch.linalg.eigh(-1j * skew.to(torch.complex128))
    keep = frequency > 0
    imag, P = frequency[keep], (basis.mH @ p.to(torch.complex128))[keep]

    def noise(*shape):
        x = torch.randn(*shape, 2, dtype=torch.float64, generator=g)
        return torch.view_as_complex(x)

    e = [noise(n_features, len(imag)) for _ in range(4)]
    Lambda = torch.complex(-0.5 * (0.05 * e[0].real).exp(), imag * (0.05 * e[0].imag).exp())
    P, B = P * (1 + 0.05 * e[1]), 2**0.5 * P * (1 + 0.05 * e[2])
    dt = 10 ** (torch.rand(n_features, dtype=torch.float64, generator=g) * 2 - 3)
    parameters = [x.to(device=device, dtype=dtype) for x in (Lambda, P, B, e[3])]
    return *parameters, dt.to(device=device, dtype=dtype.to_real())


def naive(Lambda, P, B, Ct, dt, L):
    """`nplr_kernel` as the formula has it, with all H x N x L products in memory."""
    w = torch.exp(-2j * torch.pi / L * torch.arange(L // 2 + 1, dtype=torch.float64))
    if L % 2 == 0:
        w[-1] = -1 + 1e-9  # close enough to the limit, and divides
    z = (2 * (1 - w) / (1 + w)).to(Ct)
    v = torch.stack([Ct * B, Ct * P, P.conj() * B, P.conj() * P])
    v, poles = (torch.cat([x, x.conj()], -1) for x in (v, dt[:, None] * Lambda))
    cb, cp, qb, qp = dt[:, None] * (v[..., None] / (z - poles[..., None])).sum(-2)
    return (2 / (1 + w)).to(Ct) * (cb - cp * qb / (1 + qp))


def naive_bytes(n_features: int, n_states: int, length: int) -> int:
    """About what `naive` needs: four products of complex64, and in backward as many again x 2."""
    return 12 * n_features * n_states * (length // 2 + 1) * 8


def gradients(function, parameters, L):
    """[spectrum, and the gradients of a sum of the kernel with fixed random weights]."""
    parameters = [x.detach().clone().requires_grad_() for x in parameters]
    spectrum = function(*parameters, L)
    g = torch.Generator().manual_seed(1)
    weights = torch.randn(spectrum.shape[0], L, generator=g).to(spectrum.device)
    loss = (torch.fft.irfft(spectrum, n=L) * weights).sum()
    return [spectrum.detach(), *torch.autograd.grad(loss, parameters)]


def largest_error(values, truth) -> list[float]:
    """Largest error of each tensor, relative to the largest true value."""
    pairs = zip(values, truth, strict=True)
    return [((x - y).abs().max() / y.abs().max().clamp(min=1e-300)).item() for x, y in pairs]


def _peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _measure(name: str, length: int, n_features: int, n_states: int, repeats: int) -> dict:
    """In a fresh process: seconds, extra bytes and errors of one backend."""
    device = BACKENDS[name][0]
    function = naive if name.startswith("naive") else cauchy_kernel.nplr_kernel
    parameters = example(n_features, n_states, device=device)
    gradients(function, example(2, 4, device=device), 64)  # loads all that is loaded on first use
    native.library(device)
    torch.randn(n_features, length, device=device)
    before = _peak_bytes(device)
    seconds, peak = [], 0
    for _ in range(repeats):
        start = time.perf_counter()
        values = gradients(function, parameters, length)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        peak = peak or _peak_bytes(device) - before
    native.library.cache_clear()
    os.environ["SASHIMI_KERNEL"] = "torch"
    double = [x.to(torch.promote_types(x.dtype, torch.float64)) for x in parameters]
    errors = largest_error(values, gradients(cauchy_kernel.nplr_kernel, double, length))
    return {"seconds": min(seconds), "bytes": peak, "kernel": errors[0], "gradient": max(errors)}
