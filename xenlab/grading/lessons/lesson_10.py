"""Exercise 10: a scheduler with virtual time, whose laws the seed chooses.

What is judged are numbers of a run: shares, what a sleeper may have saved, how soon one that borrows runs and what it
pays for that, how long anybody waits.  The laws differ from Borrowed Virtual Time as xenlab ships it in what a weight
means, in how far a sleeper is put forward and in what a warp costs, by more than the numbers may be off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any

from xenlab import guests as sources
from xenlab.grading.guests import SCHEDULER, Run, Slot
from xenlab.grading.instances import Choices
from xenlab.grading.lessons.base import Finding, Guest, Plan
from xenlab.grading.lessons.clocks import BASE, DOUBLING, PRICE, Rules, first_astray, told
from xenlab.grading.schedules import PICK, TOLD, Scenario
from xenlab.grading.timetable import Timetable, Wait, timetable

SHARES, WAKING, WAITING, HUNDRED = "10.1", "10.2", "10.3", "10.4"
WITHOUT_END = 1_000_000_000
VCPUS = 32  # numbers of vCPUs that belong to one domain
CLASSES = 4  # shares of 1, 2, 4 and 8
_OFF = Fraction(4, 100)  # the paper's figure
_AT_ONCE = 10
_SLACK = Fraction(5, 2)  # turns by which clocks of equals may be apart at two moments

Look = Callable[[Timetable, Run, Scenario], str]


class BorrowedTime:
    """Virtual time with another law for weights, savings for sleepers, and a price for what is borrowed."""

    number = "10"
    title = "A scheduler"
    plan = (
        Plan(SHARES, 3, "each gets the share that its weight says, within 4 %, and turns have their length"),
        Plan(WAKING, 3, "who slept may have saved so much and no more; who borrows runs at once, and pays", needs=SHARES),
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
        self._choices = choices
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
            f"1. **Weights.** A weight {law}. Each vCPU has a clock, which runs only while the vCPU does, and the faster "
            "the smaller its share: by 1 / share in an instruction.\n"
            f"2. **Turns.** Whoever is picked gets a turn of {rules.turn} instructions. When it is over, the runnable "
            "vCPU whose clock is furthest behind is picked, of equal ones the lower number. A `pick` in the middle of "
            "a turn, because somebody woke or was told something, lets the turn go on, unless rule 4 says otherwise.\n"
            "3. **Sleep.** The *floor* is the furthest that the least clock of all runnable vCPUs has ever come; it never "
            f"goes back. Whoever wakes further behind it than {rules.credit} instructions of its own would take is put "
            f"forward to there: **to the floor less {rules.credit} / share**. So much may be saved, and no more.\n"
            f"4. **Borrowing.** A vCPU with a `warp` above 0 borrows the first {rules.window} instructions that it runs "
            "after each wake-up. As long as it has not used them up, it competes as if its clock were behind by what "
            "`warp` instructions of its own would take. If it wakes and is then furthest behind, it is picked at once. "
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
        return rules.step * size + choices.number(f"rest.{size}", 1, rules.step - 1)

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
            self.guest(SHARES, "four", [self.row(size) for size in range(CLASSES)], 1_000, self.shares()),
            self.guest(WAKING, "late-riser", [*ones, self.row(1, WITHOUT_END)], 260, self.head_start(3), keys=[(60 * turn, 3)]),
            self.guest(
                WAKING,
                "visitor",
                [*ones, self.row(1, quarter, warp)],
                300,
                self.latency(3, _AT_ONCE),
                self.in_one_go(3),
                keys=[(self.odd_time(number, 20), 3) for number in range(1, 14)],
            ),
            self.guest(WAITING, "naps", [self.row(1, quarter), self.row(2, turn)], 40, self.conserved, then=[0, 1, 0, 0, 1]),
            self.crowd("crowd", 6),
            self.guest(HUNDRED, "hundred", self.hundred(), 5_600, self.shares()),
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
        return self.guest(WAITING, name, rows, 300, self.conserved, self.waits, keys=keys)

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

    # What is looked at.

    def shares(self, start: int = 0, end: int = 0) -> Look:
        """Shares between two times, counted in turns, of those that always work."""

        def look(table: Timetable, run: Run, scenario: Scenario) -> str:
            begin, until = start * self.rules.turn, end * self.rules.turn or table.end
            weights = self._weights(run, begin)
            always = [n for n, row in enumerate(scenario["domains"]) if not row["work"]]
            ran = {number: table.ran(number * VCPUS, begin, until) for number in always}
            wanted = {number: self.rules.share(weights[number * VCPUS]) for number in always}
            return self._off(run, ran, wanted, begin)

        return look

    def _off(self, run: Run, ran: dict[int, int], wanted: dict[int, Fraction], begin: int) -> str:
        total, parts = sum(ran.values()), sum(wanted.values())
        worst = max(wanted, key=lambda number: abs(ran[number] / (wanted[number] * total / parts or 1) - 1))
        expected = wanted[worst] * total / parts
        if abs(ran[worst] - expected) <= _OFF * expected:
            return ""
        return (
            f"vCPU {worst * VCPUS} ran {ran[worst]:,} of {total:,} instructions; by its weight it should have had "
            f"{round(expected):,}, and may be off by 4 %{self._astray(run, begin)}"
        )

    def _weights(self, run: Run, time: int) -> dict[int, int]:
        return {
            call.vcpu: call.weight
            for call in run.scheduled
            if call.what == TOLD and call.vcpu is not None and call.time <= time
        }

    def _astray(self, run: Run, begin: int) -> str:
        astray = first_astray(run.scheduled, self.rules, begin)
        return f"\n{told(astray)}" if astray else ""

    def lengths(self, table: Timetable, run: Run, _scenario: Scenario) -> str:
        """Nobody is taken off the CPU before its turn is over, and no turn is longer."""
        turn = self.rules.turn
        for call in run.scheduled:
            if call.what == PICK and call.length > turn:
                return (
                    f"first wrong step: instruction {call.time}: pick gave vCPU {call.vcpu} {call.length} instructions; "
                    f"a turn has {turn}"
                )
        short = next((found for found in table.turns if not found.cut and found.length < turn), None)
        if short is None:
            return ""
        return (
            f"first wrong step: instruction {short.end}: vCPU {short.vcpu}, whose turn began at {short.start}, lost the "
            f"CPU after {short.length} instructions; a turn has {turn}"
        )

    def head_start(self, domid: int, *, borrowed: bool = False) -> Look:
        """What a sleeper that then works without end gets more than its equals, who all work all the time."""

        def look(table: Timetable, run: Run, scenario: Scenario) -> str:
            rules, vcpu = self.rules, domid * VCPUS
            waits = [wait for wait in table.after_waking(vcpu) if wait.start > 0]
            if not waits:
                return f"vCPU {vcpu} never woke"
            woke = waits[0].start
            others = [number * VCPUS for number, row in enumerate(scenario["domains"]) if not row["work"]]
            ran = table.ran(vcpu, woke, table.end)
            theirs = Fraction(sum(table.ran(other, woke, table.end) for other in others), len(others))
            expected = rules.credit - (rules.factor - 1) * rules.window * borrowed
            if abs(ran - theirs - expected) <= _SLACK * rules.turn:
                return ""
            saved = f"saved {rules.credit}" + (
                f" and paid {rules.factor} for each of {rules.window} that it borrowed" if borrowed else ""
            )
            return (
                f"vCPU {vcpu} slept until instruction {woke}; from then on it ran {ran:,} and each of its equals "
                f"{round(theirs):,} instructions, so {round(ran - theirs):+,} for it; it {saved}: expected "
                f"{expected:+,}, within {float(_SLACK):g} turns{self._astray(run, woke)}"
            )

        return look

    def latency(self, domid: int, most: int) -> Look:
        """How long a vCPU waits when it wakes."""

        def look(table: Timetable, run: Run, scenario: Scenario) -> str:
            waits = [wait for wait in table.after_waking(domid * VCPUS) if wait.start > 0]
            late = next((wait for wait in waits if wait.length > most), None)
            if not waits:
                return f"vCPU {domid * VCPUS} never woke"
            if late is None:
                return ""
            warp = scenario["domains"][domid]["warp"]
            return (
                f"first wrong step: vCPU {late.vcpu} (warp {warp}) woke at instruction {late.start} and "
                f"{_until(late)}; expected at most {most} instructions"
            )

        return look

    def in_one_go(self, domid: int) -> Look:
        """What is borrowed is had at once: nobody comes between."""

        def look(table: Timetable, run: Run, scenario: Scenario) -> str:
            vcpu, work = domid * VCPUS, scenario["domains"][domid]["work"]
            starts = {wait.end for wait in table.after_waking(vcpu) if wait.start > 0}
            least = min(work, self.rules.window)
            for turn in table.turns:
                if turn.vcpu == vcpu and turn.start in starts and turn.length < min(least, table.end - turn.start):
                    return (
                        f"first wrong step: instruction {turn.end}: vCPU {vcpu}, which woke at {turn.start}, lost the CPU "
                        f"after {turn.length} instructions; expected {least} in one go, which it borrows{self._astray(run, 0)}"
                    )
            return ""

        return look

    def paid(self, domid: int) -> Look:
        """One that wakes all the time gets no more than its share, what it may borrow and what it may have saved."""

        def look(table: Timetable, run: Run, scenario: Scenario) -> str:
            rules, vcpu = self.rules, domid * VCPUS
            others = [number * VCPUS for number, row in enumerate(scenario["domains"]) if not row["work"]]
            ran = table.ran(vcpu, 0, table.end)
            theirs = Fraction(sum(table.ran(other, 0, table.end) for other in others), len(others))
            warp = scenario["domains"][domid]["warp"]
            most = (theirs + warp + rules.credit + (rules.factor + 1) * rules.turn) / rules.factor
            least = Fraction(3, 4) * theirs / rules.factor
            if least <= ran <= most:
                return ""
            return (
                f"vCPU {vcpu} borrows all the time: it ran {ran:,} instructions, each of its equals {round(theirs):,}; "
                f"expected {round(least):,} to {round(most):,}{self._astray(run, 0)}"
            )

        return look

    def conserved(self, _table: Timetable, run: Run, scenario: Scenario) -> str:
        """The machine went on to the end; that the CPU is never left idle is checked at each answer."""
        if run.xen.now >= scenario["budget"] or not any(not row["work"] for row in scenario["domains"]):
            return ""
        return f"the run ended at instruction {run.xen.now:,}, before {scenario['budget']:,}"

    def waits(self, table: Timetable, run: Run, scenario: Scenario) -> str:
        """Nobody waits longer than the clocks of all others can keep it waiting."""
        for wait in sorted(table.waits, key=lambda wait: wait.end):
            most = self._longest_wait(wait.vcpu // VCPUS, scenario["domains"])
            if wait.length > most:
                return (
                    f"first wrong step: vCPU {wait.vcpu} became ready to run at instruction {wait.start} and "
                    f"{_until(wait)}; nobody may wait for more than {round(most):,} here{self._astray(run, wait.start)}"
                )
        return ""

    def _longest_wait(self, mine: int, rows: Sequence[dict[str, int]]) -> Fraction:
        """Each other one may run until its clock has passed mine, and then for a turn more."""
        rules, share = self.rules, [self.rules.share(row["weight"]) for row in rows]
        ahead = rules.factor * (rules.window + rules.turn) if rows[mine]["warp"] else rules.turn
        return sum(
            (
                ahead * share[other] / share[mine]
                + rules.turn
                + (rules.credit if row["work"] else 0)
                + (row["warp"] + rules.window if row["warp"] else 0)
                for other, row in enumerate(rows)
                if other != mine
            ),
            Fraction(0),
        )


def _until(wait: Wait) -> str:
    return f"ran {wait.length:,} instructions later" if wait.served else f"did not run in {wait.length:,} instructions"


def lesson(seed: int) -> BorrowedTime:
    """The exercise for a seed."""
    return BorrowedTime(seed)
