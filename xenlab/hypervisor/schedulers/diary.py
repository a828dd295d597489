"""A scheduler that writes down what it was told and what it chose, for those who look on (lesson 10; paper 3.3.1).

The problem: a picture of a schedule needs the past: who woke when, and where the virtual clocks stood.  A scheduler
keeps only what it needs for its next answer, and should not become slower for the sake of pictures.

So a `Diary` stands between the hypervisor and any scheduler, passes everything on, and writes a line for each call.  A
scheduler with a method ``clocks``, such as `Bvt`, has its clocks written down as well.

The invariant: what stands in the diary is what happened up to now.  A run that is taken back takes its lines back, and
writes them again when it is made again.  What breaks without it: a picture of the past that shows the future.

Lines are kept also behind the present moment, so that saving and loading cost the same however long the diary is: what
is saved is their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple

from xenlab.errors import ScheduleError
from xenlab.hypervisor.parts import load_part, save_part

if TYPE_CHECKING:
    from xenlab.hypervisor.schedulers import Scheduler

WAKE, SLEEP, PICK, SET = "wake", "sleep", "pick", "set"
NOBODY = -1


class Line(NamedTuple):
    """One line of a diary.

    Attributes:
        time: in instructions.
        what: WAKE, SLEEP, PICK or SET.
        vcpu: whom it is about; for PICK the one that was chosen, or NOBODY.
        clocks: (vCPU, actual, effective virtual time) of each, as it was then.
    """

    time: int
    what: str
    vcpu: int
    clocks: tuple[tuple[int, int, int], ...]


class Diary:
    """Passes everything on to a scheduler and writes it down.

    Args:
        scheduler: any; one without parameters has none here either.

    Attributes:
        scheduler: the same.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler: Any = scheduler
        self._lines: list[Line] = []
        self._count = 0
        self._runnable: set[int] = set()

    def lines(self) -> Sequence[Line]:
        """Everything up to now, oldest first."""
        return self._lines[: self._count]

    def successor(self, scheduler: Scheduler) -> Diary:
        """A diary that goes on from here with another scheduler, which has seen no vCPU yet."""
        made = Diary(scheduler)
        made._lines, made._count, made._runnable = self._lines[: self._count], self._count, set(self._runnable)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Diary:
        return self.successor(deepcopy(self.scheduler, memo))  # its lines never change

    def _write(self, time: int, what: str, vcpu: int) -> None:
        clocks = self.scheduler.clocks() if hasattr(self.scheduler, "clocks") else {}
        line = Line(time, what, vcpu, tuple((key, int(actual), int(evt)) for key, (actual, evt) in clocks.items()))
        if self._lines[self._count : self._count + 1] != [line]:
            del self._lines[self._count :]  # another future than the one that was written down
            self._lines.append(line)
        self._count += 1

    def wake(self, vcpu: int, now: int) -> None:
        self.scheduler.wake(vcpu, now)
        if vcpu not in self._runnable:  # a successor is told of those that have been runnable all the time
            self._runnable.add(vcpu)
            self._write(now, WAKE, vcpu)

    def sleep(self, vcpu: int, now: int) -> None:
        self.scheduler.sleep(vcpu, now)
        self._runnable.discard(vcpu)
        self._write(now, SLEEP, vcpu)

    def pick(self, now: int) -> tuple[int, int] | None:
        picked: tuple[int, int] | None = self.scheduler.pick(now)
        self._write(now, PICK, picked[0] if picked else NOBODY)
        return picked

    def add(self, vcpu: int) -> None:
        if hasattr(self.scheduler, "add"):
            self.scheduler.add(vcpu)

    def remove(self, vcpu: int) -> None:
        if hasattr(self.scheduler, "remove"):
            self.scheduler.remove(vcpu)

    def parameters(self, vcpu: int) -> dict[str, int]:
        """Those of the scheduler; empty if it has none."""
        found: dict[str, int] = self.scheduler.parameters(vcpu) if hasattr(self.scheduler, "parameters") else {}
        return found

    def set_parameters(self, vcpu: int, now: int, values: Mapping[str, int]) -> None:
        """Set them.

        Raises:
            ScheduleError: the scheduler has no parameters, or cannot follow these.
        """
        if hasattr(self.scheduler, "set_parameters"):
            self.scheduler.set_parameters(vcpu, now, values)
            self._write(now, SET, vcpu)
        elif values:
            raise ScheduleError(f"{type(self.scheduler).__name__} has no parameters, found {dict(values)}")

    def state(self) -> tuple[Any, int, list[int]]:
        return save_part(self.scheduler), self._count, sorted(self._runnable)

    def load(self, state: tuple[Any, int, list[int]]) -> None:
        saved, self._count, runnable = state
        load_part(self.scheduler, saved)
        self._runnable = set(runnable)
