"""Ctrl-C and SIGTERM in a training run: the step is finished and its state saved."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from rawaudio import processes


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, by number. Ends a validation early; ends a run when its state is saved."""


class Signals:
    """Within `with Signals() as signals:`, signals are gathered; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._waiting = False
        self._before: dict[int, Any] = {}

    @property
    def last(self) -> int:
        """The number of the gravest signal so far, 0 for none."""
        return max(self.received, default=0)

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            numbers = (signal.SIGINT, signal.SIGTERM)
            self._before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: Any) -> None:
        if number == signal.SIGINT and number in self.received:
            raise KeyboardInterrupt
        self.received.append(number)
        if self._waiting:
            raise Interrupted(number)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """What takes long and leaves nothing behind ends at once; several processes finish it."""
        alone = processes.world() == 1
        if alone and self.received:
            raise Interrupted(self.received[0])
        self._waiting = alone
        try:
            yield
        finally:
            self._waiting = False
