"""How far work is that takes long: a bar where someone looks at it, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")

SOON = 1.0  # seconds to the first line, which tells how long it will take
SECONDS = 10.0  # between two lines


def watched(
    items: Iterable[T], what: str, total: int, unit: str = "clips", each: int = 1, show: bool = True
) -> Iterator[T]:
    """The same items, and on the way how many of `total` are done and how long the rest takes.

    each: what one item counts for, such as the clips of a batch; the last one may have less. On a
    terminal and in a notebook a bar, else lines on stderr, none for what takes less than a second.
    """
    if not show:
        yield from items
        return
    if sys.stdout.isatty() or "ipykernel" in sys.modules:
        from fastprogress.fastprogress import progress_bar  # only who wants to see one needs it

        bar = progress_bar(items, total=-(-total // each), leave=False)
        bar.comment = what
        yield from bar
        return
    began = printed = time.monotonic()
    for i, item in enumerate(items, 1):
        yield item
        now, done = time.monotonic(), min(total, i * each)
        if done < total and now - printed >= (SOON if printed == began else SECONDS):
            printed = now
            left = timedelta(seconds=round((now - began) * (total - done) / done))
            print(f"{what}: {done:,} of {total:,} {unit}, {left} left", file=sys.stderr, flush=True)
