"""Everything that comes from outside, through one queue stamped with instruction time.

The problem: a run can be repeated only if what came from outside, a key, a slider, a packet,
comes again at the same instruction.

The invariant: outside the queue nothing changes a machine that runs.  Each input is applied
at the first moment at or after its stamp at which no guest instruction is half done, and
that moment is a function of the stamps alone.
"""

from __future__ import annotations

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


class InputQueue:
    """Inputs with their times, those that were applied and those that are still to come.

    Attributes:
        log: all inputs ever submitted, as ``(time, input)``, in order.
    """

    def __init__(self) -> None:
        self.log: list[tuple[int, Input]] = []
        self._next = 0

    def submit(self, time: int, item: Input) -> None:
        """Add an input at ``time``, behind those that were submitted before it."""
        self.log.append((time, item))

    def forget_pending(self) -> None:
        """Drop the inputs that were not applied yet."""
        del self.log[self._next :]

    def apply_next(self, hypervisor: Hypervisor) -> bool:
        """Apply one input whose time has come; False when there is none."""
        if self._next == len(self.log) or self.log[self._next][0] > hypervisor.now:
            return False
        item = self.log[self._next][1]
        self._next += 1
        hypervisor.record(Kind.INPUT, -1, repr(item))
        item.apply(hypervisor)
        return True

    def next_time(self) -> int | None:
        """When the next recorded input is due, None when there is none."""
        return self.log[self._next][0] if self._next < len(self.log) else None

    def state(self) -> int:
        """How many inputs were applied."""
        return self._next

    def load(self, state: int) -> None:
        """Go back to when so many inputs had been applied; the later ones will be applied again."""
        self._next = state
