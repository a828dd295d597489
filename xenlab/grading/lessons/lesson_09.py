"""Exercise 09: the two alarm timers, with clocks that go in steps and rules that the seed chooses.

The guests live by the clock: each domain follows a plan of alarms, work and sleep.  The part is told what they set and
who runs, and says what goes off when.  Whether that was right is found out afterwards, from the judge's own run.

Steps of both clocks are multiples of one number, so that guests can be made in which alarms of both meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm
from typing import Any

from xenlab import guests as sources
from xenlab.grading.alarms_slot import Scenario
from xenlab.grading.guests import ALARMS, Run, Slot
from xenlab.grading.instances import Choices
from xenlab.grading.lessons.alarm_ledger import (
    COUNTS,
    DROPS,
    EARLIEST,
    HIGHEST,
    IGNORED,
    LOWEST,
    NEWEST,
    REAL,
    VIRTUAL,
    Ledger,
    Rules,
)
from xenlab.grading.lessons.base import Finding, Guest, Plan

REAL_TIME, VIRTUAL_TIME, SETTING, TOGETHER = "09.1", "09.2", "09.3", "09.4"
BUDGET, SLICE = 60_000, 1_500
_FATES = (COUNTS, DROPS, IGNORED)
_PAST = {
    COUNTS: "it is taken as if it lay 1 instruction ahead on its clock",
    DROPS: "it is not set, and if there was an alarm of that vCPU on that clock, there is none any more",
    IGNORED: "nothing changes: if there was an alarm of that vCPU on that clock, it stands as before",
}
_LIKE_ANY_OTHER = (
    "\n\nAn alarm that is *taken as if it lay ahead* goes off at a step (rule 1), and meets one that is set already "
    "(rule 4), like any other."
)
_AGAIN = {
    NEWEST: "the new one takes its place",
    EARLIEST: "the one that would go off first counts, and the other one is forgotten",
}


class AlarmTimers:
    """Clocks with steps, a reach, and an order."""

    number = "09"
    title = "The two alarm timers"
    plan = (
        Plan(REAL_TIME, 3, "an alarm on real time goes off once, at the first step from its time on"),
        Plan(
            VIRTUAL_TIME,
            3,
            "an alarm on virtual time goes off once, at the step of its vCPU's own clock, while that runs",
        ),
        Plan(
            SETTING, 2, "an alarm set anew, taken away, in the past or beyond reach does what the rules say", REAL_TIME
        ),
        Plan(TOGETHER, 2, "alarms of one moment go off in the order of the rules, and not too many", REAL_TIME),
    )

    def __init__(self, seed: int) -> None:
        choices = Choices(seed, self.number)
        unit = choices.number("unit", 37, 59)
        real, virtual = choices.sample("steps", (2, 3, 4, 5), 2)
        past, beyond = choices.sample("fates", _FATES, 2)
        self.rules = Rules(
            {REAL: unit * real, VIRTUAL: unit * virtual},
            choices.number("reach", 12_000, 19_000),
            past,
            beyond,
            choices.pick("again", (NEWEST, EARLIEST)),
            choices.pick("first", (REAL, VIRTUAL)),
            choices.pick("vcpus", (LOWEST, HIGHEST)),
            choices.pick("most", (2, 3)),
        )
        # Filled as guests are made: a guest's name leads to what it runs with.
        self._scenarios: dict[str, Scenario] = {}
        self.slot = Slot(ALARMS, ("MyAlarms",), scenarios=self._scenarios)
        self.parameters: dict[str, Any] = {
            name: getattr(self.rules, name) for name in Rules.__dataclass_fields__ if name != "step"
        } | {"step": dict(self.rules.step)}

    def task(self) -> str:
        rules = self.rules
        second = VIRTUAL if rules.first == REAL else REAL
        beyond = _PAST[rules.beyond].replace("1 instruction", f"{rules.reach:,} instructions")
        counts = COUNTS in (rules.past, rules.beyond)
        return (
            "Your hypervisor's alarms:\n\n"
            f"1. **Steps.** An alarm on real time goes off when real time is a multiple of {rules.step[REAL]}, one on "
            f"virtual time when the virtual time of its vCPU is a multiple of {rules.step[VIRTUAL]}: at the first such "
            "reading at or after its time. A vCPU's virtual time stands still while it does not run. If the vCPU loses "
            "the CPU at the very reading at which its alarm is due, the alarm goes off as soon as the vCPU runs "
            "again.\n"
            "2. **The past.** If `at` is not greater than what the alarm's clock says when it is set, "
            f"{_PAST[rules.past]}.\n"
            f"3. **Reach.** If `at` is more than {rules.reach:,} ahead of what the alarm's clock says, {beyond}.\n"
            f"4. **Set anew.** If that vCPU has an alarm on that clock already, {_AGAIN[rules.again]}. `None` "
            "always takes it away.\n"
            f"5. **One moment.** Of all alarms that are due, at most {rules.most} go off in one moment: those on "
            f"{rules.first} time before those on {second} time, and among those of one clock that of the vCPU with the "
            f"{rules.vcpus} number first. "
            f"Each of the others becomes due one step of its clock later.{_LIKE_ANY_OTHER if counts else ''}"
        )

    # What the student's process and the judge run.

    def guest(self, check: str, name: str, *plans: str, turn: int = SLICE) -> Guest:
        """A domain for each plan, in turns of so many instructions."""
        self._scenarios[name] = {"plans": list(plans), "slice": turn, "budget": BUDGET}
        return Guest(check, name, sources.source("clocks"), ())

    def at(self, clock: str, time: int, before: int = 23) -> int:
        """A reading so many instructions before the first step of ``clock`` from ``time`` on."""
        return self.rules.from_then_on(clock, time) - before

    def meeting(self, time: int) -> int:
        """The first reading from ``time`` on that is a step of both clocks."""
        both = lcm(self.rules.step[REAL], self.rules.step[VIRTUAL])
        return -(-time // both) * both

    def real(self, *times: int, before: int = 23) -> str:
        """A plan: sleep until each of these times, one after the other."""
        return " ".join(f"R {self.at(REAL, time, before)} s" for time in times)

    def virtual(self, *times: int, before: int = 23) -> str:
        """A plan: alarms at each of these virtual times, and work until they have come."""
        return " ".join(f"V {self.at(VIRTUAL, time, before)} w 2000" for time in times)

    def guests(self) -> list[Guest]:
        setting = f"R 9000 w 900 R {self.at(REAL, 4_000)} R 1 w 4000 R {self.at(REAL, 14_000)} R 50000 s w 300 q"
        return [
            self.guest(REAL_TIME, "sleeper", f"{self.real(2_000, 4_500, 7_000)} q"),
            self.guest(VIRTUAL_TIME, "worker", f"{self.virtual(1_200, 4_000)} q", "w 20000 q"),
            self.guest(SETTING, "wavering", setting),
            self.guest(
                TOGETHER, "three", *(self.real(6_000, 9_000, before=number + 1) for number in range(3)), turn=600
            ),
        ]

    def examine(self, answer: dict[str, Any]) -> list[Finding]:
        raise NotImplementedError("the answer of exercise 09 is a part")

    def judge(self, guest: Guest, run: Run, decisions: Sequence[Any]) -> Finding:
        problem = self._problem(run)
        return Finding(guest.check, not problem, f"guest {guest.name!r}: {problem}" if problem else "")

    def _problem(self, run: Run) -> str:
        ledger = Ledger(self.rules)
        for told in run.told:
            problem = ledger.problem(told)
            if problem:
                return f"first wrong step: {_place(run, told)}\n{problem}"
        if run.problem:
            return f"first wrong step: {_place(run, run.told[-1])}\n{run.problem}" if run.told else run.problem
        # A machine that has nothing more to wait for has stopped early.
        missed = ledger.missed(run.xen.now if run.xen.now >= BUDGET else float("inf"))
        if missed:
            why = " already, for nothing was left to happen" if run.xen.now < BUDGET else ""
            return f"first wrong step: {missed}, and the run ended at instruction {run.xen.now}{why}"
        return "" if run.told else f"the part was never asked; {run.end()}"


def _place(run: Run, told: Any) -> str:
    if told.domid < 0:
        return f"instruction {told.time}, nobody runs"
    return f"domain {told.domid}, {run.step(told.time, told.eip)}"


def lesson(seed: int) -> AlarmTimers:
    """The exercise for a seed."""
    return AlarmTimers(seed)


__all__ = ["AlarmTimers", "lesson"]
