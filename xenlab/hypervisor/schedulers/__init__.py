"""Which vCPU runs next: the interface that every scheduler fills (paper 3.3.1).

A scheduler knows vCPUs as numbers and time as instructions; it never sees a domain.  So one
that a student wrote runs in the same slot as ours, and its decisions can be recorded as
plain data and replayed.

Each vCPU is counted for itself, with the weight that its domain was given: so a domain with two that run gets twice
the share, as under Xen's own two (the credit scheduler adds a domain's weight once for each active vCPU, BVT keeps a
clock for each).  A vCPU that is down is known to the scheduler, and sleeps.

One that can be adjusted while domains run has the four methods of `Tunable` besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from xenlab.hypervisor.schedulers.bvt import Bvt
from xenlab.hypervisor.schedulers.credit import Credit
from xenlab.hypervisor.schedulers.diary import Diary
from xenlab.hypervisor.schedulers.round_robin import RoundRobin


class Scheduler(Protocol):
    """Chooses among runnable vCPUs.  ``now`` is in instructions everywhere."""

    def wake(self, vcpu: int, now: int) -> None:
        """``vcpu`` became runnable (also when it is new).  It is not runnable yet."""
        ...

    def sleep(self, vcpu: int, now: int) -> None:
        """``vcpu`` stopped being runnable: it blocked, was paused or ended."""
        ...

    def pick(self, now: int) -> tuple[int, int] | None:
        """The vCPU to run from ``now`` on and for how many instructions; None when none is runnable.

        Called when a slice ends, when the running vCPU yields or sleeps, and after a wake.
        """
        ...

    def state(self) -> Any:
        """Everything it knows, as plain data."""
        ...

    def load(self, state: Any) -> None:
        """Take over what `state` gave."""
        ...


@runtime_checkable
class Tunable(Protocol):
    """A scheduler with parameters: whole numbers by name, for each vCPU."""

    def add(self, vcpu: int) -> None:
        """``vcpu`` exists and sleeps; its parameters can be set."""
        ...

    def remove(self, vcpu: int) -> None:
        """``vcpu``, which sleeps, exists no more; another one may get its number."""
        ...

    def parameters(self, vcpu: int) -> dict[str, int]:
        """All parameters of ``vcpu``; a ScheduleError if it is unknown."""
        ...

    def set_parameters(self, vcpu: int, now: int, values: Mapping[str, int]) -> None:
        """Set those in ``values``; if one cannot be, a ScheduleError and none is."""
        ...


__all__ = ["Bvt", "Credit", "Diary", "RoundRobin", "Scheduler", "Tunable"]
