"""What must have become of each alarm: the calls to a part, held against the rules of exercise 09.

The ledger goes through a run that is over.  It knows what the part was told, when, and which alarms it let go off.
At each call it says which alarms should have gone off before, and, where some go off, which and in which order.

An alarm is due when its own clock reads a certain value.  That is a moment of real time as soon as it is known who
runs: for a vCPU that began to run at ``now`` with ``ran`` behind it, ``due - ran + now``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from xenlab.grading.alarms_slot import Told
from xenlab.hypervisor.alarms import REAL, VIRTUAL

# What becomes of an alarm that lies in the past, or beyond reach.
COUNTS, DROPS, IGNORED = "counts", "drops", "ignored"
NEWEST, EARLIEST = "newest", "earliest"
LOWEST, HIGHEST = "lowest", "highest"


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of one instance; times in instructions.

    Attributes:
        step: for each clock, the distance of the readings at which its alarms can go off.
        reach: how far ahead an alarm may lie.
        past, beyond: what becomes of one that lies behind, or beyond reach.
        again: which of two settings of the same alarm counts.
        first: the clock whose alarms come first in one moment.
        vcpus: which vCPU comes first then.
        most: how many go off in one moment.
    """

    step: dict[str, int]
    reach: int
    past: str
    beyond: str
    again: str
    first: str
    vcpus: str
    most: int

    def from_then_on(self, clock: str, at: int) -> int:
        """The first reading from ``at`` on at which an alarm can go off."""
        return -(-at // self.step[clock]) * self.step[clock]

    def place(self, alarm: tuple[int, str]) -> tuple[bool, int]:
        """Sorts the alarms of one moment."""
        vcpu, clock = alarm
        return clock != self.first, vcpu if self.vcpus == LOWEST else -vcpu


@dataclass(frozen=True, slots=True)
class Entry:
    """An alarm that stands.

    Attributes:
        due: what its clock reads when it goes off.
        story: how it came about, in words.
    """

    due: int
    story: str


class Ledger:
    """Which alarms stand, by the rules, after the calls so far."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._alarms: dict[tuple[int, str], Entry] = {}
        # What was last said of an alarm that is not set.
        self._gone: dict[tuple[int, str], str] = {}
        self._running: tuple[int, int] | None = None

    def problem(self, told: Told) -> str:
        """What is wrong at the next call, empty if nothing is."""
        late = self.missed(told.time)
        if late:
            return late
        if told.method == "set":
            self._set(*told.arguments)
        elif told.method == "run":
            vcpu, now, ran = told.arguments
            self._running = vcpu, now - ran
        elif told.method == "stop":
            self._running = None
        elif told.method == "expire":
            return self._expire(told)
        return ""

    def missed(self, now: float) -> str:
        """The alarm that should have gone off before ``now``."""
        moments = [(moment, alarm) for alarm in self._alarms if (moment := self._moment(alarm)) is not None]
        late = [found for found in moments if found[0] < now]
        if not late:
            return ""
        moment, alarm = min(late)
        return f"at instruction {moment} {self._told_of(alarm)} must go off; it did not"

    def _moment(self, alarm: tuple[int, str]) -> int | None:
        """The real time at which an alarm goes off, None if it cannot as things are."""
        vcpu, clock = alarm
        due = self._alarms[alarm].due
        if clock == REAL:
            return due
        return due + self._running[1] if self._running is not None and self._running[0] == vcpu else None

    def _set(self, vcpu: int, clock: str, at: int | None, now: int, ran: int) -> None:
        alarm, reading = (vcpu, clock), now if clock == REAL else ran
        if at is None:
            self._alarms.pop(alarm, None)
            self._gone[alarm] = f"taken away at instruction {now}"
            return
        fate, counted, why = COUNTS, at, ""
        if at <= reading:
            fate, counted, why = self._rules.past, reading + 1, f", in the past (the clock said {reading})"
        elif at > reading + self._rules.reach:
            fate, counted, why = self._rules.beyond, reading + self._rules.reach, f", beyond reach from {reading}"
        self._gone[alarm] = f"set to {at}{why} at instruction {now}"
        if fate == DROPS:
            self._alarms.pop(alarm, None)
        elif fate == COUNTS:
            self._enter(alarm, counted, f"set to {at}{why} at instruction {now}")

    def _enter(self, alarm: tuple[int, str], at: int, story: str) -> None:
        due = self._rules.from_then_on(alarm[1], at)
        before = self._alarms.get(alarm)
        if before is None or self._rules.again == NEWEST or due < before.due:
            self._alarms[alarm] = Entry(due, story)

    def _expire(self, told: Told) -> str:
        (now,) = told.arguments
        due = [alarm for alarm in self._alarms if (moment := self._moment(alarm)) is not None and moment <= now]
        due.sort(key=self._rules.place)
        off, later = due[: self._rules.most], due[self._rules.most :]
        if told.answer is not None and list(told.answer) != off:
            return self._wrong_off(off, later, told)
        for alarm in off:
            del self._alarms[alarm]
            self._gone[alarm] = f"gone off at instruction {now}"
        for alarm in later:
            entry = self._alarms[alarm]
            self._alarms[alarm] = replace(entry, due=entry.due + self._rules.step[alarm[1]])
        return ""

    def _wrong_off(self, off: Sequence[Any], later: Sequence[Any], told: Told) -> str:
        if not off:
            expected = "; ".join(["nothing goes off", *(self._told_of(alarm) for alarm in told.answer)])
        elif len(off) == 1:
            expected = f"{self._told_of(off[0])} must go off"
        else:
            expected = "there must go off, in this order: " + "; ".join(map(self._told_of, off))
        more = f" (and {len(later)} more a step later)" if later else ""
        return f"{told}\n{expected}{more}"

    def _told_of(self, alarm: tuple[int, str]) -> str:
        vcpu, clock = alarm
        name, entry = f"the alarm of vCPU {vcpu} on {clock} time", self._alarms.get(alarm)
        if entry is None:
            return f"{name} is not set: it was {self._gone.get(alarm, 'never set')}"
        return f"{name} ({entry.story}; the first step from then on is {entry.due})"


__all__ = [
    "COUNTS", "DROPS", "EARLIEST", "HIGHEST", "IGNORED", "LOWEST", "NEWEST", "REAL", "VIRTUAL", "Ledger", "Rules",
]  # fmt: skip
