"""Compiles kernel.cpp and kernel.cu into shared libraries. Needs no PyTorch, so setup.py uses it.

The libraries have a C interface and link neither PyTorch nor Python: they build in seconds, with
any recent compiler, and one build serves every version of both.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = {"cpu": "kernel.cpp", "cuda": "kernel.cu"}
X86 = platform.machine().lower() in ("x86_64", "amd64")


class DemandError(ValueError):
    """An environment variable demands what there is not, or what cannot be had here."""


class BuildError(Exception):
    """Why there is no library, in one line."""


def compiler(backend: str) -> str:
    """Path of the C++ compiler, or of nvcc."""
    if backend == "cpu":
        names = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    else:
        roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
        names = [*(str(Path(root, "bin", "nvcc")) for root in roots if root), "nvcc"]
    for name in names:
        if name and (path := shutil.which(name)):
            return path
    if backend == "cpu":
        raise BuildError("no C++ compiler found: install one (apt install g++) or set CXX")
    raise BuildError("no nvcc found: install the CUDA toolkit or set CUDA_HOME")


def flags(backend: str, portable: bool = False) -> list[str]:
    """Compiler options; `portable`: for other processors than this one, x86 with AVX2 at least."""
    common = ["-O3", "-std=c++17", "-shared"]
    if backend == "cuda":  # machine code for two generations, PTX for all others since sm_75
        targets = ("compute_75,code=compute_75", "compute_80,code=sm_80", "compute_90,code=sm_90")
        common += ["-prec-div=false", "-Xcompiler=-fPIC", "-allow-unsupported-compiler", "-t=0"]
        return common + [f"-gencode=arch={target}" for target in targets]
    common += ["-fPIC", "-pthread"]
    if portable:
        return common + ["-march=x86-64-v3"] * X86
    return common + ["-march=native"]


def compile_library(
    backend: str, output: Path, portable: bool = False, source: Path | None = None
) -> None:
    """Write the shared library `output` of `source`, the kernel if None, and its digest beside it.

    Whole or not at all; see `is_whole`.
    """
    source = source or HERE / SOURCES[backend]
    command = [compiler(backend), *flags(backend, portable), str(source)]
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        part, digest = Path(folder, output.name), Path(folder, "digest")
        done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
            reason = next((line for line in lines if "error" in line), lines[0])
            raise BuildError(f"{command[0]} failed: {reason}")
        digest.write_text(_digest(part))
        for made, final in ((part, output), (digest, _digest_path(output))):
            with open(made, "rb+") as file:  # on the disk before it has its name
                os.fsync(file.fileno())
            os.replace(made, final)


def is_whole(library: Path) -> bool:
    """Whether the library is what `compile_library` wrote; loading one that was cut short kills."""
    try:
        return _digest(library) == _digest_path(library).read_text()
    except (OSError, UnicodeDecodeError):
        return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest_path(library: Path) -> Path:
    return library.with_name(f"{library.name}.sha256")


def cached_library(backend: str, source: Path | None = None) -> Path:
    """Path of the library for this source, compiler and processor, built if it is not there, whole.

    source: the kernel if None; a file and the headers beside it decide whether it is the same.
    In TORCH_EXTENSIONS_DIR, or ~/.cache/torch_extensions, as PyTorch's own extensions are.
    """
    default = os.path.expanduser("~/.cache/torch_extensions")
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or default
    if root.startswith("~"):  # nor in a folder that others can write to: it would be executed
        raise BuildError("there is no home folder to keep it in: set TORCH_EXTENSIONS_DIR")
    source = source or HERE / SOURCES[backend]
    key = hashlib.sha256(source.read_bytes())
    for header in sorted(source.parent.glob("*.h")):
        key.update(header.read_bytes())
    key.update(" ".join([compiler(backend), *flags(backend), _processor()]).encode())
    output = Path(root, source.parent.name, f"{backend}-{key.hexdigest()[:16]}.so")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if not is_whole(output):
            with _lock(output.with_suffix(".lock")):
                if not is_whole(output):
                    compile_library(backend, output, source=source)
    except OSError as error:
        raise BuildError(f"cannot write {output.parent} (TORCH_EXTENSIONS_DIR): {error}") from error
    return output


def _processor() -> str:
    """What -march=native depends on: a cache in a home folder may serve several machines."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({x for x in lines if x.startswith(("model name", "flags", "Feat"))}))
    return platform.processor() + platform.machine()


@contextlib.contextmanager
def _lock(path: Path):
    """One process builds, the others wait; the lock dies with its process. Without: all build."""
    with open(path, "w") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
