"""How long a student's part may think about one answer.

The problem: a part that loops for ever in one guest takes the answers for all other guests with it, and the
report can only say that the process was stopped.

The invariant: what runs within `patience` ends after so much CPU time, where the system has timers (POSIX, main
thread).  Elsewhere, and against code that sets out to prevent it, the limits of the sandbox hold.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class OutOfPatience(BaseException):
    """The time is up.  No Exception, so that ``except Exception`` in a loop does not swallow it."""


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Raise `OutOfPatience` in what runs within, once it has used ``seconds`` of CPU time."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _ring(_signal: int, _frame: FrameType | None) -> None:
    raise OutOfPatience
