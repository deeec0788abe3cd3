"""What the commands share: how they end, what their consoles can show, where their caches are."""

from __future__ import annotations

import atexit
import errno
import functools
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from cauchy_kernel.build import DemandError
from rawaudio.errors import UserError
from rawaudio.files import explained

log = logging.getLogger(__name__)

WRONG_PATH = (
    FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError,
)  # fmt: skip


def run(body: Callable[[], int | None], *, kept: Callable[[], str] = str, smaller: str = "") -> int:
    """What `body` does, and the exit status: its own, or 1 (disk, network, memory), 2 (a setting or
    file that cannot be used), 130 (Ctrl-C), with one line on stderr. Mistakes of ours are raised.

    kept: says, when it ends early, what is there. smaller: the way out where memory is too small.
    Under torchrun the first process speaks, the others where they failed alone.
    """
    try:
        return body() or 0
    except (UserError, DemandError, *WRONG_PATH) as error:
        message, status = f"error: {_reason(error)}", 2
    except KeyboardInterrupt:
        message, status = f"interrupted{kept()}", 130
    except BrokenPipeError:  # whoever read the output went away
        drop_output()
        return 1
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        message, status = f"error: {explained(error)}" + (kept() if full else ""), 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message, status = "error: this does not fit into memory" + (smaller and f": {smaller}"), 1
    if status == 1 or first_process():
        print(message, file=sys.stderr)
    return status


def drop_output() -> None:
    """Sends what is still printed nowhere; for a standard output that was closed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit, too


def first_process() -> bool:
    """Whether this is the one of torchrun's processes that speaks; True without torchrun."""
    return os.environ.get("RANK", "0") == "0"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was too small: Python's or NumPy's, or PyTorch's on a GPU or the CPU."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and isinstance(error, torch.cuda.OutOfMemoryError)
    return on_gpu or "DefaultCPUAllocator: " in str(error)  # which has no class of its own


def _reason(error: Exception) -> str:
    """The error in a line, with the file that it is about."""
    named = isinstance(error, OSError) and error.filename
    return f"{error.filename}: {error.strerror}" if named else str(error)


def forgiving_console() -> None:
    """What the console has no letters for is shown as ?, and not an error when all is done."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not everything that stands in for a console
            stream.reconfigure(errors="replace")


def cache_folder(folder: str | os.PathLike) -> Path:
    """The folder of a cache, with ~ as the home folder.

    Where there is no home, one that ends with this process; one line says so.
    """
    path = os.path.expanduser(folder)
    return _temporary() / Path(path).name if path.startswith("~") else Path(path)


@functools.cache
def _temporary() -> Path:
    folder = tempfile.mkdtemp(prefix="simple-sashimi-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    log.warning("there is no home folder: caches are in %s, until this command ends", folder)
    return Path(folder)
