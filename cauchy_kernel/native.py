"""Which backend runs, and the call into compiled code.

`forward` and `backward` have the contract of the functions of the same names in plain.py.
The variable SASHIMI_KERNEL, read on first use: `torch` uses plain PyTorch; `cpu` or `cuda`
demands the compiled operation for tensors of that device, and raises where it cannot be had.
"""

import ctypes
import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch

from . import build, cuda, plain

log = logging.getLogger(__name__)

POINTERS = ("weight", "a", "b", "rho", "y", "spectrum", "d")
SIZES = ("features", "states", "nodes", "stride", "splits", "channels", "is_double", "threads")


class Problem(ctypes.Structure):
    """As in kernel.h."""

    _fields_ = [(x, ctypes.c_void_p) for x in POINTERS] + [(x, ctypes.c_int64) for x in SIZES]


@functools.cache
def backend(device: str) -> tuple[Callable[[Problem, torch.device], None] | None, str]:
    """The compiled code for tensors of a device type and its file, or None and the reason."""
    forced = os.environ.get("SASHIMI_KERNEL", "")
    if forced not in ("", "torch", "cpu", "cuda"):
        raise build.DemandError(f"SASHIMI_KERNEL={forced!r}: must be torch, cpu or cuda")
    if forced == "torch":
        return None, "SASHIMI_KERNEL=torch"
    if device not in ("cpu", "cuda"):
        return None, f"there is no compiled operation for {device} tensors"
    try:
        if device == "cuda":
            return cuda.run, str(cuda.kernels(torch.cuda.current_device())[1])
        path = build.cached_library(Path(__file__).with_name("kernel.cpp"))
        function = ctypes.CDLL(str(path)).cauchy_kernel_cpu
        return lambda problem, _: function(ctypes.byref(problem)), str(path)
    except (build.BuildError, OSError, RuntimeError) as error:
        if forced == device:
            raise build.DemandError(f"SASHIMI_KERNEL={device}: {error}") from error
        log.warning(  # one line, once a process
            "cauchy_kernel runs as plain PyTorch on %s, not compiled, which is slower. %s. "
            "SASHIMI_KERNEL=torch silences this",
            device,
            error,
        )
        return None, str(error)


def forward(weight, a, b, rho, y, out) -> None:
    if backend(out.device.type)[0] is None:
        return plain.forward(weight, a, b, rho, y, out)
    _run(weight, a, b, rho, y, out)


def backward(grad, weight, a, b, rho, y) -> torch.Tensor:
    if backend(grad.device.type)[0] is None:
        return plain.backward(grad, weight, a, b, rho, y)
    splits = _splits(grad.device.type, len(a), len(y))
    parts = weight.new_empty(splits, len(a), weight.shape[1] + 3, a.shape[1])
    _run(weight, a, b, rho, y, grad, parts)
    return parts.sum(0)


def _splits(device: str, n_features: int, n_nodes: int) -> int:
    """Ranges of nodes per feature: by shape alone, so that the same sums give the same bits."""
    if device == "cuda":
        return -(-n_nodes // 1024)
    return max(1, min(n_nodes // 1024, 32 // n_features))


def _run(weight, a, b, rho, y, spectrum, d=None) -> None:
    """All tensors are contiguous, all but the spectrum float64; see Problem in kernel.h."""
    device, (channels, n_features, stride) = spectrum.device, spectrum.shape
    pointers = [None if x is None else x.data_ptr() for x in (weight, a, b, rho, y, spectrum, d)]
    splits = _splits(device.type, n_features, len(y))
    sizes = [n_features, a.shape[1], len(y), stride, splits, channels]
    sizes += [spectrum.dtype == torch.complex128, torch.get_num_threads()]
    backend(device.type)[0](Problem(*pointers, *sizes), device)
