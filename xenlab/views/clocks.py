"""Three clocks of each domain, side by side: real, virtual, wall-clock (lesson 09; paper 3.3.2).

For each domain a lane over time: a full block where it ran, an open one where it waited for the CPU, a line where it
slept.  On the lane's upper edge stand the alarms: where one was set, where one on real time went off, where one on
virtual time did.  On its lower edge stand its ticks, and small crosses where one should have come while it was away.
Choose one of these marks, and the lines below say how it came about, with the instruction that set the alarm.

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
from xenlab.views.clock_rows import RAN, SLEPT, WAITED, ClockRow, ClockRows, Setting, Stretch
from xenlab.views.code import CodeLine, CodeReader
from xenlab.views.palette import domain_colour
from xenlab.views.picture import Picture, table

_SHOWN = 5
_LANE_X, _LANE_WIDTH, _LANE_HEIGHT, _ROW, _TOP = 16, WIDTH - 32, 22, 106, 84
_MARKS = 60
_CODE_LINES = 4
# The end of the axis: these times a power of ten, and at least so many instructions.
_ROUND, _SHORTEST = (10, 12, 15, 20, 25, 30, 40, 50, 60, 80, 100), 1_000


class ClocksView(Picture):
    """The clocks of all domains, what they did, and their alarms and ticks.

    Args:
        xen: the machine, with a trace for what was before.
        span: how many instructions back the lanes reach; None: to the start.

    Attributes:
        selected: key of the mark that was chosen.
    """

    title = "Real, virtual and wall-clock time"

    def __init__(self, xen: Hypervisor, *, span: int | None = None) -> None:
        self._xen, self._span, self._code = xen, span, CodeReader(xen)
        self.selected: str | None = None

    def rows(self) -> list[ClockRow]:
        """What is shown of each domain, in order of their ids."""
        return ClockRows(self._xen).rows()

    def select(self, key: str) -> bool:
        if not any(mark.key == key for row in self.rows() for mark in marks_of(row)):
            return False
        self.selected = key
        return True

    def _chosen(self, rows: list[ClockRow]) -> Mark | None:
        """The mark that was chosen; the newest one if none was, or it is in the future again."""
        marks = [mark for row in rows for mark in marks_of(row)]
        selected = [mark for mark in marks if mark.key == self.selected] if self.selected else []
        return selected[0] if selected else max(marks, key=lambda mark: mark.time, default=None)

    def _code_of(self, mark: Mark) -> list[CodeLine]:
        eip = mark.cause.eip if mark.cause is not None else 0
        return self._code.around(mark.domid, eip, behind=True, before=2, after=1) if eip else []

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
        parts = [f"{self.title}: {self._summary()}", table(heads, clocks), table(names, records)]
        chosen = self._chosen(rows)
        if chosen is not None:
            parts.append("\n".join([chosen.label, *map(_code_text, self._code_of(chosen))]))
        return "\n\n".join(parts)

    def _summary(self) -> str:
        return f"{milliseconds(to_ns(self._xen.now))} ms since power-on"

    def svg(self) -> str:
        rows = self.rows()
        canvas = Canvas(self.title, self._summary())
        _legend(canvas)
        now = self._xen.now
        start = max(now - self._span, 0) if self._span is not None else 0
        chosen = self._chosen(rows)
        scale = _Scale(start, now if self._span is not None and now > start else _ceiling(now))
        for place, row in enumerate(rows[:_SHOWN]):
            _Lane(canvas, row, _TOP + _ROW * place, scale).draw(chosen)
        bottom = _TOP + _ROW * len(rows[:_SHOWN])
        if not rows:
            canvas.text(16, bottom + 8, "No domain yet.", "d")
            bottom += 24
        if len(rows) > _SHOWN:
            canvas.text(16, bottom + 8, f"and {len(rows) - _SHOWN} more domains", "d")
            bottom += 24
        _axis(canvas, scale, bottom)
        if chosen is not None:
            self._explain(canvas, chosen, bottom + 44)
        return canvas.render(bottom + 60 + 17 * _CODE_LINES)

    def _explain(self, canvas: Canvas, mark: Mark, y: float) -> None:
        canvas.text(16, y, mark.label, "b")
        for place, line in enumerate(self._code_of(mark)[:_CODE_LINES]):
            canvas.text(16, y + 19 + 17 * place, _code_text(line), "m" if line.here else "m d")


@dataclass(frozen=True, slots=True)
class Mark:
    """Something on a lane's edge.

    Attributes:
        domid, time, name: whose, when, what.
        cause: how the alarm was set, None for what no alarm is the cause of.
    """

    domid: int
    time: int
    name: str
    cause: Setting | None = None

    @property
    def key(self) -> str:
        """What it is chosen by."""
        return f"{self.domid}.{self.time}.{self.name}"

    @property
    def label(self) -> str:
        """What happened, in words."""
        return f"{milliseconds(to_ns(self.time))} ms, domain {self.domid}: {self._what()}"

    def _what(self) -> str:
        if self.cause is None:
            return _WITHOUT_CAUSE.get(self.name, f"the alarm on {self.name} time goes off")
        at, then = milliseconds(to_ns(self.cause.at)), milliseconds(to_ns(self.cause.time))
        if self.name == "set":
            return f"the alarm on {self.cause.clock} time is set to {at} ms"
        return f"the alarm on {self.name} time goes off; it was set to {at} ms of that clock at {then} ms"


_WITHOUT_CAUSE = {
    TICK_NAME: "a tick",
    POLL_NAME: "a poll has lasted as long as it may",
    "missed": "a tick is due, but the domain is away",
}


def marks_of(row: ClockRow) -> list[Mark]:
    """All marks of a domain."""
    marks = [Mark(row.domid, time, "missed") for time in row.missed]
    last: dict[str, Setting] = {}
    waiting = row.sets[::-1]
    for time, name in row.went_off:
        while waiting and waiting[-1].time <= time:
            setting = waiting.pop()
            last[setting.clock] = setting
        marks.append(Mark(row.domid, time, name, last.get(name)))
    return [Mark(row.domid, setting.time, "set", setting) for setting in row.sets] + marks


def _code_text(line: CodeLine) -> str:
    return f"{'▶' if line.here else ' '} {line.address:#010x}  {clip(line.text, 44):<44}  {line.label}".rstrip()


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

    def draw(self, chosen: Mark | None) -> None:
        """All of it."""
        self._numbers()
        self._blocks()
        now = self._scale.x(self._row.real_ns // INSTRUCTION_NS)
        self._canvas.line(now, self._top + 36, now, self._top + 80, stroke_dasharray="2 3")
        for mark in _told_apart(marks_of(self._row), self._scale):
            self._mark(mark, mark == chosen)

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

    def _mark(self, mark: Mark, selected: bool) -> None:
        x, y = self._scale.x(mark.time), self._top + (76 if mark.name in (TICK_NAME, "missed") else 40)
        self._canvas.open_event(mark.key, mark.label, selected=selected)
        self._canvas.rect(x - 7, y - 8, 14, 16, "hit", rx="3")
        _sign(self._canvas, mark.name, x, y, "var(--ink)")
        self._canvas.close()


def _told_apart(marks: list[Mark], scale: _Scale) -> list[Mark]:
    """The marks in sight; where there are too many to be told apart, one of a kind for each place."""
    seen = [mark for mark in marks if mark.time >= scale.start]
    if len(seen) <= _MARKS:
        return seen
    length = scale.end - scale.start
    return list({(mark.time * _MARKS // length, mark.name): mark for mark in seen}.values())


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
