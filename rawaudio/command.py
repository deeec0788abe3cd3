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

import torch

from cauchy_kernel.build import DemandError
from rawaudio.errors import UserError, explained

log = logging.getLogger(__name__)


def run(body: Callable[[], int | None], *, kept: Callable[[], str] = str, smaller: str = "") -> int:
    """What `body` does, and the exit status: its own, or 1 (disk, network, memory), 2 (a setting or
    file that cannot be used), 130 (Ctrl-C), with one line on stderr. Mistakes of ours are raised.

    kept: says, when it ends early, what is there. smaller: the way out where memory is too small.
    Under torchrun the first process speaks, the others where they failed alone.
    """
    try:
        return body() or 0
    except (UserError, DemandError) as error:
        message, status = f"error: {error}", 2
    except KeyboardInterrupt:
        message, status = f"interrupted{kept()}", 130
    except BrokenPipeError:  # whoever read the output went away
        drop_output()
        return 1
    except (
        FileNotFoundError,
        FileExistsError,
        NotADirectoryError,
        IsADirectoryError,
        PermissionError,
    ) as error:
        message, status = f"error: {explained(error)}", 2
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        message, status = f"error: {explained(error)}{kept() if full else ''}", 1
    except (MemoryError, RuntimeError) as error:
        on_cpu = "DefaultCPUAllocator: " in str(error)  # which has no class of its own
        if not on_cpu and not isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
            raise
        message, status = "error: this does not fit into memory" + (smaller and f": {smaller}"), 1
    if status == 1 or os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)
    return status


def drop_output() -> None:
    """Sends what is still printed nowhere; for a standard output that was closed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit, too


def forgiving_console() -> None:
    """What the console has no letters for is shown as ?, and not an error when all is done."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not everything that stands in for a console
            stream.reconfigure(errors="replace")


def cache_folder(folder: str | os.PathLike) -> Path:
    """The folder of a cache; ~ is the home folder or, without one, a folder of this process."""
    path = os.path.expanduser(folder)
    return _temporary() / Path(path).name if path.startswith("~") else Path(path)


@functools.cache
def _temporary() -> Path:
    folder = tempfile.mkdtemp(prefix="simple-sashimi-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    log.warning("there is no home folder: caches are in %s, until this command ends", folder)
    return Path(folder)
