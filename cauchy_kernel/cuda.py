"""The Cauchy kernel on CUDA: kernel.cu, compiled by NVRTC and launched through the driver.

PyTorch's wheels bring NVRTC, and a GPU has a driver: neither nvcc nor a CUDA toolkit is needed.
"""

import contextlib
import ctypes
import functools
import os
import sys
from pathlib import Path

import torch

from . import build

SOURCE = Path(__file__).with_name("kernel.cu")
OPTIONS = ["--std=c++17", "--prec-div=false", f"--include-path={SOURCE.parent}"]
THREADS = 128  # of a block, kThreads in kernel.cu
KINDS = ("float_1", "float_2", "double_1", "double_2")  # type and channels
NAMES = [f"{direction}_{kind}" for direction in ("forward", "backward") for kind in KINDS]


@functools.cache
def nvrtc() -> ctypes.CDLL:
    """NVRTC of PyTorch's CUDA version: from PyTorch's wheels, a toolkit or the system's folders."""
    major = (torch.version.cuda or "").split(".")[0]
    pattern = f"libnvrtc.so.{major}*"
    wheels = Path(torch.__file__).parents[1].glob("nvidia/*/lib")
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")).glob("lib*")
    for folder in (*wheels, *toolkit):
        for file in folder.glob(pattern):
            for part in folder.glob("libnvrtc-builtins.so*"):  # NVRTC opens it by its bare name
                ctypes.CDLL(str(part))
            return ctypes.CDLL(str(file))
    for name in (f"libnvrtc.so.{major}", f"nvrtc64_{major}0_0.dll"):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    raise build.BuildError(f"no NVRTC ({pattern}): pip install nvidia-cuda-nvrtc, or set CUDA_HOME")


def compile_to(output: Path, capability: int) -> None:
    """Write machine code of kernel.cu for GPUs of a compute capability, such as 90, or above."""
    lib, program, count = nvrtc(), ctypes.c_void_p(), ctypes.c_int()
    lib.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    lib.nvrtcGetSupportedArchs(known)
    best = max((x for x in known if x <= capability), default=capability)  # it may be newer
    options = [x.encode() for x in (f"--gpu-architecture=sm_{best}", *OPTIONS)]

    def result(name: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(lib, f"nvrtcGet{name}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(lib, f"nvrtcGet{name}")(program, buffer)
        return buffer.raw

    source = SOURCE.read_bytes()
    lib.nvrtcCreateProgram(ctypes.byref(program), source, b"kernel.cu", 0, None, None)
    array = (ctypes.c_char_p * len(options))(*options)
    if lib.nvrtcCompileProgram(program, len(options), array):
        lines = result("ProgramLog").rstrip(b"\0").decode().splitlines() or ["no message"]
        raise build.BuildError(f"NVRTC failed: {lines[0]}")
    output.write_bytes(result("CUBIN"))
    lib.nvrtcDestroyProgram(ctypes.byref(program))


@functools.cache
def kernels(device: int) -> tuple[dict[str, ctypes.c_void_p], Path]:
    """The functions of kernel.cu on a device, and the file that they are from.

    Raises BuildError, OSError or RuntimeError: no NVRTC, no driver, or one that refuses the code.
    """
    version = ctypes.c_int(), ctypes.c_int()
    nvrtc().nvrtcVersion(*map(ctypes.byref, version))
    major, minor = torch.cuda.get_device_capability(device)
    capability = 10 * major + minor
    key = [*(str(x.value) for x in version), str(capability), *OPTIONS]
    path = build.cached(SOURCE, key, ".cubin", functools.partial(compile_to, capability=capability))
    module, functions = ctypes.c_void_p(), {}
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # gives this thread PyTorch's context, which the driver needs
        _call("cuModuleLoadData", ctypes.byref(module), path.read_bytes())
        for name in NAMES:
            functions[name] = ctypes.c_void_p()
            _call("cuModuleGetFunction", ctypes.byref(functions[name]), module, name.encode())
    return functions, path


def run(problem: ctypes.Structure, device: torch.device) -> None:
    """As cauchy_kernel_cpu in kernel.cpp, on PyTorch's current stream of the device."""
    if problem.d:
        name, grid = "backward", (problem.features * problem.splits, -(-problem.states // THREADS))
    else:
        name, grid = "forward", (problem.features * -(-problem.nodes // THREADS), 1)
    name += f"_{'double' if problem.is_double else 'float'}_{problem.channels}"
    function = kernels(device.index)[0][name]
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(problem))
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    with torch.cuda.device(device):
        _call("cuLaunchKernel", function, *grid, 1, THREADS, 1, 1, 0, stream, arguments, None)


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _call(name: str, *arguments) -> None:
    """Call a function of the driver."""
    error = getattr(_driver(), name)(*arguments)
    if error:
        message = ctypes.c_char_p()
        _driver().cuGetErrorString(error, ctypes.byref(message))
        raise RuntimeError(f"{name}: {(message.value or b'unknown error').decode()} ({error})")
