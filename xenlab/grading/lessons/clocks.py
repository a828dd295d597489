"""The rules of exercise 10, kept as clocks beside a run: where did a part first do something else?

Whether an answer is right is measured, not compared with ours.  But somebody whose shares are wrong wants to know at
which step it began.  So this keeps the clocks that the rules ask for, from what really ran, and finds the first turn
that was given to somebody whose clock was not the least.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from xenlab.grading.schedules import PICK, SLEEP, TOLD, WAKE, Call

PRICE, BASE, DOUBLING = "price", "base", "doubling"


@dataclass(frozen=True, slots=True)
class Rules:
    """What the seed chose.

    Attributes:
        law: what a weight says: PRICE, BASE or DOUBLING.
        base: what is added to each weight.
        step: by how much more weight a share is twice as large.
        turn: how long a turn is.
        credit: what a sleeper may have saved, in instructions of its own.
        window: so many instructions after a wake-up are borrowed, for one that has a warp.
        factor: how many times as fast the clock goes meanwhile.
    """

    law: str
    base: int
    step: int
    turn: int
    credit: int
    window: int
    factor: int

    def share(self, weight: int) -> Fraction:
        """How much of the CPU a weight asks for, in comparison with others."""
        match self.law:
            case "price":
                return Fraction(1, weight)
            case "base":
                return Fraction(weight + self.base)
            case _:
                return Fraction(1 << weight // self.step)

    def cost(self, weight: int) -> Fraction:
        """How far the clock goes in an instruction."""
        return 1 / self.share(weight)


@dataclass(slots=True)
class Clock:
    """One vCPU's."""

    cost: Fraction = Fraction(1)
    warp: int = 0
    time: Fraction = Fraction(0)
    runnable: bool = False
    left: int = 0

    @property
    def effective(self) -> Fraction:
        """What it competes with."""
        return self.time - self.warp * self.cost if self.left else self.time

    def run(self, instructions: int, rules: Rules) -> None:
        """It ran."""
        borrowed = min(instructions, self.left) if self.warp else 0
        self.left -= borrowed
        self.time += (instructions + borrowed * (rules.factor - 1)) * self.cost


@dataclass(frozen=True, slots=True)
class Astray:
    """A turn that was not the rules'."""

    time: int
    chosen: int
    expected: int
    clocks: Mapping[int, Fraction]


def first_astray(log: Sequence[Call], rules: Rules, after: int = 0) -> Astray | None:
    """The first turn from ``after`` on that began for somebody whose clock was not the least."""
    clocks: dict[int, Clock] = {}
    floor = Fraction(0)
    running: int | None = None
    since = 0
    for call in log:
        if running is not None:
            clocks[running].run(call.time - since, rules)
        since = call.time
        floor = max(floor, min((clock.time for clock in clocks.values() if clock.runnable), default=floor))
        if call.what != PICK:
            assert call.vcpu is not None
            _tell(clocks.setdefault(call.vcpu, Clock()), call, rules, floor)
            running = None if call.what == SLEEP and call.vcpu == running else running
        else:
            ready = {vcpu: clock.effective for vcpu, clock in clocks.items() if clock.runnable}
            if call.vcpu is not None and call.vcpu != running and call.time >= after:
                least = min(ready, key=lambda vcpu: (ready[vcpu], vcpu))
                if ready[call.vcpu] > ready[least]:
                    return Astray(call.time, call.vcpu, least, ready)
            running = call.vcpu
    return None


def _tell(clock: Clock, call: Call, rules: Rules, floor: Fraction) -> None:
    if call.what == TOLD:
        clock.cost, clock.warp = rules.cost(call.weight), call.warp
    elif call.what == WAKE:
        clock.time = max(clock.time, floor - rules.credit * clock.cost)
        clock.runnable, clock.left = True, rules.window
    else:
        clock.runnable = False


def told(astray: Astray) -> str:
    """In words, with the clocks in instructions of the least share."""

    def shown(vcpu: int) -> Any:
        return f"{float(astray.clocks[vcpu]):.6g}"

    return (
        f"first wrong step: instruction {astray.time}: pick gave vCPU {astray.chosen} a turn, whose clock by the rules "
        f"stood at {shown(astray.chosen)}, while that of vCPU {astray.expected} stood at {shown(astray.expected)}"
    )
