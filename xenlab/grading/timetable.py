"""Who ran when, and who waited, worked out from what a scheduler was told and what it said (exercise 10).

The invariant: everything here follows from the log of calls on the judge's machine; how the part came to its answers
plays no role.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from xenlab.grading.schedules import PICK, SLEEP, WAKE, Call


@dataclass(frozen=True, slots=True)
class Turn:
    """One stretch of the CPU.

    Attributes:
        vcpu: who had it.
        start, end: from when to when.
        cut: whether its vCPU fell asleep, or the run ended.
    """

    vcpu: int
    start: int
    end: int
    cut: bool

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Wait:
    """A vCPU was runnable and did not run.

    Attributes:
        woke: whether it began with a wake-up.
        served: whether it ended with the CPU, and not with the end of the run.
    """

    vcpu: int
    start: int
    end: int
    woke: bool
    served: bool

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclass(slots=True)
class Timetable:
    """A run of a scenario.

    Attributes:
        turns, waits: in the order of their ends.
        end: when the run ended.
    """

    turns: list[Turn] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)
    end: int = 0

    def ran(self, vcpu: int, start: int, end: int) -> int:
        """For how many instructions a vCPU ran between two times."""
        mine = (turn for turn in self.turns if turn.vcpu == vcpu)
        return sum(max(0, min(turn.end, end) - max(turn.start, start)) for turn in mine)

    def after_waking(self, vcpu: int) -> list[Wait]:
        """The waits of a vCPU that began with a wake-up."""
        return [wait for wait in self.waits if wait.vcpu == vcpu and wait.woke]


def timetable(log: Sequence[Call], end: int) -> Timetable:
    """The run that a log tells of, up to ``end``."""
    made, waiting = Timetable(end=end), dict[int, tuple[int, bool]]()
    running: tuple[int, int] | None = None
    for call in log:
        if call.what == WAKE and call.vcpu is not None:
            waiting[call.vcpu] = (call.time, True)
        elif call.what == SLEEP and call.vcpu is not None:
            if running is not None and running[0] == call.vcpu:
                made.turns.append(Turn(call.vcpu, running[1], call.time, cut=True))
                running = None
            waiting.pop(call.vcpu, None)
        elif call.what == PICK:
            running = _picked(made, waiting, running, call)
    if running is not None:
        made.turns.append(Turn(running[0], running[1], end, cut=True))
    made.waits += [Wait(vcpu, since, end, woke, served=False) for vcpu, (since, woke) in sorted(waiting.items())]
    return made


def _picked(
    made: Timetable, waiting: dict[int, tuple[int, bool]], running: tuple[int, int] | None, call: Call
) -> tuple[int, int] | None:
    if running is not None:
        if running[0] == call.vcpu:
            return running
        made.turns.append(Turn(running[0], running[1], call.time, cut=False))
        waiting[running[0]] = (call.time, False)
    if call.vcpu is None:
        return None
    since, woke = waiting.pop(call.vcpu)
    made.waits.append(Wait(call.vcpu, since, call.time, woke, served=True))
    return call.vcpu, call.time
