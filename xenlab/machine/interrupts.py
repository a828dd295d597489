"""Ctrl-C while the CPU runs: noticed, and acted on only between slices.

The problem: Python acts on SIGINT between two of its own instructions.  While libunicorn
runs there are none, and inside a trap handler there are many, in the middle of work that
must not be left half done.  So while the CPU runs SIGINT only sets a mark and shortens the slice,
and the run loop raises KeyboardInterrupt between two slices, when the machine is whole.

Except in code of the reader's own, such as a scheduler from a notebook that a trap has called and that loops for ever:
between two slices is a moment that never comes.  There KeyboardInterrupt is raised at once, and reaches the hypervisor
as any other exception of that part does.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_OURS = __name__.partition(".")[0]


class InterruptMark:
    """Whether SIGINT came since the run began."""

    __slots__ = ("_shorten", "seen")

    def __init__(self, shorten: Callable[[], None]) -> None:
        self.seen = False
        self._shorten = shorten

    def set(self, _number: int, frame: FrameType | None) -> None:
        """Signal handler: remember that it came; or raise KeyboardInterrupt in code of the reader's own."""
        if _is_in_own_code(frame):
            raise KeyboardInterrupt
        self.seen = True
        self._shorten()

    def check(self) -> None:
        """Raise KeyboardInterrupt if SIGINT came."""
        if self.seen:
            raise KeyboardInterrupt


def _is_in_own_code(frame: FrameType | None) -> bool:
    """Whether what xenlab called last is neither a part of xenlab nor of what is installed with it."""
    while frame is not None:
        room = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if room == _OURS:
            return False
        if room not in sys.stdlib_module_names and "site-packages" not in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


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
