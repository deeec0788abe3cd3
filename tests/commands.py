"""Commands run by tests."""

from __future__ import annotations

from collections.abc import Callable


def status(main: Callable[[list[str]], int], argv: list[str]) -> int:
    """How the command ends."""
    try:
        return main(argv)
    except SystemExit as ended:
        return ended.code


def error_of(main: Callable[[list[str]], int], argv: list[str], capsys, expected: int = 2) -> str:
    """What the command says when it ends with that status: one line on stderr."""
    capsys.readouterr()
    assert status(main, argv) == expected
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1, said
    assert expected != 2 or said.out == "", "nothing has begun"
    return said.err
