"""Borrowed Virtual Time: fair shares, and a quick answer to those who wait (paper 3.3.1; Duda and Cheriton, SOSP 1999).

The problem: shares and latency pull in different directions.  A domain that sleeps most of the time and then has to
answer at once, to a key or a packet, does not need more of the CPU than others, it needs it *now*.

Each vCPU has a clock of its own, its *actual virtual time* (AVT), which runs only while the vCPU does, and the faster
the smaller its weight.  Always to run the one whose clock is furthest behind gives each a share in proportion to its
weight.  Four additions make a scheduler of it:

* The *scheduler's virtual time* (SVT) is the least AVT of those that are runnable.  Whoever wakes is put forward to
  it, so that sleeping saves nothing up.
* A vCPU that wakes is *warped*: it competes with its *effective* virtual time, the AVT less its warp.  It borrows from
  its own future, because its clock runs on; after a while it is as far ahead as it had been set back.
* The *warp limit* is how long a vCPU may run warped, and the *unwarp requirement* how long it must then go without
  before it gets as much again.  Sleep is time without warp too.  So falling asleep just in time does not help.
* The *context-switch allowance*: whoever runs goes on until it is so many instructions ahead of the next one.  Without
  it two equal vCPUs would change places after each instruction.

A vCPU that yields lets the next one go first, and is put forward as if it had slept for a moment.

The invariant: among vCPUs that stay runnable without warp, no clock is ahead of another by more than its vCPU's
allowance.  What breaks without it: shares drift from the weights, and in the end somebody starves.

Clocks are whole numbers, and what a division leaves is carried over to the next one.  So the clock of a vCPU says the
same however its run was cut into turns.  Those that wait stand in sorted lists: without warp one is enough, since
there the two times are the same, and the few that are warped stand in two of their own.  Whoever runs stands in none,
since only its clock moves.  So a turn costs the same among two vCPUs and among hundreds.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from xenlab.errors import ScheduleError
from xenlab.hypervisor.schedulers.parameters import (
    DEFAULT_WEIGHT,
    MOST_INSTRUCTIONS,
    MOST_WEIGHT,
    Ranges,
    check_values,
    known,
)
from xenlab.hypervisor.schedulers.round_robin import DEFAULT_SLICE

DEFAULT_ALLOWANCE = 10_000
# Virtual time that one instruction takes at weight 1.  More than any weight, so that every instruction counts.
_UNIT = 1 << 20
_INSTRUCTION = _UNIT // DEFAULT_WEIGHT
_RANGES: Ranges = {
    "weight": (1, MOST_WEIGHT),
    "warp": (0, MOST_INSTRUCTIONS),
    "warp_limit": (0, MOST_INSTRUCTIONS),
    "unwarp": (0, MOST_INSTRUCTIONS),
}


@dataclass(slots=True)
class _Clock:
    """One vCPU.

    Attributes:
        weight: how much of the CPU it gets, in comparison with others.
        warp: how far it is set back when it wakes, in instructions of a vCPU of the default weight.
        warp_limit: for how many instructions it may run warped; 0 for no limit.
        unwarp: for how many instructions of time it must then not be warped.
        avt: its actual virtual time.
        rest: what the last division by the weight left.
        runnable: whether it wants to run.
        warped: whether it competes with less than its AVT.
        warped_for: how many instructions it ran warped since it last went without for as long as it must.
        unwarped_at: when it was last warped.
    """

    weight: int = DEFAULT_WEIGHT
    warp: int = 0
    warp_limit: int = 0
    unwarp: int = 0
    avt: int = 0
    rest: int = 0
    runnable: bool = False
    warped: bool = False
    warped_for: int = 0
    unwarped_at: int = 0

    @property
    def evt(self) -> int:
        """Its effective virtual time."""
        return self.avt - self.warp * _INSTRUCTION if self.warped else self.avt

    def put_forward(self, avt: int) -> None:
        """It has missed what was before ``avt``."""
        if avt > self.avt:
            self.avt, self.rest = avt, 0

    def set_back(self, now: int) -> None:
        """Warp it, if it may be."""
        if now - self.unwarped_at >= self.unwarp:
            self.warped_for = 0
        self.warped = self.warp > 0 and not self.is_at_limit()

    def is_at_limit(self) -> bool:
        return 0 < self.warp_limit <= self.warped_for

    def stop_warp(self, now: int) -> None:
        if self.warped:
            self.warped, self.unwarped_at = False, now


# Who waits: a time, effective or actual, the vCPU, its clock.
_Entry: TypeAlias = tuple[int, int, _Clock]


class Bvt:
    """Borrowed Virtual Time.

    Args:
        slice_instructions: the longest turn, in instructions.
        allowance: how far one that runs may get ahead of the next one, in instructions.

    Raises:
        ScheduleError: one of them is not a number of instructions from 1 on.
    """

    def __init__(self, slice_instructions: int = DEFAULT_SLICE, allowance: int = DEFAULT_ALLOWANCE) -> None:
        for name, value in (("slice_instructions", slice_instructions), ("allowance", allowance)):
            if type(value) is not int or value < 1:
                raise ScheduleError(f"Bvt, {name}: expected a whole number from 1 on, found {value!r:.80}")
        self._slice, self._allowance = slice_instructions, allowance * _UNIT
        self._vcpus: dict[int, _Clock] = {}
        self._unwarped: list[_Entry] = []
        self._warped_by_evt: list[_Entry] = []
        self._warped_by_avt: list[_Entry] = []
        self._running: tuple[int, _Clock] | None = None
        self._since = self._turn_end = self._svt = 0
        self._news = False

    def add(self, vcpu: int) -> None:
        """``vcpu`` exists; it gets the default weight and no warp."""
        self._vcpus.setdefault(vcpu, _Clock())

    def remove(self, vcpu: int) -> None:
        """``vcpu``, which sleeps, exists no more; another one may get its number."""
        self._vcpus.pop(vcpu, None)

    def wake(self, vcpu: int, now: int) -> None:
        self.add(vcpu)
        clock = self._vcpus[vcpu]
        if clock.runnable:
            raise ScheduleError(f"Bvt: expected a vCPU that sleeps to wake up, found {vcpu}, which is runnable")
        self._charge(now)
        self._update_svt()
        clock.runnable = True
        clock.put_forward(self._svt)
        clock.set_back(now)
        self._wait(vcpu, clock)
        self._news = True

    def sleep(self, vcpu: int, now: int) -> None:
        clock: _Clock = known(self, self._vcpus, vcpu)
        if not clock.runnable:
            raise ScheduleError(f"Bvt: expected a runnable vCPU to fall asleep, found {vcpu}, which sleeps")
        self._charge(now)
        self._update_svt()
        if self._runs(vcpu):
            self._running = None
        else:
            self._wait_no_more(vcpu, clock)
        clock.runnable = False
        clock.stop_warp(now)
        self._news = True

    def _runs(self, vcpu: int) -> bool:
        return self._running is not None and self._running[0] == vcpu

    def pick(self, now: int) -> tuple[int, int] | None:
        # Asked at each switch of the machine: it makes few calls of its own.
        self._charge(now)
        yields, self._news = not self._news and now < self._turn_end, False
        running, queue, ahead, length = self._running, self._unwarped, 0, self._slice
        first = self._first() if self._warped_by_evt else queue[0] if queue else None
        if first is not None and running is not None:
            ahead = self._ahead(running[1], first)
        if first is not None and (yields or running is None or ahead >= self._allowance):
            running = self._switch(first, now, yields)
            first = self._first() if self._warped_by_evt else queue[0] if queue else None
            ahead = self._ahead(running[1], first) if first is not None else 0
            if ahead > 0:
                ahead = 0  # one that has just been chosen has all of the allowance before it
        if running is None:
            return None
        if first is not None and (left := self._allowance - ahead) < length * _UNIT:
            length = -(-left // _UNIT)
        vcpu, clock = running
        if clock.warped and clock.warp_limit:
            length = min(length, clock.warp_limit - clock.warped_for)
        self._turn_end = now + length
        return vcpu, length

    def _first(self) -> _Entry:
        """Who waits with the least effective time, when some are warped."""
        return min(self._warped_by_evt[:1] + self._unwarped[:1])

    def _ahead(self, clock: _Clock, first: _Entry) -> int:
        """How far the running vCPU is ahead of the first that waits, in instructions of its own, times `_UNIT`."""
        evt = clock.evt if clock.warped else clock.avt
        return (evt - first[0]) * clock.weight + clock.rest

    def _switch(self, first: _Entry, now: int, yields: bool) -> tuple[int, _Clock]:
        """Let the first that waits run instead of who did."""
        before, (_evt, vcpu, clock) = self._running, first
        if before is not None and yields:
            before[1].put_forward(self._least_waiting())
        if clock.warped:
            self._wait_no_more(vcpu, clock)
        else:
            del self._unwarped[0]
        if before is not None:
            self._wait(*before)
        self._running = running = vcpu, clock
        self._since = now
        return running

    def _charge(self, now: int) -> None:
        """Let the clock of the one that runs go on to ``now``."""
        if self._running is None:
            return
        clock, ran, self._since = self._running[1], now - self._since, now
        gained, clock.rest = divmod(ran * _UNIT + clock.rest, clock.weight)
        clock.avt += gained
        if clock.warped:
            clock.warped_for += ran
            if clock.is_at_limit():
                clock.stop_warp(now)

    def _update_svt(self) -> None:
        """The least AVT of those that are runnable; what it last was if none is."""
        waiting = bool(self._unwarped or self._warped_by_avt)
        if self._running is not None:
            avt = self._running[1].avt
            self._svt = min(avt, self._least_waiting()) if waiting else avt
        elif waiting:
            self._svt = self._least_waiting()

    def _least_waiting(self) -> int:
        """The least AVT of those that wait; there are some."""
        if self._warped_by_avt:
            return min(self._warped_by_avt[:1] + self._unwarped[:1])[0]
        return self._unwarped[0][0]

    def _wait(self, vcpu: int, clock: _Clock) -> None:
        if clock.warped:
            insort(self._warped_by_evt, (clock.evt, vcpu, clock))
            insort(self._warped_by_avt, (clock.avt, vcpu, clock))
            return
        entry, queue = (clock.avt, vcpu, clock), self._unwarped
        if queue and entry < queue[-1]:
            insort(queue, entry)
        else:
            queue.append(entry)  # who has just had a turn is mostly the last

    def _wait_no_more(self, vcpu: int, clock: _Clock) -> None:
        if clock.warped:
            _take(self._warped_by_evt, (clock.evt, vcpu, clock))
            _take(self._warped_by_avt, (clock.avt, vcpu, clock))
        else:
            _take(self._unwarped, (clock.avt, vcpu, clock))

    @property
    def allowance(self) -> int:
        """The context-switch allowance, in instructions."""
        return self._allowance // _UNIT

    def clocks(self) -> dict[int, tuple[int, int]]:
        """Actual and effective virtual time of each vCPU at the last call, in instructions at the default weight."""
        return {vcpu: (clock.avt // _INSTRUCTION, clock.evt // _INSTRUCTION) for vcpu, clock in self._vcpus.items()}

    def parameters(self, vcpu: int) -> dict[str, int]:
        """What is set for ``vcpu``: weight, warp, warp_limit, unwarp.

        Raises:
            ScheduleError: there is no such vCPU.
        """
        clock = known(self, self._vcpus, vcpu)
        return {name: getattr(clock, name) for name in _RANGES}

    def set_parameters(self, vcpu: int, now: int, values: Mapping[str, int]) -> None:
        """Set some of them, from ``now`` on; a new warp holds from the next wake-up on.

        Raises:
            ScheduleError: no such vCPU, no such parameter or no such value; nothing is changed then.
        """
        clock: _Clock = known(self, self._vcpus, vcpu)
        check_values(self, vcpu, _RANGES, values)
        self._charge(now)
        waits = clock.runnable and not self._runs(vcpu)
        if waits:
            self._wait_no_more(vcpu, clock)
        self._set(clock, now, values)
        if waits:
            self._wait(vcpu, clock)
        self._news = True

    def _set(self, clock: _Clock, now: int, values: Mapping[str, int]) -> None:
        if values.get("weight", clock.weight) != clock.weight:
            clock.rest = 0  # it counts parts of the old weight
        if values.get("warp", clock.warp) != clock.warp:
            clock.stop_warp(now)
        for name, value in values.items():
            setattr(clock, name, value)
        if clock.is_at_limit():
            clock.stop_warp(now)

    def state(self) -> dict[str, Any]:
        return {
            "vcpus": {vcpu: asdict(clock) for vcpu, clock in self._vcpus.items()},
            "running": self._running and self._running[0],
            "times": (self._since, self._turn_end, self._svt),
            "news": self._news,
        }

    def load(self, state: dict[str, Any]) -> None:
        self._vcpus = {vcpu: _Clock(**values) for vcpu, values in state["vcpus"].items()}
        running, self._news = state["running"], state["news"]
        self._running = None if running is None else (running, self._vcpus[running])
        self._since, self._turn_end, self._svt = state["times"]
        for queue in (self._unwarped, self._warped_by_evt, self._warped_by_avt):
            queue.clear()
        for vcpu, clock in self._vcpus.items():
            if clock.runnable and vcpu != running:
                self._wait(vcpu, clock)


def _take(queue: list[_Entry], entry: _Entry) -> None:
    if queue[0][1] == entry[1]:
        del queue[0]
    else:
        del queue[bisect_left(queue, entry)]
