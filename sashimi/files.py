"""Files that are there whole or not at all, and the error for weights that cannot be used."""

import os
from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the reason."""


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Replace the file by `content`, all or nothing, also when the machine stops half-way.

    Directories are made. Raises OSError if it cannot be written; the old file is then whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same disk: replace is atomic
    try:
        with open(draft, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """`write_atomically` of UTF-8 text."""
    write_atomically(path, text.encode())
