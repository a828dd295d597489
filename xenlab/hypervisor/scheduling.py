"""What is set of the scheduler while domains run: parameters of domains, and the scheduler itself (paper 2.3, 3.3.1).

The problem: a scheduler knows numbers only, and it is a part that may be exchanged.  Somebody has to tell it which
numbers exist, whose parameters they are, and a new one who is runnable at all.

The invariant: the scheduler's view of who is runnable is the hypervisor's, also after it was exchanged, and a vCPU
begins with no parameters of the one that had its number before.  What breaks without it: a vCPU that nobody ever
runs, or a new domain with the share of a dead one.

A scheduler that is not `Tunable` has no parameters and is told of nothing but sleep and wake.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from xenlab.errors import ScheduleError, XenlabError
from xenlab.hypervisor.domain import Domain, RunState, Vcpu
from xenlab.hypervisor.parts import wrong
from xenlab.hypervisor.schedulers import Scheduler, Tunable

if TYPE_CHECKING:
    from xenlab.hypervisor.core import Hypervisor


def introduce(xen: Hypervisor, vcpu: Vcpu) -> None:
    """Tell the scheduler of a new vCPU."""
    scheduler = xen.scheduler
    if isinstance(scheduler, Tunable):
        _ask(scheduler, f"told of vCPU {vcpu.key}", lambda: scheduler.add(vcpu.key))


def forget(xen: Hypervisor, vcpu: Vcpu) -> None:
    """Tell the scheduler that there is no such vCPU any more."""
    scheduler = xen.scheduler
    if isinstance(scheduler, Tunable):
        _ask(scheduler, f"told of the end of vCPU {vcpu.key}", lambda: scheduler.remove(vcpu.key))


def set_parameters(xen: Hypervisor, domain: Domain, values: Mapping[str, int]) -> None:
    """Set scheduling parameters of all vCPUs of ``domain``, from now on.

    Raises:
        ScheduleError: the scheduler has no such parameters, or cannot follow the values; nothing is changed then.
        PartError: the scheduler raised something else.
    """
    scheduler = xen.scheduler
    if not isinstance(scheduler, Tunable):
        raise ScheduleError(
            f"{type(scheduler).__name__} has no parameters: expected a scheduler with "
            "add, remove, parameters and set_parameters, such as Bvt"
        )
    for vcpu in domain.vcpus:
        _set(scheduler, vcpu.key, xen.now, values)
    xen.reschedule()


def change_scheduler(xen: Hypervisor, scheduler: Scheduler) -> None:
    """Let ``scheduler``, which has seen no vCPU yet, decide from now on.

    It is told which vCPUs there are and which of them are runnable, in the order of their numbers, and
    takes over the parameters that the old one has by the same name.

    Raises:
        PartError: it raised something; the old one stays.
    """
    for key, vcpu in sorted(xen.vcpus.items()):
        if isinstance(scheduler, Tunable):
            _hand_over(xen, scheduler, key)
        if vcpu.run_state is RunState.RUNNABLE:
            _wake(scheduler, key, xen.now)
    xen.scheduler = scheduler
    xen.reschedule()


def _hand_over(xen: Hypervisor, scheduler: Tunable, key: int) -> None:
    old = xen.scheduler
    _ask(scheduler, f"told of vCPU {key}", lambda: scheduler.add(key))
    if isinstance(old, Tunable):
        names = scheduler.parameters(key)
        _set(
            scheduler, key, xen.now, {name: old.parameters(key)[name] for name in names if name in old.parameters(key)}
        )


def _set(scheduler: Tunable, key: int, now: int, values: Mapping[str, int]) -> None:
    _ask(scheduler, f"given {dict(values)} for vCPU {key}", lambda: scheduler.set_parameters(key, now, values))


def _wake(scheduler: Scheduler, key: int, now: int) -> None:
    _ask(scheduler, f"told that vCPU {key} is runnable", lambda: scheduler.wake(key, now))


def _ask(scheduler: object, did: str, call: Callable[[], None]) -> None:
    try:
        call()
    except XenlabError:
        raise
    except Exception as problem:
        raise wrong(scheduler, did, "no exception", problem) from problem
