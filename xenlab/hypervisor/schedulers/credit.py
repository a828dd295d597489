"""The credit scheduler, which followed Borrowed Virtual Time in Xen: shares by bookkeeping (compare paper 3.3.1).

The problem is the same as in `bvt`, with less machinery and a coarser answer.  Time is money: at the end of each
*period* as many instructions as it had are handed out as credit, in proportion to the weights, and to run costs one
credit an instruction.  Whoever has credit left is UNDER its share, whoever is in debt is OVER it.  All of the first
kind go before all of the second, each kind in turn.

A vCPU that wakes while it is UNDER its share gets a BOOST: it goes before both, for one short turn.  That is the whole
answer to latency.  A vCPU that has used up its credit waits like any other, and one that never sleeps never gets it.

The invariant: what is handed out in a period is exactly the period, and whoever sleeps keeps no more than that much.
What breaks without it: if less is handed out all sink into debt, and weights no longer count; without the bound one
that slept for an hour could run for an hour.

Only those earn that were runnable in the period, and of them those that slept for a part of it only while they are in
debt: what they would not use goes to the others.  To hand out takes time in proportion to the number of vCPUs,
once a period; to pick does not.  Xen's caps, by which a domain may be kept from an idle CPU, do not fit our interface:
it wants somebody to run whenever somebody can.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from xenlab.errors import ScheduleError
from xenlab.hypervisor.schedulers.parameters import DEFAULT_WEIGHT, MOST_WEIGHT, Ranges, check_values, known
from xenlab.hypervisor.schedulers.round_robin import DEFAULT_SLICE

_RANGES: Ranges = {"weight": (1, MOST_WEIGHT)}
_BOOST, _UNDER, _OVER = range(3)
# Credit is counted in parts of an instruction: rounded to whole ones, the share of a small weight would be too far off.
_PARTS = 1 << 20
_BOOSTED_PART = 3  # a boosted turn is so many times shorter


@dataclass(slots=True)
class _Account:
    """One vCPU.

    Attributes:
        weight: its part of what is handed out, in comparison with others.
        credit: how much it may still run, in parts of an instruction; a debt if below 0.
        runnable: whether it wants to run.
        boosted: whether it woke up and had no turn since.
        earns: whether it was runnable since credit was last handed out.
        slept: whether it was not, for some of that time.
    """

    weight: int = DEFAULT_WEIGHT
    credit: int = 0
    runnable: bool = False
    boosted: bool = False
    earns: bool = False
    slept: bool = False

    @property
    def priority(self) -> int:
        """The lowest goes first."""
        return _BOOST if self.boosted else _UNDER if self.credit >= 0 else _OVER

    @property
    def gets_a_part(self) -> bool:
        """Whether it is given some of what is handed out; one that slept only if it is in debt."""
        return self.earns and (not self.slept or self.credit < 0)


class Credit:
    """Xen's credit scheduler for one CPU.

    Args:
        slice_instructions: the length of a turn and of a period, in instructions.

    Raises:
        ScheduleError: that is not a whole number from 1 on.
    """

    def __init__(self, slice_instructions: int = DEFAULT_SLICE) -> None:
        if type(slice_instructions) is not int or slice_instructions < 1:
            raise ScheduleError(
                f"Credit, slice_instructions: expected a whole number from 1 on, found {slice_instructions!r:.80}"
            )
        self._slice = slice_instructions
        self._vcpus: dict[int, _Account] = {}
        self._queues: tuple[deque[int], deque[int], deque[int]] = (deque(), deque(), deque())
        self._running: int | None = None
        self._since = self._turn_end = self._period_start = 0
        self._news = False

    def add(self, vcpu: int) -> None:
        """``vcpu`` exists; it gets the default weight."""
        self._vcpus.setdefault(vcpu, _Account())

    def remove(self, vcpu: int) -> None:
        """``vcpu``, which sleeps, exists no more; another one may get its number."""
        self._vcpus.pop(vcpu, None)

    def wake(self, vcpu: int, now: int) -> None:
        self.add(vcpu)
        account = self._vcpus[vcpu]
        if account.runnable:
            raise ScheduleError(f"Credit: expected a vCPU that sleeps to wake up, found {vcpu}, which is runnable")
        self._charge(now)
        account.runnable = account.earns = True
        account.boosted = account.credit >= 0
        self._queues[account.priority].append(vcpu)
        self._news = True

    def sleep(self, vcpu: int, now: int) -> None:
        account: _Account = known(self, self._vcpus, vcpu)
        if not account.runnable:
            raise ScheduleError(f"Credit: expected a runnable vCPU to fall asleep, found {vcpu}, which sleeps")
        self._charge(now)
        if vcpu == self._running:
            self._running = None
        else:
            self._queues[account.priority].remove(vcpu)
        account.runnable, account.boosted, account.slept = False, False, True
        account.credit = min(account.credit, self._slice * _PARTS)
        self._news = True

    def pick(self, now: int) -> tuple[int, int] | None:
        self._charge(now)
        queue = next((queue for queue in self._queues if queue), None)
        goes_on = self._running is not None and (queue is None or self._goes_on(now, queue[0]))
        self._news = False
        if not goes_on:
            if queue is None:
                return None
            self._switch(now, queue.popleft())
        elif now >= self._turn_end:
            self._turn_end = now + self._slice
        assert self._running is not None
        return self._running, self._turn_end - now

    def _goes_on(self, now: int, first: int) -> bool:
        """Whether the running vCPU stays though ``first`` waits; one that yields, before its turn is over, does not."""
        assert self._running is not None
        mine, others = self._vcpus[self._running].priority, self._vcpus[first].priority
        return mine < others if now >= self._turn_end else self._news and mine <= others

    def _switch(self, now: int, chosen: int) -> None:
        if self._running is not None:
            account = self._vcpus[self._running]
            account.boosted = False
            self._queues[account.priority].append(self._running)
        boosted = self._vcpus[chosen].boosted
        self._running, self._since = chosen, now
        self._turn_end = now + (max(1, self._slice // _BOOSTED_PART) if boosted else self._slice)

    def _charge(self, now: int) -> None:
        """Let the one that runs pay up to ``now``, and hand out if a period is over."""
        if self._running is not None:
            account = self._vcpus[self._running]
            account.credit -= (now - self._since) * _PARTS
            self._since = now
            if now >= self._turn_end:
                account.boosted = False
        if now - self._period_start >= self._slice:
            # No turn is longer than a period, so of several that are over the CPU was idle in all but one.
            self._period_start = now - (now - self._period_start) % self._slice
            self._hand_out()

    def _hand_out(self) -> None:
        period = self._slice * _PARTS
        earners = [account for _vcpu, account in sorted(self._vcpus.items()) if account.gets_a_part]
        total = sum(account.weight for account in earners)
        weights = given = 0
        for account in earners:
            weights += account.weight
            # What was given so far is rounded, not each part: the parts add up to the period.
            share, given = period * weights // total - given, period * weights // total
            account.credit = max(-period, account.credit + share)
        for account in self._vcpus.values():
            account.earns, account.slept = account.runnable, not account.runnable
        self._sort()

    def _sort(self) -> None:
        """Those who wait change places by what they have now, and otherwise keep their order."""
        _boosted, under, over = self._queues
        waiting = [*under, *over]
        under.clear()
        over.clear()
        for vcpu in waiting:
            self._queues[self._vcpus[vcpu].priority].append(vcpu)

    def parameters(self, vcpu: int) -> dict[str, int]:
        """What is set for ``vcpu``: the weight.

        Raises:
            ScheduleError: there is no such vCPU.
        """
        return {"weight": known(self, self._vcpus, vcpu).weight}

    def set_parameters(self, vcpu: int, now: int, values: Mapping[str, int]) -> None:
        """Set the weight, by which the running period is handed out already.

        Raises:
            ScheduleError: no such vCPU, no such parameter or no such value; nothing is changed then.
        """
        account: _Account = known(self, self._vcpus, vcpu)
        check_values(self, vcpu, _RANGES, values)
        self._charge(now)
        account.weight = values.get("weight", account.weight)
        self._news = True

    def state(self) -> dict[str, Any]:
        return {
            "vcpus": {vcpu: asdict(account) for vcpu, account in self._vcpus.items()},
            "queues": [list(queue) for queue in self._queues],
            "running": self._running,
            "times": (self._since, self._turn_end, self._period_start),
            "news": self._news,
        }

    def load(self, state: dict[str, Any]) -> None:
        self._vcpus = {vcpu: _Account(**values) for vcpu, values in state["vcpus"].items()}
        boosted, under, over = state["queues"]
        self._queues = deque(boosted), deque(under), deque(over)
        self._running, self._news = state["running"], state["news"]
        self._since, self._turn_end, self._period_start = state["times"]
