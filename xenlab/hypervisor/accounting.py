"""Who had the CPU, who wanted it, and how long a woken one waited (paper 3.3.1, 3.3.2).

The problem: a scheduler is judged by shares and by latency, and a guest's virtual time is the time that it ran.
Both have to be known at any moment, and a domain switch must not become dearer for it.

The idea: each vCPU is always in one state: it runs, could run, sleeps, or is offline.  `Account` holds how long it has
been in each, and since when it is in the present one; only a change of state costs anything, two additions.

The hypervisor takes no simulated time, since time is instructions of guests.  What it does on behalf of a domain is
counted as entries; `HYPERVISOR_NS` prices an entry at what a trap takes on a machine of the paper's time, so
that the sum is an estimate, and says so.

The invariant: the four times of a vCPU add up to the time since it was made.  What breaks without it: shares that
do not add up to the machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from xenlab.abi.numbers import Runstate

if TYPE_CHECKING:
    from xenlab.hypervisor.core import Hypervisor
    from xenlab.hypervisor.domain import Domain, Vcpu

HYPERVISOR_NS = 1_000
# One bin for each power of two of instructions.
LATENCY_BINS = 48


@dataclass(slots=True)
class Account:
    """Times of one vCPU, in instructions.

    Attributes:
        since: when it came into its present state.
        ran, waited, slept, offline: how long it had been running, runnable, blocked and neither before that.
        switches: how often it was given the CPU while another had it, or none.
        entries: how often it entered the hypervisor.
        woken: whether it was woken and has not run since.
        latencies: how often it waited from a wake to the CPU for 0, 1, 2-3, 4-7, 8-15 ... instructions.
    """

    since: int = 0
    ran: int = 0
    waited: int = 0
    slept: int = 0
    offline: int = 0
    switches: int = 0
    entries: int = 0
    woken: bool = False
    latencies: list[int] = field(default_factory=lambda: [0] * LATENCY_BINS)

    def state(self) -> tuple[Any, ...]:
        """Everything, as plain data."""
        times = (self.since, self.ran, self.waited, self.slept, self.offline)
        return (*times, self.switches, self.entries, self.woken, tuple(self.latencies))

    @classmethod
    def of(cls, state: tuple[Any, ...]) -> Account:
        """An account as it was when `state` was taken."""
        account = cls(*state)
        account.latencies = list(account.latencies)
        return account


class Usage(NamedTuple):
    """What `usage` gives; times in instructions.

    Attributes:
        running, runnable, blocked, offline: how long it was each.
        switches, entries, latencies: as in `Account`, summed over its vCPUs.
    """

    running: int
    runnable: int
    blocked: int
    offline: int
    switches: int
    entries: int
    latencies: tuple[int, ...]

    @property
    def hypervisor_ns(self) -> int:
        """An estimate of the time that the hypervisor spent for it."""
        return self.entries * HYPERVISOR_NS

    def latency_at(self, share: float) -> int:
        """So many instructions at most from a wake to the CPU in ``share`` of all cases, as a power of two."""
        left = share * sum(self.latencies)
        for size, count in enumerate(self.latencies):
            left -= count
            if left <= 0:
                return (1 << size) - 1
        return 0


def change_places(xen: Hypervisor, before: Vcpu | None, chosen: Vcpu | None, now: int) -> None:
    """The CPU goes from one vCPU to another: the times of both, and whatever they have asked for at this moment."""
    if before is not None:
        account = before.account
        account.ran += now - account.since
        account.since = now
        if before.attended:
            xen.timers.stopped(before)
    if chosen is not None:
        account = chosen.account
        waited = now - account.since
        account.waited += waited
        account.since = now
        account.switches += 1
        if account.woken:
            account.woken = False
            account.latencies[min(waited.bit_length(), LATENCY_BINS - 1)] += 1
        if chosen.attended:
            xen.timers.started(chosen)
            xen.vcpu_ops.switched_to(chosen)


def settle(xen: Hypervisor, vcpu: Vcpu) -> None:
    """Close the present stretch of a vCPU, before its state changes."""
    if vcpu is xen.current:
        return  # it runs, whatever it may do next, until there is a switch
    now = xen.now
    account, stretch = vcpu.account, now - vcpu.account.since
    match _NOT_RUNNING[vcpu.run_state.name]:
        case Runstate.RUNNABLE:
            account.waited += stretch
        case Runstate.BLOCKED:
            account.slept += stretch
        case _:
            account.offline += stretch
    account.since = now


def runstate(xen: Hypervisor, vcpu: Vcpu) -> tuple[Runstate, int, tuple[int, int, int, int]]:
    """The state of a vCPU, since when, and its four times up to now, in the order of `Runstate`."""
    account = vcpu.account
    state = Runstate.RUNNING if vcpu is xen.current else _NOT_RUNNING[vcpu.run_state.name]
    times = [account.ran, account.waited, account.slept, account.offline]
    times[state] += xen.now - account.since
    return state, account.since, (times[0], times[1], times[2], times[3])


def virtual_time(xen: Hypervisor, vcpu: Vcpu) -> int:
    """How long a vCPU has run, in instructions."""
    return runstate(xen, vcpu)[2][Runstate.RUNNING]


def usage(xen: Hypervisor, domain: Domain) -> Usage:
    """What ``domain`` had of the machine up to now."""
    times = [runstate(xen, vcpu)[2] for vcpu in domain.vcpus]
    accounts = [vcpu.account for vcpu in domain.vcpus]
    running, runnable, blocked, offline = (sum(column) for column in zip(*times, strict=True))
    latencies = tuple(map(sum, zip(*(account.latencies for account in accounts), strict=True)))
    switches, entries = sum(account.switches for account in accounts), sum(account.entries for account in accounts)
    return Usage(running, runnable, blocked, offline, switches, entries, latencies)


_NOT_RUNNING = {
    "RUNNABLE": Runstate.RUNNABLE,
    "BLOCKED": Runstate.BLOCKED,
    "PAUSED": Runstate.OFFLINE,
    "ENDED": Runstate.OFFLINE,
    "DOWN": Runstate.OFFLINE,
}
