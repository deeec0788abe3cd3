"""Which backend runs, and the calls into the compiled libraries.

`forward` and `backward` have the contract of the functions of the same names in plain.py.
The variable SASHIMI_KERNEL: `torch` compiles nothing; `cpu` or `cuda` demands the compiled
operation for tensors of that device, and raises where it cannot be had. Read on first use.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import warnings

import torch

from . import build, plain

HINTS = {
    "cpu": "install a C++ compiler (apt install g++)",
    "cuda": "install the CUDA toolkit (nvcc) and set CUDA_HOME",
}


@functools.cache
def library(device: str) -> tuple[ctypes.CDLL | None, str]:
    """The compiled library for "cpu" or "cuda" tensors, or None; and where from, or why not."""
    forced = os.environ.get("SASHIMI_KERNEL", "")
    if forced not in ("", "torch", "cpu", "cuda"):
        raise ValueError(f"SASHIMI_KERNEL={forced!r}: must be torch, cpu or cuda")
    if forced == "torch":
        return None, "SASHIMI_KERNEL=torch"
    if device not in build.SOURCES:
        return None, f"no compiled operation for {device} tensors"
    try:
        path = build.HERE / f"kernel_{device}.so"  # made by `pip install`
        if not (path.exists() and _runs_here(device)):
            path = build.cached_library(device)
        return _open(path, device), str(path)
    except (build.BuildError, OSError) as error:
        if forced == device:
            raise RuntimeError(f"SASHIMI_KERNEL={device}: {error}") from error
        warnings.warn(
            f"cauchy_kernel: using plain PyTorch on {device}, slower: {error}. For the fast "
            f"one: {HINTS[device]}; then run python -m cauchy_kernel",
            stacklevel=2,
        )
        return None, str(error)


def backend(device: str) -> tuple[str, str]:
    """What serves tensors of a device, "torch", "cpu" or "cuda", and the path or the reason."""
    lib, why = library(device)
    return ("torch" if lib is None else device), why


def forward(weight, a, b, rho, y, out) -> None:
    if (lib := library(out.device.type)[0]) is None:
        return plain.forward(weight, a, b, rho, y, out)
    if len(y):
        _call(lib, (weight, a, b, rho, y), out, None, _splits(out.device.type, len(a), len(y)))


def backward(grad, weight, a, b, rho, y) -> torch.Tensor:
    if (lib := library(grad.device.type)[0]) is None:
        return plain.backward(grad, weight, a, b, rho, y)
    splits = _splits(grad.device.type, len(a), len(y))
    parts = weight.new_zeros(splits, len(a), weight.shape[1] + 3, a.shape[1])
    _call(lib, (weight, a, b, rho, y), grad, parts, splits)
    return parts.sum(0)


def _splits(device: str, n_features: int, n_nodes: int) -> int:
    """Into how many ranges the nodes of a feature are cut: by shape alone, so that sums repeat."""
    if device == "cuda":
        return -(-n_nodes // 1024)
    return max(1, min(n_nodes // 1024, 32 // n_features))


def _call(lib, inputs, spectrum, parts, splits: int) -> None:
    """One call into a library, see the end of kernel.cpp; all tensors are contiguous."""
    channels, n_features, stride = spectrum.shape
    pointers = [x.data_ptr() for x in (*inputs, spectrum)]
    pointers.append(0 if parts is None else parts.data_ptr())
    sizes = [n_features, inputs[1].shape[1], len(inputs[-1]), stride, splits]
    arguments = [*map(ctypes.c_void_p, pointers), *map(ctypes.c_int64, sizes), channels]
    arguments.append(int(spectrum.dtype == torch.complex128))
    if spectrum.is_cuda:
        index = spectrum.device.index
        stream = torch.cuda.current_stream(index).cuda_stream
        error = lib.cauchy_kernel_cuda(*arguments, index, ctypes.c_void_p(stream))
        if error:
            raise RuntimeError(f"cauchy_kernel on {spectrum.device}: {error.decode()}")
    else:
        lib.cauchy_kernel_cpu(*arguments, torch.get_num_threads())


def _runs_here(device: str) -> bool:
    """Libraries made ahead of time for x86 ask for AVX2."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return device == "cuda" or not x86 or "AVX" in torch.backends.cpu.get_cpu_capability()


def _open(path, device: str) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(path))
    if device == "cuda":
        lib.cauchy_kernel_cuda.restype = ctypes.c_char_p
    return lib
