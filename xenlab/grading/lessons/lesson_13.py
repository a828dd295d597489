"""Exercise 13: who gets memory when it is short, and what a balloon driver does, by rules that the seed chooses.

Two kinds of guests.  In the first kind one guest's driver asks the student's part each time that its target or its own
kernel wants something of it.  In the second kind several guests with drivers of ours follow the targets of the
student's policy.  Each answer is held against the rules of the task, one rule after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from xenlab import guests as sources
from xenlab.grading.balloons import Asked, Scenario
from xenlab.grading.guests import BALLOON, Run, Slot
from xenlab.grading.instances import Choices
from xenlab.grading.lessons.base import Finding, Guest, Plan
from xenlab.hypervisor.trace import Event, Kind
from xenlab.toolstack.balloon import Row

DRIVER, ORDER, LIMITS, REST = "13.1", "13.2", "13.3", "13.4"
_INTERVAL, _BUDGET, _DRIVER_BUDGET = 4_000, 180_000, 90_000
_ORDERS: dict[str, Callable[[Row, int], int]] = {
    "the one that wants fewest pages first": lambda row, want: want,
    "the one that wants most pages first": lambda row, want: -want,
    "the one that lacks most (wants minus has) first": lambda row, want: row["have"] - want,
    "the one with the largest minimum first": lambda row, want: -row["least"],
}
_FREE, _DEALT = "stays free", "goes to the domains in the same order, each up to its maximum"
_ASK = """decide: mov edx, [store]
        mov ebx, [edx + TARGET]
        mov ecx, [have]
        xor eax, eax
        mov edx, [missing]
        cmp edx, [free]
        ja  ask
        cmp ebx, ecx
        je  silent
ask:    mov edx, [free]
        mov esi, [missing]
        mov eax, {number}
        int 0x82
silent: ret

"""


class Ballooning:
    """A policy with a reserve, headroom and an order of service; a driver with a margin and a step."""

    number = "13"
    title = "The balloon policy"
    plan = (
        Plan(DRIVER, 3, "the driver gets and gives back what the rules say, whenever it is asked"),
        Plan(ORDER, 3, "a domain gets more than its minimum only when all before it have what they want"),
        Plan(LIMITS, 2, "no target is below a minimum or above a maximum, and the reserve is in none", needs=ORDER),
        Plan(REST, 2, "what nobody wants goes where the rules say", needs=ORDER),
    )

    def __init__(self, seed: int) -> None:
        choices = Choices(seed, self.number)
        self.reserve = choices.number("reserve", 12, 60)
        self.headroom = choices.pick("headroom", (4, 5, 8, 10))
        self.order = choices.pick("order", tuple(_ORDERS))
        self.rest = choices.pick("rest", (_FREE, _DEALT))
        self.margin = choices.number("margin", 3, 9)
        self.keep = choices.number("keep", 3, 9)
        self.step = choices.number("step", 6, 14)
        self.extra = choices.number("extra", 1, 4)
        self.call = choices.number("call", 40, 55)
        # Filled as guests are made: a guest's name leads to what it runs with.
        self._scenarios: dict[str, Scenario] = {}
        self.slot = Slot(BALLOON, ("MyBalloon",), self.call, self._scenarios)
        self.parameters: dict[str, Any] = {
            "reserve": self.reserve,
            "headroom": self.headroom,
            "order": self.order,
            "rest": self.rest,
            "margin": self.margin,
            "keep": self.keep,
            "step": self.step,
            "extra": self.extra,
        }

    def task(self) -> str:
        return (
            "**The driver**, `change(self, target, have, free, missing)`: how many pages to get, or below zero to give "
            "back. `free` pages of the guest's own are unused, `missing` will be asked for at once. The first rule "
            "that fits counts:\n\n"
            f"1. `missing` is more than `free`: get the difference and {self.extra} more, whatever the target.\n"
            f"2. `target` and `have` are less than {self.margin} pages apart: 0.\n"
            "3. `target` is above `have`: get the difference.\n"
            f"4. Otherwise give back the difference, but so that `missing` and {self.keep} more pages stay free.\n\n"
            f"In all cases at most {self.step} pages at a time.\n\n"
            "**The policy**, `targets(self, free, domains)`: a target for each domain, by `domid`.\n\n"
            f"1. A domain *wants* its `need` and `need // {self.headroom}` more, but not less than its `least` "
            "and not more than its `most`.\n"
            f"2. There are to deal out: all that the domains have, and `free`, less a reserve of {self.reserve} pages. "
            "(It is always enough for all minima.)\n"
            "3. Everybody gets its minimum. Then, one after the other, each gets up to what it wants, as long as pages "
            f"last: **{self.order}**, of equal ones the lower `domid` first.\n"
            f"4. What is left then **{self.rest}**."
        )

    # What the student's process and the judge run.

    def driver(self, name: str, plan: str, tell: Sequence[tuple[int, int]], most: int = 400) -> Guest:
        """One guest whose driver asks the part; targets come from outside at their times."""
        domains = [{"plan": plan, "least": 1, "most": most}]
        told = [[time, 0, pages] for time, pages in tell]
        self._scenarios[name] = {"domains": domains, "interval": 0, "tell": told, "budget": _DRIVER_BUDGET}
        text = sources.source("balloon")
        before, behind = text.split("decide:", 1)
        asking = before + _ASK.format(number=self.call) + "give_back:" + behind.split("give_back:", 1)[1]
        return Guest(DRIVER, name, asking.replace(".set SPIN, 150", ".set SPIN, 600"), ())

    def policy(self, check: str, name: str, *domains: tuple[str, int, int]) -> Guest:
        """Several guests, each with a plan, a minimum and a maximum; targets come from the part."""
        rows = [{"plan": plan, "least": least, "most": most} for plan, least, most in domains]
        self._scenarios[name] = {"domains": rows, "interval": _INTERVAL, "tell": [], "budget": _BUDGET}
        return Guest(check, name, sources.source("balloon"), ())

    def guests(self) -> list[Guest]:
        return [
            self.driver("told", "2: 5x999", ((15_000, 200), (50_000, 230))),
            self.policy(ORDER, "two-want", ("8: 500x999", 60, 500), ("8: 450x999", 90, 500)),
            self.policy(LIMITS, "modest", ("6: 20x40", 40, 300), ("6: 30x40", 60, 90)),
            self.policy(REST, "little-wanted", ("6: 30x999", 40, 300), ("6: 120x999", 60, 200)),
        ]

    def examine(self, answer: dict[str, Any]) -> list[Finding]:
        raise NotImplementedError("the answer of exercise 13 is a part")

    def judge(self, guest: Guest, run: Run, decisions: Sequence[Any]) -> Finding:
        problem = self._driver_problem(run) if guest.check == DRIVER else self._policy_problem(guest.check, run)
        if not problem and run.problem:
            problem = run.problem
        ended = [domain.report.splitlines()[0] for domain in run.xen.domains.values() if domain.crashed]
        if not problem and ended:
            problem = ended[0]
        return Finding(guest.check, not problem, f"guest {guest.name!r}: {problem}" if problem else "")

    # The driver.

    def _driver_problem(self, run: Run) -> str:
        calls = [event for event in run.of(Kind.HYPERCALL) if event.number == self.call]
        answers = [event.result for event in run.of(Kind.RETURN) if event.number == self.call]
        if not calls:
            return f"the driver was never asked; {run.end()}"
        for number, call in enumerate(calls):
            if number >= len(answers):
                return f"{_asked_driver(call)}: {run.problem or 'no answer'}"
            rule = self._broken_driver_rule(call, _signed(answers[number]))
            if rule:
                return f"first wrong step: {_asked_driver(call)}\n{rule}, found {_signed(answers[number])}"
        return ""

    def _broken_driver_rule(self, call: Event, found: int) -> str:
        target, have, free, missing = _driver_arguments(call)
        if missing > free:
            rule, pages = f"out of memory: the difference and {self.extra} more", missing - free + self.extra
        elif abs(target - have) < self.margin:
            rule, pages = f"less than {self.margin} pages apart", 0
        elif target > have:
            rule, pages = "below its target", target - have
        else:
            spare = max(free - missing - self.keep, 0)
            rule, pages = f"above its target, {self.keep} pages and what is missing stay", -min(have - target, spare)
        expected = max(-self.step, min(self.step, pages))
        return "" if found == expected else f"{rule}, at most {self.step} at a time: expected {expected}"

    # The policy.

    def _policy_problem(self, check: str, run: Run) -> str:
        if not run.asked:
            return run.problem or f"the policy was never asked; {run.end()}"
        look = {LIMITS: self._broken_limits, ORDER: self._broken_order, REST: self._broken_rest}[check]
        for asked in run.asked:
            for rule in look(asked):
                return f"first wrong step: instruction {asked.time}, {_asked_policy(asked)}\n{rule}"
        return ""

    def _wants(self, asked: Asked) -> dict[int, int]:
        return {row["domid"]: self._want(row) for row in asked.domains}

    def _want(self, row: Row) -> int:
        wanted = row["need"] + row["need"] // self.headroom
        return min(max(wanted, row["least"]), row["most"])

    def _available(self, asked: Asked) -> int:
        return asked.free + sum(row["have"] for row in asked.domains) - self.reserve

    def _in_order(self, asked: Asked) -> list[Row]:
        wants, key = self._wants(asked), _ORDERS[self.order]
        return sorted(asked.domains, key=lambda row: (key(row, wants[row["domid"]]), row["domid"]))

    def _broken_limits(self, asked: Asked) -> Iterator[str]:
        for row in asked.domains:
            domid, least, most = row["domid"], row["least"], row["most"]
            if domid not in asked.targets:
                yield f"domain {domid} got no target"
            elif not least <= asked.targets[domid] <= most:
                yield f"domain {domid} must get {least} to {most} pages, found {asked.targets[domid]}"
        dealt, there = sum(asked.targets.values()), self._available(asked)
        if dealt > there:
            yield f"{there} pages are there without the reserve of {self.reserve}; the targets are {dealt}"

    def _broken_order(self, asked: Asked) -> Iterator[str]:
        yield from self._broken_limits(asked)
        wants, row_before = self._wants(asked), None
        for row in self._in_order(asked):
            want, target = wants[row["domid"]], asked.targets[row["domid"]]
            if row_before is not None and target > row["least"]:
                yield (
                    f"domain {row_before['domid']} wants {wants[row_before['domid']]} and comes before domain "
                    f"{row['domid']} ({self.order}): it must have that before domain {row['domid']} gets "
                    f"more than its minimum of {row['least']}; found {asked.targets[row_before['domid']]} and {target}"
                )
            if row_before is None and target < want:
                row_before = row
        short = [row["domid"] for row in asked.domains if asked.targets[row["domid"]] < wants[row["domid"]]]
        dealt, there = sum(asked.targets.values()), self._available(asked)
        if short and dealt < there:
            yield f"domain {short[0]} does not get what it wants while {there - dealt} pages are left"

    def _broken_rest(self, asked: Asked) -> Iterator[str]:
        yield from self._broken_order(asked)
        wants, targets = self._wants(asked), asked.targets
        dealt, there = sum(targets.values()), self._available(asked)
        above = [row for row in self._in_order(asked) if targets[row["domid"]] > wants[row["domid"]]]
        if self.rest == _FREE:
            for row in above:
                yield f"domain {row['domid']} wants {wants[row['domid']]} pages: expected no more, the rest {_FREE}"
            return
        below = [row for row in self._in_order(asked) if targets[row["domid"]] < row["most"]]
        if below and dealt < there:
            yield f"{there - dealt} pages are left while domain {below[0]['domid']} is below its maximum"
        for row in above:
            earlier = self._in_order(asked)[: self._in_order(asked).index(row)]
            for before in earlier:
                if targets[before["domid"]] < before["most"]:
                    yield (
                        f"domain {row['domid']} gets of the rest while domain {before['domid']}, which comes before it "
                        f"({self.order}), is below its maximum"
                    )


def _signed(value: int) -> int:
    value &= 0xFFFF_FFFF
    return value - (value >> 31 << 32)


def _driver_arguments(call: Event) -> tuple[int, int, int, int]:
    _eax, ecx, edx, ebx, _esp, _ebp, esi, _edi = call.registers
    return ebx, ecx, edx, esi


def _asked_driver(call: Event) -> str:
    target, have, free, missing = _driver_arguments(call)
    return f"instruction {call.time}, change(target={target}, have={have}, free={free}, missing={missing})"


def _asked_policy(asked: Asked) -> str:
    rows = "; ".join(
        f"domain {row['domid']}: least {row['least']}, most {row['most']}, has {row['have']}, needs {row['need']}"
        for row in asked.domains
    )
    return f"{asked.free} pages free; {rows}"


def lesson(seed: int) -> Ballooning:
    """The exercise for a seed."""
    return Ballooning(seed)
