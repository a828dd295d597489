"""Three clocks of each domain, side by side: real, virtual, wall-clock (lesson 09; paper 3.3.2).

For each domain a lane over time: a full block where it ran, an open one where it waited for the CPU, a line where it
slept.  On the lane's upper edge stand the alarms: where one was set, where one on real time went off, where one on
virtual time did.  On its lower edge stand its ticks, and small crosses where one should have come while it was away.

What is shown is put together in `clock_rows`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from xenlab.abi.structures import VcpuTimeInfo
from xenlab.hypervisor.alarms import REAL, VIRTUAL
from xenlab.hypervisor.clocks import INSTRUCTION_NS, to_ns
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.timers import POLL_NAME, TICK_NAME
from xenlab.views.canvas import WIDTH, Canvas, clip, number
from xenlab.views.clock_rows import RAN, SLEPT, WAITED, ClockRow, ClockRows, Stretch
from xenlab.views.palette import domain_colour
from xenlab.views.picture import Picture, table

_SHOWN = 5
_LANE_X, _LANE_WIDTH, _LANE_HEIGHT, _ROW, _TOP = 16, WIDTH - 32, 22, 106, 84
_MARKS = 150
# The end of the axis: these times a power of ten, and at least so many instructions.
_ROUND, _SHORTEST = (10, 12, 15, 20, 25, 30, 40, 50, 60, 80, 100), 1_000


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
        return ClockRows(self._xen).rows()

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
        scale = _Scale(start, now if self._span is not None and now > start else _ceiling(now))
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


@dataclass(frozen=True, slots=True)
class _Scale:
    """From times to places on the page."""

    start: int
    end: int

    def x(self, time: float) -> float:
        """Where a time stands; what is too early, at the left edge."""
        return _LANE_X + _LANE_WIDTH * (max(time, self.start) - self.start) / (self.end - self.start)


def _ceiling(now: int) -> int:
    """The next round number behind now, so that the lanes do not shrink at each step."""
    unit = _SHORTEST // 10
    while unit * 100 < now:
        unit *= 10
    return next(unit * step for step in _ROUND if unit * step >= now)


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
        now = self._scale.x(self._row.real_ns // INSTRUCTION_NS)
        self._canvas.line(now, self._top + 36, now, self._top + 80, stroke_dasharray="2 3")
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
            parts.append(f"ticks: {row.ticks} came, {len(row.missed)} did not")
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
