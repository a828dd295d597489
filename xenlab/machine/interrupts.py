"""Ctrl-C while the CPU runs: noticed, and acted on only between slices.

The problem: Python acts on SIGINT between two of its own instructions.  While libunicorn
runs there are none, and inside a trap handler there are many, in the middle of work that
must not be left half done.  So while the CPU runs SIGINT only sets a mark and shortens the slice,
and the run loop raises KeyboardInterrupt between two slices, when the machine is whole.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class InterruptMark:
    """Whether SIGINT came since the run began."""

    __slots__ = ("_shorten", "seen")

    def __init__(self, shorten: Callable[[], None]) -> None:
        self.seen = False
        self._shorten = shorten

    def set(self, _number: int, _frame: FrameType | None) -> None:
        """Signal handler: remember that it came."""
        self.seen = True
        self._shorten()

    def check(self) -> None:
        """Raise KeyboardInterrupt if SIGINT came."""
        if self.seen:
            raise KeyboardInterrupt


@contextmanager
def deferred_interrupts(shorten: Callable[[], None] = lambda: None) -> Iterator[InterruptMark]:
    """While inside, SIGINT sets the mark that is given and calls ``shorten``.  In other threads nothing changes."""
    mark = InterruptMark(shorten)
    if threading.current_thread() is not threading.main_thread():
        yield mark
        return
    previous = signal.signal(signal.SIGINT, mark.set)
    try:
        yield mark
    finally:
        signal.signal(signal.SIGINT, previous)
