"""What is measured of a run in exercise 10: shares, savings, debts, waits; and in words where it went wrong.

Each look takes a run and says what is wrong, or nothing.  How far a number may be off follows from turns: at any moment
the clocks of two vCPUs that always work may be a turn apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

from xenlab.grading.guests import Run
from xenlab.grading.lessons.clocks import Rules, first_astray, told
from xenlab.grading.schedules import PICK, TOLD, VCPUS, Scenario
from xenlab.grading.timetable import Timetable, Wait

_OFF = Fraction(4, 100)  # the paper's figure
_SLACK = Fraction(5, 2)  # turns by which clocks of equals may be apart at two moments

Look = Callable[[Timetable, Run, Scenario], str]


class Looks:
    """What can be looked at under the rules of an instance."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules

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
        worst = max(wanted, key=lambda number: abs(Fraction(ran[number]) / wanted[number] - Fraction(total) / parts))
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
                    f"first wrong step: instruction {call.time}: pick gave vCPU {call.vcpu} {call.length} "
                    f"instructions; a turn has {turn}"
                )
        short = next((found for found in table.turns if not found.cut and found.length < turn), None)
        if short is None:
            return ""
        return (
            f"first wrong step: instruction {short.end}: vCPU {short.vcpu}, whose turn began at {short.start}, lost "
            f"the CPU after {short.length} instructions; a turn has {turn}"
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
                        f"first wrong step: instruction {turn.end}: vCPU {vcpu}, which woke at {turn.start}, lost "
                        f"the CPU after {turn.length} instructions; expected {least} in one go, which it borrows"
                        f"{self._astray(run, 0)}"
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


__all__ = ["Look", "Looks"]
