"""What each domain's clocks say, and what became of its time, from a machine and its trace (for `views.clocks`).

The numbers are those that the guest itself can read: its virtual time from its runstate, the others from the records
in its shared page.  The past comes from the trace.  That knows when a vCPU went to sleep and which timer woke it; one
that was woken by anything else counts as asleep until it runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise

from xenlab.abi.numbers import Hypercall, SchedOp
from xenlab.abi.structures import SharedInfo, VcpuTimeInfo
from xenlab.hypervisor.accounting import virtual_time
from xenlab.hypervisor.alarms import REAL, VIRTUAL
from xenlab.hypervisor.clocks import to_instructions, to_ns
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import VCPU_INFO_BYTES, Domain, RunState
from xenlab.hypervisor.timers import TICK_NAME
from xenlab.hypervisor.trace import Event, Kind, decode
from xenlab.machine.memory import PAGE_SHIFT
from xenlab.views.canvas import printable

_RECORD = VCPU_INFO_BYTES - 32
_KINDS = tuple(int(kind) for kind in (Kind.SWITCH, Kind.TIMER, Kind.HYPERCALL, Kind.DOMAIN))
_SETS = {int(Hypercall.set_timer_op): REAL, int(Hypercall.set_virtual_timer): VIRTUAL}
RAN, WAITED, SLEPT = "ran", "waited", "slept"
Stretch = tuple[str, int, int]


@dataclass(slots=True)
class ClockRow:
    """What is known of one domain; times in instructions unless they end in ``_ns``.

    Attributes:
        domid, name: whose.
        state: what it does now.
        real_ns, virtual_ns: its clocks.
        wall: the time of day, since 1970.
        record: its time record.
        stretches: what it did, from when to when.
        went_off: its timers that went off, as time and name.
        sets: its alarms that were set, as time and clock.
        alarms: what its alarms are set to now, by clock.
        ticks, missed: how many came, and the times at which one should have come while it was away.
    """

    domid: int
    name: str
    state: str
    real_ns: int
    virtual_ns: int
    wall: datetime
    record: VcpuTimeInfo
    stretches: list[Stretch] = field(default_factory=list)
    went_off: list[tuple[int, str]] = field(default_factory=list)
    sets: list[tuple[int, str]] = field(default_factory=list)
    alarms: dict[str, int] = field(default_factory=dict)
    missed: list[int] = field(default_factory=list)

    @property
    def ticks(self) -> int:
        """How many ticks came."""
        return sum(name == TICK_NAME for _time, name in self.went_off)


class ClockRows:
    """Makes the rows of all domains of a machine."""

    def __init__(self, xen: Hypervisor) -> None:
        self._xen = xen

    def rows(self) -> list[ClockRow]:
        """One for each domain, in order of their ids."""
        rows = {domid: self._now(domain) for domid, domain in sorted(self._xen.domains.items()) if domain.vcpus}
        self._add_past(rows)
        for domid, row in rows.items():
            self._add_missed(row, self._xen.domains[domid])
        return list(rows.values())

    def _now(self, domain: Domain) -> ClockRow:
        xen, vcpu = self._xen, domain.vcpus[0]
        record = VcpuTimeInfo.from_buffer_copy(xen.memory.read(vcpu.info + _RECORD, 32))
        real = time_by(record, xen.now)
        wall = _wall_clock(xen, domain) + timedelta(microseconds=real // 1000)
        state = _state(xen, domain)
        virtual = to_ns(virtual_time(xen, vcpu))
        return ClockRow(domain.domid, printable(domain.name), state, real, virtual, wall, record)

    def _add_past(self, rows: dict[int, ClockRow]) -> None:
        """Go through the trace once, with what each vCPU was doing since when."""
        xen = self._xen
        owners = {domain.vcpus[0].key: domid for domid, domain in xen.domains.items() if domain.vcpus}
        doing = dict.fromkeys(rows, (WAITED, 0))
        for raw in xen.trace.raw() if xen.trace is not None else ():
            if raw[1] in _KINDS and raw[0] <= xen.now:
                self._add(decode(raw), rows, owners, doing)
        for domid, (what, since) in doing.items():
            if not xen.domains[domid].ended:
                rows[domid].stretches.append((what, since, xen.now))

    def _add(
        self, event: Event, rows: dict[int, ClockRow], owners: dict[int, int], doing: dict[int, tuple[str, int]]
    ) -> None:
        def change(domid: int | None, what: str) -> None:
            if domid in rows and domid in doing:
                before, since = doing[domid]
                rows[domid].stretches.append((before, since, event.time))
                doing[domid] = what, event.time

        if event.kind is Kind.SWITCH:
            before = owners.get(event.from_vcpu)
            sleeps = before is not None and doing.get(before, ("", 0))[0] == SLEPT
            if not sleeps:
                change(before, WAITED)
            change(owners.get(event.to_vcpu), RAN)
        elif event.domain not in rows:
            return
        elif event.kind is Kind.TIMER:
            row = rows[event.domain]
            row.went_off.append((event.time, event.timer))
            row.alarms.pop(event.timer, None)
            if doing[event.domain][0] == SLEPT:
                change(event.domain, WAITED)
        elif event.kind is Kind.DOMAIN:
            if event.change == "created":  # perhaps with the number of one that is gone
                rows[event.domain] = self._now(self._xen.domains[event.domain])
                doing[event.domain] = WAITED, event.time
        elif _is_sleep(event):
            change(event.domain, SLEPT)
        elif event.number in _SETS:
            _add_set(rows[event.domain], event)

    def _add_missed(self, row: ClockRow, domain: Domain) -> None:
        vcpu = domain.vcpus[0]
        ticks, period = [time for time, name in row.went_off if name == TICK_NAME], vcpu.tick_period
        if not ticks or not period:
            return
        ticks.insert(0, next((since for what, since, _until in row.stretches if what == RAN), ticks[0]))
        for before, time in pairwise(ticks):
            # A tick that comes late is the last one of those that were due.
            late = range(before + period, time - (time - before) % period - period + 1, period)
            row.missed += late
        overdue = (self._xen.now - ticks[-1]) // period
        row.missed += [ticks[-1] + number * period for number in range(1, overdue)]


def time_by(record: VcpuTimeInfo, tsc: int) -> int:
    """Real time in nanoseconds by a time record, as a guest computes it: the formula of `clocks`."""
    passed = tsc - record.tsc_timestamp
    passed = passed << record.tsc_shift if record.tsc_shift >= 0 else passed >> -record.tsc_shift
    return int(record.system_time + (passed * record.tsc_to_system_mul >> 32))


def _wall_clock(xen: Hypervisor, domain: Domain) -> datetime:
    """What it was when real time was 0, by the record in the domain's shared page; good for some ten thousand years."""
    at, words = domain.shared_info_mfn << PAGE_SHIFT, xen.memory.words
    low, high, nanoseconds = (
        words[at + place.offset >> 2] for place in (SharedInfo.wc_sec, SharedInfo.wc_sec_hi, SharedInfo.wc_nsec)
    )
    seconds = min(low | high << 32, 250_000_000_000)
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=int(seconds), microseconds=int(nanoseconds) // 1000)


def _state(xen: Hypervisor, domain: Domain) -> str:
    vcpu = domain.vcpus[0]
    if domain.ended:
        return "ended"
    if vcpu is xen.current:
        return "runs"
    return {RunState.RUNNABLE: "waits", RunState.BLOCKED: "sleeps"}.get(vcpu.run_state, "paused")


def _is_sleep(event: Event) -> bool:
    """Whether it is a call that lets the vCPU sleep; if it does not, the vCPU goes on running at once."""
    return event.kind is Kind.HYPERCALL and event.number == Hypercall.sched_op and _ebx(event) in _SLEEPS


_SLEEPS = (SchedOp.BLOCK, SchedOp.POLL)


def _ebx(event: Event) -> int:
    return int(event.registers[3])


def _add_set(row: ClockRow, event: Event) -> None:
    _eax, high, _edx, low, *_rest = event.registers
    clock, at = _SETS[event.number], low | high << 32
    row.alarms.pop(clock, None)
    if at:
        row.alarms[clock] = to_instructions(at)
        row.sets.append((event.time, clock))
