"""Compiles C++ on first use and keeps what was compiled on the disk.

The libraries have a C interface and link neither PyTorch nor Python: they build in seconds, with
any recent compiler, and one build serves every version of both.
"""

import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-march=native"]


class DemandError(ValueError):
    """An environment variable demands what there is not, or what cannot be had here."""


class BuildError(Exception):
    """Why there is no compiled code, in one line."""


def compiler() -> str:
    """Path of the C++ compiler."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise BuildError("no C++ compiler found: install one (apt install g++) or set CXX")


def cached_library(source: Path, *flags: str) -> Path:
    """Path of the shared library of a C++ file, for this compiler and processor."""
    command = [compiler(), *FLAGS, *flags, str(source)]

    def compile_to(output: Path) -> None:
        done = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
            reason = next((line for line in lines if "error" in line), lines[0])
            raise BuildError(f"{command[0]} failed: {reason}")

    return cached(source, [*command, _machine(command[0])], ".so", compile_to)


@functools.cache
def _machine(compiler: str) -> str:
    """All that -march=native means here: a cache in a home folder may serve several machines."""
    command = [compiler, *FLAGS, "-dM", "-E", "-xc++", os.devnull]
    return str(subprocess.run(command, capture_output=True).stdout)


def cached(source: Path, key: list[str], suffix: str, make: Callable[[Path], None]) -> Path:
    """Path of what `make(path)` writes for this source, what it includes in quotes and this key.

    Made only where it is not there, in TORCH_EXTENSIONS_DIR or ~/.cache/torch_extensions. Its name
    ends with the digest of its content, since loading a library that was cut short kills the
    process. Processes that start at once may each make it: the same, under the same name.
    """
    default = os.path.expanduser("~/.cache/torch_extensions")
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or default
    if root.startswith("~"):  # nor in a folder that others can write to: it would be executed
        raise BuildError("there is no home folder to keep it in: set TORCH_EXTENSIONS_DIR")
    inputs = b"".join(x.read_bytes() for x in _included(source))
    stem = f"{source.stem}-{_digest(b''.join([inputs, ' '.join(key).encode()]))}"
    folder = Path(root, source.parent.name)
    try:
        for path in folder.glob(f"{stem}-*{suffix}"):
            if path.stem == f"{stem}-{_digest(path.read_bytes())}":
                return path
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            part = Path(scratch, "part")
            make(part)
            path = folder / f"{stem}-{_digest(part.read_bytes())}{suffix}"
            os.replace(part, path)
            return path
    except OSError as error:
        raise BuildError(f"cannot write {folder} (TORCH_EXTENSIONS_DIR): {error}") from error


def _included(source: Path) -> list[Path]:
    """The source and all that it includes in quotes, directly or by others."""
    files = [source]
    for file in files:  # which grows
        names = re.findall(r'^#include "(.+)"', file.read_text(), re.MULTILINE)
        files += [x for x in (file.parent / name for name in names) if x not in files]
    return files


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
