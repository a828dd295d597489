"""Shares of the CPU, the control domain's side: parameters, and which scheduler there is (paper 2.3, 3.3.1).

The problem: policy changes while domains run.  Somebody's share is raised, an interactive domain gets a warp, another
scheduler is tried; and the run must be one that can be taken back and made again.

The invariant: each of these is an input, and applying it depends on nothing but the machine.  So a scheduler
that is put in is a fresh copy of the one that was given, each time the run comes by.  What breaks without it: in a
replay the new scheduler already knows the future.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass

from xenlab.errors import ScheduleError
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.schedulers import Scheduler
from xenlab.hypervisor.scheduling import change_scheduler, set_parameters
from xenlab.hypervisor.trace import NO_DOMAIN, Kind


@dataclass(frozen=True, slots=True)
class SetSchedule:
    """The tools set scheduling parameters of a domain: ``SetSchedule(1, {"weight": 512, "warp": 50_000})``.

    Nothing happens if there is no such domain when its time comes.  What the scheduler of that time does not have or
    cannot follow leaves an event with the reason and changes nothing.

    Raises:
        ScheduleError: values that no scheduler can follow: no whole numbers, below 0, or a weight of 0.
    """

    domid: int
    values: Mapping[str, int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", dict(self.values))
        for name, value in self.values.items():
            least = 1 if name == "weight" else 0
            if type(value) is not int or value < least:
                raise ScheduleError(
                    f"{name} of domain {self.domid}: expected a whole number from {least} on, found {value!r:.80}"
                )

    def apply(self, hypervisor: Hypervisor) -> None:
        """Do it."""
        domain = hypervisor.domains.get(self.domid)
        if domain is None:
            return
        try:
            set_parameters(hypervisor, domain, self.values)
        except ScheduleError as problem:
            hypervisor.record(Kind.DOMAIN, self.domid, f"not scheduled: {problem}")


@dataclass(frozen=True, slots=True)
class SetScheduler:
    """The tools put in another scheduler; it begins as a copy of ``scheduler``, with the vCPUs that are there.

    Raises:
        ScheduleError: it cannot be copied.
    """

    scheduler: Scheduler

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "scheduler", deepcopy(self.scheduler))
        except TypeError as problem:
            raise ScheduleError(f"{type(self.scheduler).__name__} cannot be copied ({problem})") from None

    def __repr__(self) -> str:
        # The trace keeps this, so no address may be in it.
        return f"SetScheduler({type(self.scheduler).__name__})"

    def apply(self, hypervisor: Hypervisor) -> None:
        """Do it."""
        try:
            change_scheduler(hypervisor, deepcopy(self.scheduler))
        except ScheduleError as problem:
            hypervisor.record(Kind.DOMAIN, NO_DOMAIN, f"scheduler not changed: {problem}")
