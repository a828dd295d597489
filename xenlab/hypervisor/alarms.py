"""Two alarms for each vCPU, one on real time and one on virtual time: the slot of lesson 09 (paper 3.3.2).

The problem: a kernel asks to be told when a clock reads a certain value.  Real time always goes on; a vCPU's virtual
time goes on only while it runs.  The machine has one clock, and wants to know one thing: when does the next alarm go
off, if nothing changes until then?

The idea: alarms on real time stand in a heap.  Of those on virtual time only one can come due, that of the vCPU that
runs; what is missing in its virtual time is what is missing in real time, as long as it runs.

The invariant: an alarm goes off once, not before its clock reads its value, and at the first moment at which it does.
What breaks without it: a kernel that sleeps too long, or is woken again and again.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from typing import Any, Protocol

REAL, VIRTUAL = "real", "virtual"


class Alarms(Protocol):
    """The slot.  vCPUs are numbers, all times are in instructions; ``ran`` is a vCPU's virtual time."""

    def set(self, vcpu: int, clock: str, at: int | None, now: int, ran: int) -> None:
        """The alarm of ``vcpu`` on ``clock`` is to go off when that reads ``at``, and no more at any other time.

        None takes it away.  It may lie in the past: then it goes off at once.
        """
        ...

    def run(self, vcpu: int, now: int, ran: int) -> None:
        """``vcpu`` begins to run; nobody did.  Only vCPUs with an alarm on virtual time are announced."""
        ...

    def stop(self, vcpu: int, now: int, ran: int) -> None:
        """``vcpu`` stops running."""
        ...

    def next(self) -> int | None:
        """The real time at which the next alarm goes off if nothing changes until then; None if none will."""
        ...

    def expire(self, now: int) -> Sequence[tuple[int, str]]:
        """The alarms that go off by ``now``, as vCPU and clock, in any order.  They are not set any more."""
        ...

    def state(self) -> Any:
        """Everything it knows, as plain data."""
        ...

    def load(self, state: Any) -> None:
        """Take over what `state` gave."""
        ...


class AlarmClocks:
    """Ours: a heap for real time, and the one alarm on virtual time that can come due."""

    def __init__(self) -> None:
        self._real: dict[int, int] = {}
        self._virtual: dict[int, int] = {}
        # May hold alarms that were set anew meanwhile; these are passed over.
        self._heap: list[tuple[int, int]] = []
        # Who runs, and what to add to its virtual time to get real time.
        self._running: tuple[int, int] | None = None

    def set(self, vcpu: int, clock: str, at: int | None, now: int, ran: int) -> None:
        alarms = self._real if clock == REAL else self._virtual
        if at is None:
            alarms.pop(vcpu, None)
            return
        alarms[vcpu] = at
        if clock == REAL:
            heappush(self._heap, (at, vcpu))
            if len(self._heap) > 2 * len(self._real) + 8:
                self._heap = [(at, vcpu) for vcpu, at in self._real.items()]
                heapify(self._heap)
        else:
            self._running = vcpu, now - ran

    def run(self, vcpu: int, now: int, ran: int) -> None:
        self._running = vcpu, now - ran

    def stop(self, _vcpu: int, _now: int, _ran: int) -> None:
        self._running = None

    def next(self) -> int | None:
        real, virtual = self._next_real(), self._next_virtual()
        return virtual if real is None or (virtual is not None and virtual < real) else real

    def _next_real(self) -> int | None:
        heap = self._heap
        while heap and self._real.get(heap[0][1]) != heap[0][0]:
            heappop(heap)
        return heap[0][0] if heap else None

    def _next_virtual(self) -> int | None:
        if self._running is None:
            return None
        vcpu, offset = self._running
        at = self._virtual.get(vcpu)
        return None if at is None else at + offset

    def expire(self, now: int) -> list[tuple[int, str]]:
        off: list[tuple[int, str]] = []
        while (at := self._next_real()) is not None and at <= now:
            vcpu = heappop(self._heap)[1]
            del self._real[vcpu]
            off.append((vcpu, REAL))
        virtual = self._next_virtual()
        if virtual is not None and virtual <= now and self._running:
            vcpu = self._running[0]
            del self._virtual[vcpu]
            off.append((vcpu, VIRTUAL))
        return off

    def state(self) -> dict[str, Any]:
        return {"real": dict(self._real), "virtual": dict(self._virtual), "running": self._running}

    def load(self, state: dict[str, Any]) -> None:
        self._real, self._virtual, self._running = dict(state["real"]), dict(state["virtual"]), state["running"]
        self._heap = sorted((at, vcpu) for vcpu, at in self._real.items())


__all__ = ["REAL", "VIRTUAL", "AlarmClocks", "Alarms"]
