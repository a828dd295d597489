"""What each domain's clocks say, and what became of its time, from a machine and its trace (for `views.clocks`).

The numbers are those that the guest itself can read: its virtual time from its runstate, the others from the records
in its shared page.  The past comes from the trace.  That knows when a vCPU went to sleep and which timer woke it; one
that was woken by anything else counts as asleep until it runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any, NamedTuple

from xenlab.abi.numbers import Hypercall, SchedOp
from xenlab.abi.structures import SharedInfo, VcpuTimeInfo
from xenlab.hypervisor.accounting import virtual_time
from xenlab.hypervisor.alarms import REAL, VIRTUAL
from xenlab.hypervisor.clocks import to_instructions, to_ns
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import VCPU_INFO_BYTES, Domain, RunState
from xenlab.hypervisor.timers import TICK_NAME
from xenlab.hypervisor.trace import Kind
from xenlab.machine.memory import PAGE_SHIFT
from xenlab.views.canvas import printable

_RECORD = VCPU_INFO_BYTES - 32
_SWITCH, _TIMER, _HYPERCALL = int(Kind.SWITCH), int(Kind.TIMER), int(Kind.HYPERCALL)
_KINDS = frozenset((_SWITCH, _TIMER, _HYPERCALL, int(Kind.DOMAIN)))
_SLEEPS = frozenset(map(int, (SchedOp.BLOCK, SchedOp.POLL)))
_SETS = {int(Hypercall.set_timer_op): REAL, int(Hypercall.set_virtual_timer): VIRTUAL}
RAN, WAITED, SLEPT = "ran", "waited", "slept"
Stretch = tuple[str, int, int]


class Setting(NamedTuple):
    """An alarm was set: when, on which clock, to what, and the address behind the instruction that did it."""

    time: int
    clock: str
    at: int
    eip: int


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
        sets: its alarms as they were set.
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
    sets: list[Setting] = field(default_factory=list)
    alarms: dict[str, int] = field(default_factory=dict)
    missed: list[int] = field(default_factory=list)

    def forget_past(self) -> None:
        """What there was before it was made, was another's with the same number."""
        for found in (self.stretches, self.went_off, self.sets, self.alarms):
            found.clear()

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
        past = _Past(rows, {domain.vcpus[0].key: domid for domid, domain in xen.domains.items() if domain.vcpus})
        for raw in xen.trace.raw() if xen.trace is not None else ():
            if raw[1] in _KINDS and raw[0] <= xen.now:
                past.add(raw)
        past.close([domid for domid in rows if not xen.domains[domid].ended], xen.now)

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
    known = {RunState.RUNNABLE: "waits", RunState.BLOCKED: "sleeps", RunState.DOWN: "down"}
    return known.get(vcpu.run_state, "paused")


class _Past:
    """What each domain was doing; takes events as they were recorded, since there may be a hundred thousand."""

    def __init__(self, rows: dict[int, ClockRow], owners: dict[int, int]) -> None:
        self._rows, self._owners = rows, owners
        self._doing = dict.fromkeys(rows, (WAITED, 0))
        # When it last asked to sleep: it does if it loses the CPU at the same time.
        self._asked: dict[int, int] = {}

    def add(self, raw: tuple[Any, ...]) -> None:
        """One event of the kinds that matter here."""
        time, kind, domid = raw[:3]
        if kind == _SWITCH:
            self._switch(time, self._owners.get(raw[3]), self._owners.get(raw[4]))
        elif domid not in self._rows:
            return
        elif kind == _HYPERCALL:
            self._call(time, domid, raw[3])
        elif kind == _TIMER:
            self._rows[domid].went_off.append((time, raw[4]))
            self._rows[domid].alarms.pop(raw[4], None)
            if self._doing[domid][0] == SLEPT:
                self._change(time, domid, WAITED)
        elif raw[3] == "created":  # perhaps with the number of one that is gone
            self._rows[domid].forget_past()
            self._doing[domid] = WAITED, time

    def close(self, domids: list[int], now: int) -> None:
        """These are still doing what they did."""
        for domid in domids:
            what, since = self._doing[domid]
            self._rows[domid].stretches.append((what, since, now))

    def _switch(self, time: int, before: int | None, behind: int | None) -> None:
        if before is not None:
            self._change(time, before, SLEPT if self._asked.get(before) == time else WAITED)
        if behind is not None:
            self._change(time, behind, RAN)

    def _change(self, time: int, domid: int, what: str) -> None:
        before, since = self._doing[domid]
        self._rows[domid].stretches.append((before, since, time))
        self._doing[domid] = what, time

    def _call(self, time: int, domid: int, frame: tuple[int, ...]) -> None:
        number, high, _edx, low, *_rest, eip = frame
        if number in _SETS:
            row, clock, at = self._rows[domid], _SETS[number], low | high << 32
            row.alarms.pop(clock, None)
            if at:
                row.alarms[clock] = to_instructions(at)
                row.sets.append(Setting(time, clock, row.alarms[clock], eip))
        elif number == Hypercall.sched_op and low in _SLEEPS:
            self._asked[domid] = time
