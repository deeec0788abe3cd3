"""Runs one of the four commands of a listening study."""

from __future__ import annotations

import sys

import metrics.study as study
from metrics.study import batches, pages, score, select
from rawaudio.config import check_name
from rawaudio.errors import UserError

COMMANDS = {"select": select, "batches": batches, "pages": pages, "score": score}


def main(argv: list[str] | None = None) -> int:
    """The command that the first argument names. Returns the exit status: see `command.run`."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("--help", "-h"):
        print(study.__doc__.strip(), "Each has its own --help.", sep="\n\n")
        return 0
    try:
        if not name:
            raise UserError("a command is required, as in: python -m metrics.study select --help")
        check_name("command", name, COMMANDS)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return COMMANDS[name].main(rest)


if __name__ == "__main__":
    sys.exit(main())
