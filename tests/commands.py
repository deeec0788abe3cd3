"""Commands run by tests, here and in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def status(main: Callable[[list[str]], int], argv: list[str]) -> int:
    """How the command ends."""
    try:
        return main(argv)
    except SystemExit as ended:
        return ended.code


def python(command: str, *arguments: str, **environment: str | None) -> subprocess.CompletedProcess:
    """The command's end; None takes a variable out of its environment."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    variables = os.environ | {"PYTHONPATH": path, "COLUMNS": "100"} | environment
    script = [str(ROOT / part) if part.endswith(".py") else part for part in command.split()]
    if command.startswith("-c "):
        script = ["-c", command[3:]]
    return subprocess.run(
        [sys.executable, *script, *arguments], capture_output=True, text=True,
        env={k: v for k, v in variables.items() if v is not None},
    )  # fmt: skip
