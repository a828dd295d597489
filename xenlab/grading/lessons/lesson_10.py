"""Exercise 10: a scheduler with virtual time, whose laws the seed chooses.

What is judged are numbers of a run: shares, what a sleeper may have saved, how soon one that borrows runs and what it
pays for that, how long anybody waits.  The laws differ from Borrowed Virtual Time as xenlab ships it in what a weight
means, in how far a sleeper is put forward and in what a warp costs, by more than the numbers may be off.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from xenlab import guests as sources
from xenlab.grading.guests import SCHEDULER, Run, Slot
from xenlab.grading.instances import Choices
from xenlab.grading.lessons.base import Finding, Guest, Plan
from xenlab.grading.lessons.clocks import BASE, DOUBLING, PRICE, Rules
from xenlab.grading.lessons.schedule_looks import Look, Looks
from xenlab.grading.schedules import PICK, Scenario
from xenlab.grading.timetable import timetable

SHARES, WAKING, WAITING, HUNDRED = "10.1", "10.2", "10.3", "10.4"
WITHOUT_END = 1_000_000_000
CLASSES = 4  # shares of 1, 2, 4 and 8
_AT_ONCE = 10


class BorrowedTime:
    """Virtual time with another law for weights, savings for sleepers, and a price for what is borrowed."""

    number = "10"
    title = "A scheduler"
    plan = (
        Plan(SHARES, 3, "each gets the share that its weight says, within 4 %, and turns have their length"),
        Plan(
            WAKING, 3, "who slept may have saved so much and no more; who borrows runs at once, and pays", needs=SHARES
        ),
        Plan(WAITING, 2, "the CPU is idle only when nobody can run, and nobody waits for ever", needs=SHARES),
        Plan(HUNDRED, 2, "shares and latency hold among a hundred domains", needs=SHARES),
    )

    def __init__(self, seed: int) -> None:
        choices = Choices(seed, self.number)
        turn = choices.number("turn", 400, 900)
        self.rules = Rules(
            law=choices.pick("law", (PRICE, BASE, DOUBLING)),
            base=choices.number("base", 60, 200),
            step=choices.number("step", 12, 40),
            turn=turn,
            credit=turn * choices.number("credit", 5, 9),
            window=turn * choices.number("window", 4, 7),
            factor=choices.number("factor", 2, 3),
        )
        self._choices, self.look = choices, Looks(self.rules)
        self._looks: dict[str, Look] = {}
        self._scenarios: dict[str, Scenario] = {}
        self.slot = Slot(SCHEDULER, ("MyScheduler",), scenarios=self._scenarios)
        own = {BASE: {"base": self.rules.base}, DOUBLING: {"step": self.rules.step}, PRICE: {}}[self.rules.law]
        self.parameters: dict[str, Any] = {
            "law": self.rules.law,
            **own,
            "turn": turn,
            "credit": self.rules.credit,
            "window": self.rules.window,
            "factor": self.rules.factor,
        }

    def task(self) -> str:
        rules = self.rules
        law = {
            PRICE: "is a **price**: a vCPU of twice the weight gets half as much (the share goes with 1 / weight)",
            BASE: f"counts from below zero: the share goes with weight + {rules.base}",
            DOUBLING: f"counts in **steps** of {rules.step}: the share goes with 2 ** (weight // {rules.step})",
        }[rules.law]
        return (
            f"1. **Weights.** A weight {law}. Each vCPU has a clock, which runs only while the vCPU does, and the "
            "faster the smaller its share: by 1 / share in an instruction.\n"
            f"2. **Turns.** Whoever is picked gets a turn of {rules.turn} instructions. When it is over, the runnable "
            "vCPU whose clock is furthest behind is picked, of equal ones the lower number. A `pick` in the middle of "
            "a turn, because somebody woke or was told something, lets the turn go on, unless rule 4 says otherwise.\n"
            "3. **Sleep.** The *floor* is the furthest that the least clock of all runnable vCPUs has ever come; it "
            f"never goes back. Whoever wakes further behind it than {rules.credit} instructions of its own would take "
            f"is put forward to there: **to the floor less {rules.credit} / share**. So much may be saved, no more.\n"
            f"4. **Borrowing.** A vCPU with a `warp` above 0 borrows the first {rules.window} instructions that it "
            "runs after each wake-up. As long as it has not used them up, it competes as if its clock were behind by "
            "what `warp` instructions of its own would take. If it wakes and is then furthest behind, it is picked at "
            "once. "
            f"Borrowed instructions are dear: each moves its clock **{rules.factor} times** as far. A turn ends when "
            "they are used up.\n\n"
            "Grading does not compare your answers with anybody else's. It measures the run: shares, savings, debts, "
            "and waits. Shares may be off by 4 %, the figure in the paper."
        )

    def weight(self, size: int) -> int:
        """A weight whose share is ``2 ** size`` times that of size 0."""
        choices, rules = self._choices, self.rules
        if rules.law == PRICE:
            return 8 * choices.number("price", 30, 60) >> size
        if rules.law == BASE:
            return (rules.base + choices.number("unit", 6, 40) << size) - rules.base
        return rules.step * size + choices.number(f"rest.{size}", 1, rules.step // 4)

    def row(self, size: int, work: int = 0, warp: int = 0) -> dict[str, int]:
        """A domain: works ``work`` instructions after each wake-up, or without end."""
        return {"work": work, "weight": self.weight(size), "warp": warp}

    def guest(
        self,
        check: str,
        name: str,
        domains: Sequence[dict[str, int]],
        turns: int,
        *looks: Look,
        keys: Iterable[tuple[int, int]] = (),
        sets: Iterable[tuple[int, int, int, int]] = (),
        then: Sequence[int] = (),
    ) -> Guest:
        """A scenario of so many turns, and what is looked at, in this order."""
        self._scenarios[name] = {
            "domains": list(domains),
            "keys": [list(key) for key in keys],
            "sets": [list(change) for change in sets],
            "then": list(then),
            "budget": turns * self.rules.turn,
        }
        return Guest(check, name, sources.source("worker"), looks)

    def guests(self) -> list[Guest]:
        turn, window = self.rules.turn, self.rules.window
        quarter, warp = turn // 4, 2 * self.rules.factor * window
        ones = [self.row(1)] * 3
        return [
            self.guest(SHARES, "four", [self.row(size) for size in range(CLASSES)], 1_000, self.look.shares()),
            self.guest(
                WAKING,
                "late-riser",
                [*ones, self.row(1, WITHOUT_END)],
                260,
                self.look.head_start(3),
                keys=[(60 * turn, 3)],
            ),
            self.guest(
                WAKING,
                "visitor",
                [*ones, self.row(1, quarter, warp)],
                300,
                self.look.latency(3, _AT_ONCE),
                self.look.in_one_go(3),
                keys=[(self.odd_time(number, 20), 3) for number in range(1, 14)],
            ),
            self.guest(
                WAITING,
                "naps",
                [self.row(1, quarter), self.row(2, turn)],
                40,
                self.look.conserved,
                then=[0, 1, 0, 0, 1],
            ),
            self.crowd("crowd", 6),
            self.guest(HUNDRED, "hundred", self.hundred(), 5_600, self.look.shares()),
        ]

    def odd_time(self, number: int, apart: int) -> int:
        """Some time near ``number`` times so many turns, when somebody is in the middle of one."""
        return self.rules.turn * apart * number + self._choices.number(f"odd.{number}", 30, 370)

    def hundred(self) -> list[dict[str, int]]:
        """A hundred that always work, of shares 1 and 2."""
        return [self.row(self._choices.number(f"one-of-{number}", 0, 1)) for number in range(100)]

    def crowd(self, name: str, sleepers: int) -> Guest:
        """One small one that always works among many that wake up all the time."""
        turn = self.rules.turn
        rows = [self.row(0), *(self.row(1 + number % 3, turn * (1 + number % 2)) for number in range(sleepers))]
        keys = [
            (self.odd_time(number, 1) + 7 * domid, domid)
            for number in range(1, 280)
            for domid in range(1, sleepers + 1)
            if (number + domid) % 2
        ]
        return self.guest(WAITING, name, rows, 300, self.look.conserved, self.look.waits, keys=keys)

    def examine(self, answer: dict[str, Any]) -> list[Finding]:
        raise NotImplementedError("the answer of exercise 10 is a part")

    def judge(self, guest: Guest, run: Run, decisions: Sequence[Any]) -> Finding:
        scenario = self._scenarios[guest.name]
        table = timetable(run.scheduled, run.xen.now)
        problem = f"first wrong step: {run.problem}" if run.problem else ""
        if not problem and not any(call.what == PICK for call in run.scheduled):
            problem = "the scheduler was never asked"
        for look in guest.steps:
            problem = problem or look(table, run, scenario)
        return Finding(guest.check, not problem, f"guest {guest.name!r}: {problem}" if problem else "")


def lesson(seed: int) -> BorrowedTime:
    """The exercise for a seed."""
    return BorrowedTime(seed)
