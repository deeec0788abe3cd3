"""Which backend runs, and the calls into the compiled libraries.

`forward` and `backward` have the contract of the functions of the same names in plain.py.
The variable SASHIMI_KERNEL, read on first use: `torch` uses plain PyTorch; `cpu` or `cuda`
demands the compiled operation for tensors of that device, and raises where it cannot be had.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os

import torch

from . import build, plain

log = logging.getLogger(__name__)


@functools.cache
def library(device: str) -> tuple[ctypes.CDLL | None, str]:
    """The compiled library for tensors of a device type, or None; its path, or why there is none.

    Taken from the package if it was built with it, else from the cache, else compiled now.
    """
    forced = os.environ.get("SASHIMI_KERNEL", "")
    if forced not in ("", "torch", "cpu", "cuda"):
        raise build.DemandError(f"SASHIMI_KERNEL={forced!r}: must be torch, cpu or cuda")
    if forced == "torch":
        return None, "SASHIMI_KERNEL=torch"
    if device not in build.SOURCES:
        return None, f"there is no compiled operation for {device} tensors"
    try:
        path = build.HERE / f"kernel_{device}.so"
        if not build.is_whole(path) or (device == "cpu" and build.X86 and not _has_avx2()):
            path = build.cached_library(device)
        lib = ctypes.CDLL(str(path))
        if device == "cuda":
            lib.cauchy_kernel_cuda.restype = ctypes.c_char_p
            _trial(lib)
        return lib, str(path)
    except (build.BuildError, OSError) as error:
        if forced == device:
            raise build.DemandError(f"SASHIMI_KERNEL={device}: {error}") from error
        log.warning(  # one line, once a process
            "cauchy_kernel runs as plain PyTorch on %s, not compiled, which is slower. %s. "
            "SASHIMI_KERNEL=torch silences this",
            device,
            error,
        )
        return None, str(error)


def _has_avx2() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX")


def _trial(lib) -> None:
    """Launch once, so that a GPU or driver which the library does not fit shows here."""
    inputs = torch.ones(6, 1, dtype=torch.float64, device="cuda")
    weight = inputs.new_ones(1, 8, 1)
    spectrum = torch.zeros(1, 1, 1, dtype=torch.complex64, device="cuda")
    try:
        _call(lib, (weight, *inputs[:2, None], *inputs[2:4]), spectrum, None, 1)
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise build.BuildError(str(error)) from error


def forward(weight, a, b, rho, y, out) -> None:
    if (lib := library(out.device.type)[0]) is None:
        return plain.forward(weight, a, b, rho, y, out)
    _call(lib, (weight, a, b, rho, y), out, None, _splits(out.device.type, len(a), len(y)))


def backward(grad, weight, a, b, rho, y) -> torch.Tensor:
    if (lib := library(grad.device.type)[0]) is None:
        return plain.backward(grad, weight, a, b, rho, y)
    splits = _splits(grad.device.type, len(a), len(y))
    parts = weight.new_zeros(splits, len(a), weight.shape[1] + 3, a.shape[1])
    _call(lib, (weight, a, b, rho, y), grad, parts, splits)
    return parts.sum(0)


def _splits(device: str, n_features: int, n_nodes: int) -> int:
    """Ranges of nodes per feature: by shape alone, so that the same sums give the same bits."""
    if device == "cuda":
        return -(-n_nodes // 1024)
    return max(1, min(n_nodes // 1024, 32 // n_features))


def _call(lib, inputs, spectrum, parts, splits: int) -> None:
    """See the ends of kernel.cpp and kernel.cu. All tensors are contiguous, inputs float64."""
    channels, n_features, stride = spectrum.shape
    pointers = [x.data_ptr() for x in (*inputs, spectrum)]
    pointers.append(0 if parts is None else parts.data_ptr())
    sizes = [n_features, inputs[1].shape[1], len(inputs[-1]), stride, splits]
    arguments = [*map(ctypes.c_void_p, pointers), *map(ctypes.c_int64, sizes), channels]
    arguments.append(int(spectrum.dtype == torch.complex128))
    if not spectrum.is_cuda:
        lib.cauchy_kernel_cpu(*arguments, torch.get_num_threads())
        return
    with torch.cuda.device(spectrum.device):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = lib.cauchy_kernel_cuda(*arguments, torch.cuda.current_device(), stream)
    if error:
        raise RuntimeError(f"cauchy_kernel on {spectrum.device}: {error.decode()}")
