"""Which vCPU runs next: the interface that every scheduler fills (paper 3.3.1).

A scheduler knows vCPUs as numbers and time as instructions; it never sees a domain.  So one
that a student wrote runs in the same slot as ours, and its decisions can be recorded as
plain data and replayed.
"""

from __future__ import annotations

from typing import Any, Protocol

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


__all__ = ["RoundRobin", "Scheduler"]
