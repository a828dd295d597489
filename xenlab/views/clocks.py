"""Three clocks of each domain, side by side: real, virtual, wall-clock (lesson 09; paper 3.3.2).

For each domain a lane over time: a full block where it ran, an open one where it waited for the CPU, a line where it
slept.  On the lane's upper edge stand the alarms: where one was set, where one on real time went off, where one on
virtual time did.  On its lower edge stand its ticks, and small crosses where one should have come while it was away.

The numbers are those that the guest itself can read: its virtual time from its runstate, the others from the records
in its shared page.  The past comes from the trace.  That knows when a vCPU went to sleep and which timer woke it; one
that was woken by anything else is shown as asleep until it runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise

from xenlab.abi.numbers import Hypercall, SchedOp
from xenlab.abi.structures import SharedInfo, VcpuTimeInfo
from xenlab.hypervisor.accounting import virtual_time
from xenlab.hypervisor.alarms import REAL, VIRTUAL
from xenlab.hypervisor.clocks import INSTRUCTION_NS, to_instructions, to_ns
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import VCPU_INFO_BYTES, Domain, RunState
from xenlab.hypervisor.timers import POLL_NAME, TICK_NAME
from xenlab.hypervisor.trace import Event, Kind, decode
from xenlab.machine.memory import PAGE_SHIFT
from xenlab.views.canvas import WIDTH, Canvas, clip, number, printable
from xenlab.views.palette import domain_colour
from xenlab.views.picture import Picture, table

_SHOWN = 5
_LANE_X, _LANE_WIDTH, _LANE_HEIGHT, _ROW, _TOP = 16, WIDTH - 32, 22, 106, 84
_MARKS = 150
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


class ClocksView(Picture):
    """The clocks of all domains, what they did, and their alarms and ticks.

    Args:
        xen: the machine, with a trace for what was before.
        span: how many instructions back the lanes reach; None: to the start.
    """

    title = "Real, virtual and wall-clock time"

    def __init__(self, xen: Hypervisor, *, span: int | None = None) -> None:
        self._xen, self._span = xen, span

    def rows(self) -> list[ClockRow]:
        """What is shown of each domain, in order of their ids."""
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

    def text(self) -> str:
        rows = self.rows()
        clocks = [
            (
                str(row.domid),
                row.name,
                row.state,
                milliseconds(row.real_ns),
                milliseconds(row.virtual_ns),
                clock_face(row.wall),
                alarm_text(row, REAL),
                alarm_text(row, VIRTUAL),
                str(sum(name == REAL for _time, name in row.went_off)),
                str(sum(name == VIRTUAL for _time, name in row.went_off)),
                str(row.ticks),
                str(len(row.missed)),
            )
            for row in rows
        ]
        places = ("domain", "name", "now", "real ms", "virtual ms", "wall clock", "real alarm at", "virtual alarm at")
        heads = (*places, "went off: real", "virtual", "ticks", "missed")
        records = [(str(row.domid), *map(str, _fields(row.record))) for row in rows]
        names = ("domain", "version", "tsc_timestamp", "system_time", "tsc_to_system_mul", "tsc_shift")
        return f"{self.title}: {self._summary()}\n\n{table(heads, clocks)}\n\n{table(names, records)}"

    def _summary(self) -> str:
        return f"{milliseconds(to_ns(self._xen.now))} ms since power-on"

    def svg(self) -> str:
        rows = self.rows()
        canvas = Canvas(self.title, self._summary())
        _legend(canvas)
        now = self._xen.now
        start = max(now - self._span, 0) if self._span is not None else 0
        scale = _Scale(start, max(now, start + 1))
        for place, row in enumerate(rows[:_SHOWN]):
            _Lane(canvas, row, _TOP + _ROW * place, scale).draw()
        bottom = _TOP + _ROW * len(rows[:_SHOWN])
        if not rows:
            canvas.text(16, bottom + 8, "No domain yet.", "d")
            bottom += 24
        if len(rows) > _SHOWN:
            canvas.text(16, bottom + 8, f"and {len(rows) - _SHOWN} more domains", "d")
            bottom += 24
        _axis(canvas, scale, bottom)
        return canvas.render(bottom + 30)


def time_by(record: VcpuTimeInfo, tsc: int) -> int:
    """Real time in nanoseconds by a time record, as a guest computes it: the formula of `clocks`."""
    passed = tsc - record.tsc_timestamp
    passed = passed << record.tsc_shift if record.tsc_shift >= 0 else passed >> -record.tsc_shift
    return int(record.system_time + (passed * record.tsc_to_system_mul >> 32))


def milliseconds(nanoseconds: int) -> str:
    """``12.34567`` for 12,345,670 nanoseconds: an instruction is the last digit."""
    return f"{nanoseconds // 1_000_000:,}.{nanoseconds % 1_000_000 // INSTRUCTION_NS:05}"


def clock_face(wall: datetime) -> str:
    """Date and time of day to the millisecond."""
    return f"{wall:%Y-%m-%d %H:%M:%S}.{wall.microsecond // 1000:03}"


def alarm_text(row: ClockRow, clock: str) -> str:
    """What an alarm is set to, in milliseconds of its clock."""
    return milliseconds(to_ns(row.alarms[clock])) if clock in row.alarms else "–"


def _fields(record: VcpuTimeInfo) -> tuple[int, ...]:
    return record.version, record.tsc_timestamp, record.system_time, record.tsc_to_system_mul, record.tsc_shift


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


@dataclass(frozen=True, slots=True)
class _Scale:
    """From times to places on the page."""

    start: int
    end: int

    def x(self, time: float) -> float:
        """Where a time stands; what is too early, at the left edge."""
        return _LANE_X + _LANE_WIDTH * (max(time, self.start) - self.start) / (self.end - self.start)


def _legend(canvas: Canvas) -> None:
    texts = ((16, "ran"), (76, "waited"), (156, "slept"))
    for (x, text), (what, width) in zip(texts, ((RAN, 18), (WAITED, 18), (SLEPT, 18)), strict=True):
        _block(canvas, what, x, 41, width, 12, "var(--dim)")
        canvas.text(x + width + 6, 52, text, "d s")
    signs = ((236, "set"), (300, REAL), (404, VIRTUAL), (520, POLL_NAME), (620, TICK_NAME), (680, "missed"))
    words = ("set", "real alarm", "virtual alarm", "end of a poll", "tick", "tick that did not come")
    for (x, name), word in zip(signs, words, strict=True):
        _sign(canvas, name, x, 47, "var(--ink)")
        canvas.text(x + 9, 52, word, "d s")


def _sign(canvas: Canvas, name: str, x: float, y: float, colour: str) -> None:
    """The mark of a timer, with its middle at (x, y)."""
    at = f"M{number(x)} {number(y)}"
    if name == REAL:
        canvas.path(f"{at}m-5 -5h10l-5 9z", fill=colour)
    elif name == VIRTUAL:
        canvas.path(f"{at}m0 -6l5 6l-5 6l-5 -6z", fill=colour)
    elif name == POLL_NAME:
        canvas.path(f"{at}m-4 -4h8v8h-8z", fill=colour)
    elif name == "set":
        canvas.path(f"{at}m-3 4v-8h5", stroke=colour, stroke_width="1.5", fill="none")
    elif name == TICK_NAME:
        canvas.path(f"{at}m0 -5v10", stroke=colour, stroke_width="2", fill="none")
    else:
        canvas.path(f"{at}m-3 -3l6 6m0 -6l-6 6", stroke=colour, stroke_width="1.2", fill="none")


def _block(canvas: Canvas, what: str, x: float, y: float, width: float, height: float, colour: str) -> None:
    if what == RAN:
        canvas.rect(x, y, width, height, fill=colour)
    elif what == WAITED:
        canvas.rect(x, y + 4, width, height - 8, fill="var(--soft)", stroke=colour)
    else:
        canvas.line(x, y + height / 2, x + width, y + height / 2, "", stroke=colour, stroke_width="1.5")


class _Lane:
    """One domain's numbers, and its time below them."""

    def __init__(self, canvas: Canvas, row: ClockRow, top: float, scale: _Scale) -> None:
        self._canvas, self._row, self._top, self._scale = canvas, row, top, scale
        self._colour = domain_colour(row.domid)

    def draw(self) -> None:
        """All of it."""
        self._numbers()
        self._blocks()
        for time, _clock in _last(self._row.sets, self._scale):
            self._mark("set", time, self._top + 40)
        for time, name in _last(self._row.went_off, self._scale):
            self._mark(name, time, self._top + (76 if name == TICK_NAME else 40))
        for time, name in _last([(time, "missed") for time in self._row.missed], self._scale):
            self._mark(name, time, self._top + 76)

    def _numbers(self) -> None:
        canvas, row, top = self._canvas, self._row, self._top
        canvas.chip(16, top + 6, row.domid, f"domain {row.domid}", 68)
        canvas.text(92, top + 6, f"{clip(row.name, 14)}", "b")
        canvas.text(196, top + 6, row.state, "d")
        canvas.text(256, top + 6, f"real {milliseconds(row.real_ns)} ms", "m")
        canvas.text(436, top + 6, f"virtual {milliseconds(row.virtual_ns)} ms", "m")
        canvas.text(WIDTH - 16, top + 6, f"wall {clock_face(row.wall)}", "m", anchor="end")
        record = row.record
        said = f"record v{record.version}: tsc {record.tsc_timestamp:,}, {record.system_time:,} ns"
        canvas.text(92, top + 23, said, "d s")
        canvas.text(WIDTH - 16, top + 23, self._timers(), "d s", anchor="end")

    def _timers(self) -> str:
        row = self._row
        parts = [f"{clock} alarm at {alarm_text(row, clock)} ms" for clock in (REAL, VIRTUAL) if clock in row.alarms]
        if row.ticks or row.missed:
            parts.append(f"{row.ticks} ticks came, {len(row.missed)} did not")
        return "; ".join(parts)

    def _blocks(self) -> None:
        end = self._scale.end - self._scale.start
        for what, since, until in _joined(self._row.stretches, max(end // _LANE_WIDTH, 1)):
            if until > self._scale.start:
                x = self._scale.x(since)
                width = max(self._scale.x(until) - x, 0.6)
                _block(self._canvas, what, x, self._top + 47, width, _LANE_HEIGHT, self._colour)

    def _mark(self, name: str, time: int, y: float) -> None:
        _sign(self._canvas, name, self._scale.x(time), y, "var(--ink)")


def _last(marks: list[tuple[int, str]], scale: _Scale) -> list[tuple[int, str]]:
    """The marks in sight; where there are too many to be told apart, one for each place."""
    seen = [mark for mark in marks if mark[0] >= scale.start]
    if len(seen) <= _MARKS:
        return seen
    length = scale.end - scale.start
    return list({(time * _MARKS // length, name): (time, name) for time, name in seen}.values())


def _joined(stretches: list[Stretch], least: int) -> list[Stretch]:
    """Stretches that are long enough to be seen; each shorter one becomes part of the one before it."""
    found: list[Stretch] = []
    for what, since, until in stretches:
        if found and (until - since < least or found[-1][0] == what):
            found[-1] = (found[-1][0], found[-1][1], until)
        elif until > since:
            found.append((what, since, until))
    return found


def _axis(canvas: Canvas, scale: _Scale, y: float) -> None:
    for part in range(5):
        time = scale.start + (scale.end - scale.start) * part // 4
        anchor = ("start", "middle", "middle", "middle", "end")[part]
        unit = " ms" if part == 4 else ""
        canvas.text(scale.x(time), y + 14, f"{milliseconds(to_ns(time))}{unit}", "m s d", anchor=anchor)
