"""Everything that comes from outside, through one queue stamped with instruction time.

The problem: a run can be repeated only if what came from outside, a key, a slider, a packet,
comes again at the same instruction.

The invariant: outside the queue nothing changes a machine that runs.  Each input is applied
at the first moment at or after its stamp at which no guest instruction is half done, and
that moment is a function of the stamps alone.

An input with an attribute ``interval`` comes again and again, so many instructions apart: a tool of the control
domain's that looks after something.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from xenlab.hypervisor.trace import Kind

if TYPE_CHECKING:
    from xenlab.hypervisor.core import Hypervisor


class Input(Protocol):
    """Something that happens to the machine from outside."""

    def apply(self, hypervisor: Hypervisor) -> None:
        """Do it."""
        ...


@dataclass(frozen=True, slots=True)
class Typed:
    """Bytes typed at a domain's console."""

    domid: int
    data: bytes

    def apply(self, hypervisor: Hypervisor) -> None:
        domain = hypervisor.domains.get(self.domid)
        if domain is not None:
            domain.console_in += self.data
            for vcpu in domain.vcpus:
                hypervisor.wake(vcpu)


@dataclass(frozen=True, slots=True)
class Pause:
    """The control domain pauses a domain."""

    domid: int

    def apply(self, hypervisor: Hypervisor) -> None:
        if self.domid in hypervisor.domains:
            hypervisor.pause(hypervisor.domains[self.domid])


@dataclass(frozen=True, slots=True)
class Unpause:
    """The control domain lets a paused domain go on."""

    domid: int

    def apply(self, hypervisor: Hypervisor) -> None:
        if self.domid in hypervisor.domains:
            hypervisor.unpause(hypervisor.domains[self.domid])


def _due(entry: tuple[int, Input]) -> int:
    return entry[0]


class InputQueue:
    """Inputs with their times, those that were applied and those that are still to come.

    Attributes:
        log: all inputs ever submitted, as ``(time, input)``, in the order of time.
    """

    def __init__(self) -> None:
        self.log: list[tuple[int, Input]] = []
        self._next = 0

    def submit(self, time: int, item: Input) -> None:
        """Add an input at ``time``, behind those that are due before it or were submitted before it."""
        insort(self.log, (time, item), lo=self._next, key=_due)

    def forget_pending(self) -> None:
        """Drop the inputs that were not applied yet; one that comes again and was applied before still does."""
        pending, applied = self.log[self._next :], [item for _time, item in self.log[: self._next]]
        del self.log[self._next :]
        for time, item in pending:
            if getattr(item, "interval", 0) and item in applied and not self._is_pending(item):
                self.log.append((time, item))

    def apply_next(self, hypervisor: Hypervisor) -> bool:
        """Apply one input whose time has come; False when there is none."""
        if self._next == len(self.log) or self.log[self._next][0] > hypervisor.now:
            return False
        time, item = self.log[self._next]
        self._next += 1
        self._come_again(time, item, hypervisor.now)
        hypervisor.record(Kind.INPUT, -1, repr(item))
        item.apply(hypervisor)
        return True

    def _come_again(self, time: int, item: Input, now: int) -> None:
        """Submit the next turn of an input that has an interval, unless a run that is made again did so before."""
        interval = getattr(item, "interval", 0)
        if interval and not self._is_pending(item):
            self.submit(time + interval * ((now - time) // interval + 1), item)

    def _is_pending(self, item: Input) -> bool:
        return any(other == item for _time, other in self.log[self._next :])

    def next_time(self) -> int | None:
        """When the next recorded input is due, None when there is none."""
        return self.log[self._next][0] if self._next < len(self.log) else None

    def state(self) -> int:
        """How many inputs were applied."""
        return self._next

    def load(self, state: int) -> None:
        """Go back to when so many inputs had been applied; the later ones will be applied again."""
        self._next = state
