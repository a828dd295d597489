"""Who ran when, how far the virtual clocks had come, and how long a woken one waited (lesson 10; paper 3.3.1).

Above, a lane for each domain, drawn as in the view of the clocks: a full block while it runs, an open one while it
could run and waits, a line while it sleeps; a triangle where it woke.  Below, its clocks: solid the actual virtual
time, dashed the effective one where a warp sets it back; thin while it sleeps.  At the bottom a stem for each wake-up,
as high as the wait for the CPU was long.

Who ran comes from the SWITCH events of the trace; who was told what, and the clocks, from the scheduler's `Diary`, if
it has one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.schedulers.diary import NOBODY, PICK, SLEEP, WAKE, Diary, Line
from xenlab.hypervisor.schedulers.parameters import DEFAULT_WEIGHT
from xenlab.hypervisor.trace import Kind
from xenlab.views.canvas import WIDTH, Canvas, clip, number, printable
from xenlab.views.palette import domain_colour, domain_dash
from xenlab.views.picture import Picture, table

_SHOWN = 8
_X, _PLOT_WIDTH = 190, WIDTH - 190 - 172
_TOP, _LANE, _CLOCKS, _WAITS = 52.0, 34, 170, 62
DEFAULT_SPAN = 60_000

Stretch = tuple[int, int]


@dataclass(slots=True)
class Lane:
    """One vCPU in the time that is shown.

    Attributes:
        vcpu, domid, name: whose.
        runs: from when to when it ran.
        ready: from when to when it could run.
        wakes: when it woke, and how long it then waited; None while it waits.
        clocks: (time, actual, effective virtual time), each from then on.
        parameters: of the scheduler, now.
    """

    vcpu: int
    domid: int
    name: str
    runs: list[Stretch] = field(default_factory=list)
    ready: list[Stretch] = field(default_factory=list)
    wakes: list[tuple[int, int | None]] = field(default_factory=list)
    clocks: list[tuple[int, int, int]] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=dict)

    @property
    def ran(self) -> int:
        """For how many of the instructions that are shown it ran."""
        return sum(end - start for start, end in self.runs)

    @property
    def waits(self) -> list[int]:
        """How long it waited after each wake-up."""
        return [wait for _time, wait in self.wakes if wait is not None]


class ScheduleView(Picture):
    """Turns, virtual clocks and waits of the last instructions.

    Args:
        xen: the machine, with a trace; for clocks and wake-ups, with a `Diary` for a scheduler.
        span: how many instructions back the picture reaches.
    """

    title = "Who ran when"

    def __init__(self, xen: Hypervisor, *, span: int = DEFAULT_SPAN) -> None:
        self._xen, self._span = xen, span

    @property
    def _start(self) -> int:
        return max(self._xen.now - self._span, 0)

    def lanes(self) -> list[Lane]:
        """What is shown, in the order of the domains."""
        lanes = {key: self._lane(key) for key in sorted(self._xen.vcpus)}
        self._add_runs(lanes)
        scheduler = self._xen.scheduler
        if isinstance(scheduler, Diary):
            _Reader(lanes, self._start, self._xen.now).read(scheduler)
        return list(lanes.values())

    def _lane(self, key: int) -> Lane:
        vcpu = self._xen.vcpus[key]
        domain, name = vcpu.domain, printable(vcpu.domain.name)
        if len(domain.vcpus) > 1:
            name = f"{name}, vCPU {vcpu.number}"
        parameters = getattr(self._xen.scheduler, "parameters", None)
        return Lane(key, domain.domid, name, parameters=parameters(key) if parameters else {})

    def _add_runs(self, lanes: dict[int, Lane]) -> None:
        trace, start, now = self._xen.trace, self._start, self._xen.now
        kind, end, runner = int(Kind.SWITCH), now, self._xen.current.key if self._xen.current is not None else -1
        for raw in reversed(trace.raw()) if trace is not None else ():
            if raw[1] != kind:
                continue
            if runner in lanes and max(raw[0], start) < end:
                lanes[runner].runs.append((max(raw[0], start), end))
            end, runner = raw[0], raw[3]
            if end <= start:
                break
        else:
            if runner in lanes and start < end:
                lanes[runner].runs.append((start, end))
        for lane in lanes.values():
            lane.runs.reverse()

    def text(self) -> str:
        shown = max(self._xen.now - self._start, 1)
        rows = [
            (
                str(lane.domid),
                lane.name,
                _state(self._xen, lane.vcpu),
                f"{lane.ran / shown:.1%}",
                _or_dash(lane.parameters.get("weight")),
                _or_dash(lane.parameters.get("warp")),
                _or_dash(lane.clocks[-1][1] if lane.clocks else None),
                _or_dash(lane.clocks[-1][2] if lane.clocks else None),
                str(len(lane.wakes)),
                _or_dash(round(sum(lane.waits) / len(lane.waits)) if lane.waits else None),
                _or_dash(max(lane.waits, default=None)),
            )
            for lane in self.lanes()
        ]
        headings = ("domain", "name", "state", "ran", "weight", "warp", "virtual time", "effective")
        return f"{self.title}: {self._summary()}\n\n" + table((*headings, "woke", "mean wait", "longest wait"), rows)

    def _summary(self) -> str:
        return f"instructions {self._start:,} to {self._xen.now:,}, {self._kind()}"

    def _kind(self) -> str:
        scheduler = self._xen.scheduler
        inner = scheduler.scheduler if isinstance(scheduler, Diary) else scheduler
        allowance = getattr(inner, "allowance", None)
        allowed = f", allowance {allowance:,}" if isinstance(allowance, int) else ""
        return f"{type(inner).__name__}{allowed}"

    def svg(self) -> str:
        lanes = self.lanes()
        shown = lanes[:_SHOWN]
        canvas = Canvas(self.title, self._summary())
        canvas.text(_X, 46, "full: runs    open: could run and waits    line: sleeps    ▲ woke", "d s")
        axis = _Axis(self._start, max(self._xen.now, self._start + 1))
        for place, lane in enumerate(shown):
            _draw_lane(canvas, axis, lane, _TOP + _LANE * place)
        bottom = _TOP + _LANE * len(shown) + 4
        axis.draw(canvas, bottom + 12)
        bottom += 22
        if len(lanes) > _SHOWN:
            canvas.text(16, bottom, f"and {len(lanes) - _SHOWN} more domains", "d")
        if any(lane.clocks for lane in shown):
            bottom = _draw_clocks(canvas, axis, shown, bottom + 18)
        if any(lane.wakes for lane in shown):
            bottom = _draw_waits(canvas, axis, shown, bottom + 26)
        return canvas.render(bottom + 12)


class _Reader:
    """Reads a diary into lanes."""

    def __init__(self, lanes: dict[int, Lane], start: int, now: int) -> None:
        self._lanes, self._start, self._now = lanes, start, now
        self._since: dict[int, int] = {}
        self._woke: dict[int, int] = {}
        self._known: set[int] = set()
        self._running = NOBODY

    def read(self, diary: Diary) -> None:
        before: Line | None = None
        for line in diary.lines():
            lane = self._lanes.get(line.vcpu)
            if lane is not None:
                self._note(lane, line)
            if line.time >= self._start:
                self._add_clocks(before, line)
            before = line
            if line.what == PICK:
                self._running = line.vcpu
        if before is not None:
            self._go_on(before)
        for vcpu, since in self._since.items():
            self._add_ready(self._lanes[vcpu], since, self._now)
        for vcpu, woke in self._woke.items():
            if woke >= self._start:
                self._lanes[vcpu].wakes.append((woke, None))

    def _note(self, lane: Lane, line: Line) -> None:
        if line.what == WAKE:
            self._since[lane.vcpu] = line.time
            if lane.vcpu in self._known:  # the first time is its start
                self._woke[lane.vcpu] = line.time
            self._known.add(lane.vcpu)
        elif line.what == SLEEP:
            self._add_ready(lane, self._since.pop(lane.vcpu, line.time), line.time)
            self._woke.pop(lane.vcpu, None)
        elif line.what == PICK and lane.vcpu in self._woke:
            woke = self._woke.pop(lane.vcpu)
            if woke >= self._start:
                lane.wakes.append((woke, line.time - woke))

    def _add_ready(self, lane: Lane, since: int, until: int) -> None:
        if until > self._start:
            lane.ready.append((max(since, self._start), until))

    def _add_clocks(self, before: Line | None, line: Line) -> None:
        """Up to ``line`` only the clock of whoever ran went on; there some may jump."""
        old = {vcpu: both for vcpu, *both in before.clocks} if before is not None else {}
        for vcpu, actual, effective in line.clocks:
            if vcpu not in self._lanes:
                continue
            clocks = self._lanes[vcpu].clocks
            if before is not None and vcpu in old:
                gone = actual - old[vcpu][0] if vcpu == self._running else 0
                if not clocks:  # the picture begins between two lines
                    part = gone * (self._start - before.time) // max(line.time - before.time, 1)
                    clocks.append((max(self._start, before.time), old[vcpu][0] + part, old[vcpu][1] + part))
                clocks.append((line.time, old[vcpu][0] + gone, old[vcpu][1] + gone))
            clocks.append((line.time, actual, effective))

    def _go_on(self, last: Line) -> None:
        """To the present moment."""
        runs = self._lanes.get(self._running)
        gone = (self._now - last.time) * DEFAULT_WEIGHT // runs.parameters.get("weight", DEFAULT_WEIGHT) if runs else 0
        clocks = (
            (vcpu, actual + gone * (vcpu == self._running), effective + gone * (vcpu == self._running))
            for vcpu, actual, effective in last.clocks
        )
        self._add_clocks(last, Line(self._now, PICK, self._running, tuple(clocks)))


@dataclass(frozen=True, slots=True)
class _Axis:
    """Time from left to right."""

    start: int
    end: int

    def x(self, time: float) -> float:
        return _X + _PLOT_WIDTH * (time - self.start) / (self.end - self.start)

    def draw(self, canvas: Canvas, y: float) -> None:
        canvas.text(_X, y, f"{self.start:,}", "m s d")
        canvas.text(_X + _PLOT_WIDTH, y, f"{self.end:,} instructions", "m s d", anchor="end")


def _state(xen: Hypervisor, key: int) -> str:
    vcpu = xen.vcpus[key]
    return "runs" if vcpu is xen.current else vcpu.run_state.name.lower()


def _or_dash(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _draw_lane(canvas: Canvas, axis: _Axis, lane: Lane, top: float) -> None:
    colour, middle = domain_colour(lane.domid), top + 15
    canvas.chip(16, top + 19, lane.domid, f"domain {lane.domid}", 68)
    canvas.text(92, top + 19, clip(lane.name, 13))
    if lane.ready:
        canvas.line(axis.x(axis.start), middle, axis.x(axis.end), middle, "", stroke=colour, stroke_width="1.5")
    for start, end in lane.ready:
        width = max(axis.x(end) - axis.x(start), 0.6)
        canvas.rect(axis.x(start), middle - 6, width, 12, fill="var(--soft)", stroke=colour)
    blocks = "".join(
        f"M{number(axis.x(start))} {number(top + 5)}h{number(max(axis.x(end) - axis.x(start), 0.6))}v20"
        f"H{number(axis.x(start))}z"
        for start, end in lane.runs
    )
    if blocks:
        dash = domain_dash(lane.domid)
        canvas.path(blocks, fill=colour, stroke="var(--ink)" if dash else "", stroke_dasharray=dash)
    for time, _wait in lane.wakes:
        canvas.path(f"M{number(axis.x(time))} {number(top + 25)}l-4 7h8z", fill="var(--ink)")
    shown = max(axis.end - axis.start, 1)
    canvas.text(WIDTH - 16, top + 13, f"{lane.ran / shown:.1%}", "m", anchor="end")
    set_to = "  ".join(f"{name} {lane.parameters[name]:,}" for name in ("weight", "warp") if lane.parameters.get(name))
    canvas.text(WIDTH - 16, top + 26, set_to, "d s", anchor="end")


def _draw_clocks(canvas: Canvas, axis: _Axis, lanes: list[Lane], top: float) -> float:
    times = [time for lane in lanes for _moment, *both in lane.clocks for time in both]
    least, most = min(times), max(max(times), min(times) + 1)

    def y(time: int) -> float:
        return top + _CLOCKS * (1 - (time - least) / (most - least))

    _panel(canvas, top, _CLOCKS, "virtual time", "dashed: effective", (f"{most:,}", f"{least:,}"))
    for lane in lanes:
        points = _thinned(lane.clocks, axis)
        for style, path in (
            ({"stroke_width": "1", "stroke_dasharray": "1 3"}, _curve(axis, y, points, 1, lambda _one, _other: True)),
            (
                {"stroke_width": "1.5", "stroke_dasharray": "5 3"},
                _curve(axis, y, points, 2, lambda one, other: one[1] != one[2] or other[1] != other[2]),
            ),
            ({"stroke_width": "2"}, _curve(axis, y, points, 1, lambda one, _other, lane=lane: _is_ready(lane, one[0]))),
        ):
            if path:
                canvas.path(path, stroke=domain_colour(lane.domid), fill="none", **style)
    return top + _CLOCKS


def _is_ready(lane: Lane, time: int) -> bool:
    return any(start <= time < end for start, end in lane.ready)


def _curve(
    axis: _Axis, y: Callable[[int], float], points: list[tuple[int, int, int]], which: int, drawn: Callable[..., bool]
) -> str:
    """From point to point, for each two that are ``drawn``."""
    parts, pen_at = [], None
    for first, second in pairwise(points):
        if not drawn(first, second):
            continue
        if pen_at != first:
            parts.append(f"M{number(axis.x(first[0]))} {number(y(first[which]))}")
        parts.append(f"L{number(axis.x(second[0]))} {number(y(second[which]))}")
        pen_at = second
    return "".join(parts)


def _thinned(points: list[tuple[int, int, int]], axis: _Axis) -> list[tuple[int, int, int]]:
    """At most the first and the last point of each pixel."""
    by_pixel: dict[int, list[tuple[int, int, int]]] = {}
    for point in points:
        by_pixel.setdefault(int(axis.x(point[0])), []).append(point)
    return [point for some in by_pixel.values() for point in (some[:1] if len(some) == 1 else (some[0], some[-1]))]


def _draw_waits(canvas: Canvas, axis: _Axis, lanes: list[Lane], top: float) -> float:
    most = max((wait for lane in lanes for wait in lane.waits), default=0)
    _panel(canvas, top, _WAITS, "waited", "after waking", (f"{most:,}", "0"))
    for lane in lanes:
        for time, wait in lane.wakes:
            x, height = axis.x(time), _WAITS * (wait or 0) / max(most, 1)
            bottom = top + _WAITS
            canvas.line(x, bottom, x, bottom - height, "", stroke=domain_colour(lane.domid), stroke_width="2")
            if wait is not None:
                canvas.circle(x, bottom - height, 3, fill=domain_colour(lane.domid))
    return top + _WAITS


def _panel(canvas: Canvas, top: float, height: float, name: str, more: str, scale: tuple[str, str]) -> None:
    canvas.text(16, top + 14, name)
    canvas.text(16, top + 30, more, "d s")
    for place, label in zip((top, top + height), scale, strict=True):
        canvas.line(_X, place, _X + _PLOT_WIDTH, place)
        canvas.text(_X - 8, place + 4, label, "m s d", anchor="end")


__all__ = ["Lane", "ScheduleView"]
