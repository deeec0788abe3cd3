"""Commands run by tests."""

from __future__ import annotations

from collections.abc import Callable


def status(main: Callable[[list[str]], int], argv: list[str]) -> int:
    """How the command ends."""
    try:
        return main(argv)
    except SystemExit as ended:
        return ended.code
