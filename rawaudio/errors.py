"""Errors that a user can mend, apart from mistakes of ours, and their words."""

from __future__ import annotations

import errno
import re


class UserError(ValueError):
    """What was asked for cannot be done; one printable line that says why, and the way out.

    Commands print it and end. Any other ValueError is a mistake of ours, with a traceback.
    """

    def __str__(self) -> str:
        cut = re.sub(r"\[[^][]{200,}]", lambda found: printable(found[0], 80), super().__str__())
        return printable(cut, 2000)


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the line names the file and the reason."""


def printable(text: str, most: int = 200) -> str:
    """The text on one line, cut to `most` characters, control characters as escapes.

    For what a file says about itself: a terminal obeys escape codes.
    """
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-(most // 2) :]}"
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text.strip()
    )


def plainly(error: Exception) -> str:
    """What is wrong with a text that could not be parsed, without the interpreter's advice."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if "digits" in str(error):  # Python advises to raise its limit
        return "it holds a number of thousands of digits"
    return printable(str(error))


def explained(error: OSError) -> str:
    """What failed and where, for a message; with what to do if there is no room."""
    if not error.errno:  # our own, a sentence
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    full = ": make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"{where}{error.strerror} ({errno.errorcode.get(error.errno, error.errno)}){full}"
