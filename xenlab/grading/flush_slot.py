"""The flush decision made by a student's part: each answer ``{"flush": true}`` or ``{"flush": false}`` on the wire.

The hypervisor's own slot counts flushes without end, and each frame remembers the count exactly; there the decision is
one comparison.  A real hypervisor has less room.  So what the part is told comes from a `FlushClock`: a clock that
begins again after a few readings, and stamps that may be behind it.  The true counts stay here, beside each answer:
whoever judges can say what the part could know and what was so.

The invariant: what the part is told follows from the true counts alone, in the student's process and in the judge's.
What breaks without it: answers that were recorded are given to other questions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xenlab.grading.decisions import Decision, Sink, Unusable, described, raise_if_unusable
from xenlab.grading.patience import OutOfPatience, patience
from xenlab.hypervisor.tlb import FREED, RETYPED, FlushPolicy

if TYPE_CHECKING:
    from xenlab.hypervisor.core import Hypervisor

# What the part is told of a frame no mapping of which has ever gone away, and how the frame table says it.
NEVER, NOT_MAPPED = 0, -1
ANSWER_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class FlushClock:
    """How flushes are told.

    Attributes:
        top: the clock has the readings 1 to ``top``.
        down: whether it goes down, from ``top`` to 1 and then to ``top`` again; else up.
        retyped, freed: stamps for that reason are taken from a copy of the clock, which is brought up to date by
            every so manyth flush.
    """

    top: int
    down: int
    retyped: int
    freed: int

    def behind(self, reason: str) -> int:
        """With how many flushes the copy for a reason is brought up to date once."""
        return {RETYPED: self.retyped, FREED: self.freed}[reason]

    def reading(self, count: int) -> int:
        """What the clock says after ``count`` flushes."""
        return self.top - count % self.top if self.down else 1 + count % self.top

    def stamp(self, reason: str, count: int) -> int:
        """What the copy for a reason says after ``count`` flushes."""
        return self.reading(count - count % self.behind(reason))

    def may_be_stale(self, reason: str, left: int, now: int) -> bool:
        """Whether a part that is told this would be told the same if the mapping had gone away since the last flush."""
        counts = range(self.top * self.behind(reason))
        return any((self.stamp(reason, count), self.reading(count)) == (left, now) for count in counts)


@dataclass(frozen=True, slots=True)
class Asked:
    """A question to the part, and what was so.

    Attributes:
        reason, left, now: as it was told.
        answer: what it said, None if it said nothing usable.
        since: how often the TLB really was emptied since the mapping went away, or NOT_MAPPED.
        time, eip: when and where the guest was.
    """

    reason: str
    left: int
    now: int
    answer: bool | None
    since: int
    time: int
    eip: int


class FlushSlot:
    """A flush policy whose decisions pass through a `Sink`.

    Attributes:
        asked: all questions, in order.
    """

    def __init__(self, sink: Sink, clock: FlushClock, part: FlushPolicy | None = None) -> None:
        self._sink, self._clock, self._part = sink, clock, part
        self._xen: Hypervisor | None = None
        self._start = 0
        self.asked: list[Asked] = []

    def begin(self, xen: Hypervisor) -> None:
        """Guests run from now on, and the part is asked; before, nothing can be in the TLB."""
        self._xen, self._start = xen, xen.cpu.flushes

    def must_flush(self, reason: str, left: int, flushes: int) -> bool:
        if self._xen is None or self._xen.current is None:
            return False
        stamp = NEVER if left == NOT_MAPPED else self._clock.stamp(reason, left - self._start)
        now = self._clock.reading(flushes - self._start)
        since = NOT_MAPPED if left == NOT_MAPPED else flushes - left
        time, eip = self._xen.now, self._xen.current.state.eip
        answer = None
        try:
            answer = flush_of(self._sink.next(lambda: self._ask(reason, stamp, now)))
            return answer
        finally:
            self.asked.append(Asked(reason, stamp, now, answer, since, time, eip))

    def _ask(self, reason: str, left: int, now: int) -> Decision:
        question = told(reason, left, now)
        assert self._part is not None
        try:
            with patience(ANSWER_SECONDS):
                value = self._part.must_flush(reason, left, now)
                if value is True or value is False:
                    return {"flush": value}
                return {"unusable": f"{question} must return True or False, it returned {value!r:.80}"}
        except OutOfPatience:
            return {"unusable": f"{question} did not answer within {ANSWER_SECONDS:g} s of CPU time"}
        except (Exception, SystemExit) as problem:
            return {"unusable": f"{question} raised {described(problem)}"}


def told(reason: str, left: int, now: int) -> str:
    """A question as it is written in Python: ``must_flush('freed', 3, 7)``."""
    return f"must_flush({reason!r}, {left}, {now})"


def flush_of(decision: Any) -> bool:
    """The answer in a decision.  Raises Unusable."""
    if isinstance(decision, dict):
        raise_if_unusable(decision)
    answer = decision.get("flush") if isinstance(decision, dict) else None
    if not isinstance(answer, bool):
        raise Unusable(f"expected a decision as {{'flush': true or false}}, found {decision!r:.80}")
    return answer


__all__ = ["NEVER", "NOT_MAPPED", "Asked", "FlushClock", "FlushSlot", "flush_of", "told"]
