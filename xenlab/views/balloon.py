"""Memory of all domains against their targets, now and over time (lesson 13; paper 3.3.4).

Above, a bar for each domain: filled is what it has, the triangle is its target, the bracket goes from its
minimum to its maximum.  Below, the same over time: what it had as a thick line, its target as a dotted one.

What was before comes from the MEMORY events of the trace, and what is now from the domains and their store pages.
"""

from __future__ import annotations

from dataclasses import dataclass

from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.trace import HAS, TARGET, Kind
from xenlab.toolstack.balloon import read_store
from xenlab.views.canvas import WIDTH, Canvas, clip, number, printable
from xenlab.views.palette import domain_colour, domain_dash
from xenlab.views.picture import Picture, table

_SHOWN = 6
_BAR_X, _BAR_WIDTH, _ROW, _TOP = 190, 560, 40, 66
_PLOT_X, _PLOT_WIDTH, _PLOT_HEIGHT = 64, WIDTH - 64 - 24, 180
_POINTS = 240
_PAGE_KIB = 4
_ROUND = (1, 2, 3, 4, 5, 6, 8)

Points = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """One domain's memory, in pages.

    Attributes:
        domid, name: whose.
        has, least, most: now.
        target: what it was told last, None if nothing.
        need: what its driver says that it could use, None if it has none.
        history, targets: ``(time, pages)`` from when on it had so much, and was told so much.
    """

    domid: int
    name: str
    has: int
    least: int
    most: int
    target: int | None
    need: int | None
    history: Points
    targets: Points


class BalloonView(Picture):
    """Pages that each domain has, should have, and may have.

    Args:
        xen: the machine, with a trace for what was before.
        span: how many instructions back the curves reach; None: to the start.
    """

    title = "Memory and targets"

    def __init__(self, xen: Hypervisor, *, span: int | None = None) -> None:
        self._xen, self._span = xen, span

    def rows(self) -> list[MemoryRow]:
        """What is shown of each domain, in order of their ids."""
        points = self._points()
        return [self._row(domain, points) for _domid, domain in sorted(self._xen.domains.items())]

    def _row(self, domain: Domain, points: dict[tuple[int, str], Points]) -> MemoryRow:
        domid, words = domain.domid, read_store(self._xen, domain)
        targets = points.get((domid, TARGET), [])
        return MemoryRow(
            domid,
            printable(domain.name),
            domain.pages,
            domain.least_pages,
            domain.most_pages,
            targets[-1][1] if targets else None,
            words.need if words.have and not domain.ended else None,
            points.get((domid, HAS), []),
            targets,
        )

    def _points(self) -> dict[tuple[int, str], Points]:
        """By domain and by what they count, the numbers and since when they held."""
        found: dict[tuple[int, str], Points] = {}
        kind, now = int(Kind.MEMORY), self._xen.now
        for raw in self._xen.trace.raw() if self._xen.trace is not None else ():
            if raw[1] == kind and raw[0] <= now:
                found.setdefault((raw[2], raw[3]), []).append((raw[0], raw[4]))
        return found

    def text(self) -> str:
        rows = [
            (
                str(row.domid),
                row.name,
                str(row.has),
                _or_dash(row.target),
                _or_dash(row.need),
                str(row.least),
                str(row.most),
                f"{min((pages for _time, pages in row.history), default=row.has)}",
                f"{max((pages for _time, pages in row.history), default=row.has)}",
            )
            for row in self.rows()
        ]
        headings = ("domain", "name", "pages", "target", "needs", "minimum", "maximum", "fewest so far", "most so far")
        return f"{self.title}: {self._summary()}\n\n" + table(headings, rows)

    def _summary(self) -> str:
        free = self._xen.frames.free_frames
        return f"{self._xen.now:,} instructions, {free:,} pages ({free * _PAGE_KIB:,} KiB) free"

    def svg(self) -> str:
        rows = self.rows()
        canvas = Canvas(self.title, self._summary())
        shown = rows[:_SHOWN]
        # A maximum may be far beyond what there is at all.
        top = max((max(row.has, min(row.most, self._xen.frames.count)) for row in shown), default=1)
        canvas.text(_BAR_X, 50, "filled: what it has    ▼ target    [ ] minimum and maximum", "d s")
        for place, row in enumerate(shown):
            _bar(canvas, row, _TOP + _ROW * place, _BAR_WIDTH / max(top, 1))
        bottom = _TOP + _ROW * len(shown)
        if len(rows) > _SHOWN:
            bottom += 18
            canvas.text(16, bottom, f"and {len(rows) - _SHOWN} more domains", "d")
        if not rows:
            bottom += 24
            canvas.text(16, bottom, "No domain yet.", "d")
        return canvas.render(self._curves(canvas, shown, bottom + 26) + 14)

    def _curves(self, canvas: Canvas, rows: list[MemoryRow], top: float) -> float:
        now = self._xen.now
        start = max(now - self._span, 0) if self._span is not None else 0
        pages = [pages for row in rows for _time, pages in (*row.history, *row.targets)]
        highest = _ceiling(max(pages, default=1))
        plot = _Plot(canvas, top, start, max(now, start + 1), highest)
        plot.frame()
        for row in rows:
            plot.curve(row.targets, domain_colour(row.domid), dash="2 3", width="1.5", now=now)
        for row in rows:
            plot.curve(row.history, domain_colour(row.domid), dash=domain_dash(row.domid), width="2.5", now=now)
        return top + _PLOT_HEIGHT + 26


def _or_dash(value: int | None) -> str:
    return "–" if value is None else str(value)


def _ceiling(value: int) -> int:
    """The next round number from ``value`` on."""
    scale = 1
    while True:
        for step in _ROUND:
            if step * scale >= value:
                return step * scale
        scale *= 10


def _bar(canvas: Canvas, row: MemoryRow, top: float, scale: float) -> None:
    colour = domain_colour(row.domid)
    canvas.chip(16, top + 17, row.domid, f"domain {row.domid}", 68)
    canvas.text(92, top + 17, clip(row.name, 12))
    canvas.rect(_BAR_X, top + 4, _BAR_WIDTH, 16, "soft", rx="2")
    canvas.rect(_BAR_X, top + 4, min(row.has * scale, _BAR_WIDTH), 16, fill=colour, rx="2")
    for pages, step in ((row.least, 4), (row.most, -4)):
        x = _BAR_X + min(pages * scale, _BAR_WIDTH)
        shape = f"M{number(x + step)} {number(top + 1)}h{-step}v22h{step}"
        canvas.path(shape, stroke="var(--ink)", stroke_width="2", fill="none")
    if row.target is not None:
        x = _BAR_X + min(row.target * scale, _BAR_WIDTH)
        canvas.path(f"M{number(x)} {number(top + 5)}l-6 -8h12z", fill="var(--ink)")
    told = "" if row.target is None else f" → {row.target:,}"
    canvas.text(WIDTH - 16, top + 12, f"{row.has:,}{told}", "m", anchor="end")
    if row.need is not None:
        canvas.text(WIDTH - 16, top + 26, f"needs {row.need:,}", "d s", anchor="end")


class _Plot:
    """Pages over time."""

    def __init__(self, canvas: Canvas, top: float, start: int, end: int, highest: int) -> None:
        self._canvas, self._top, self._start, self._end, self._highest = canvas, top, start, end, highest

    def _x(self, time: int) -> float:
        return _PLOT_X + _PLOT_WIDTH * (max(time, self._start) - self._start) / (self._end - self._start)

    def _y(self, pages: int) -> float:
        return self._top + _PLOT_HEIGHT * (1 - pages / self._highest)

    def frame(self) -> None:
        """Axes with a few numbers."""
        canvas = self._canvas
        for part in range(5):
            pages = self._highest * part // 4
            canvas.line(_PLOT_X, self._y(pages), _PLOT_X + _PLOT_WIDTH, self._y(pages))
            canvas.text(_PLOT_X - 8, self._y(pages) + 4, f"{pages:,}", "m s d", anchor="end")
        below = self._top + _PLOT_HEIGHT + 18
        canvas.text(_PLOT_X, below, f"{self._start:,}", "m s d")
        canvas.text(_PLOT_X + _PLOT_WIDTH, below, f"{self._end:,} instructions", "m s d", anchor="end")
        canvas.text(_PLOT_X + _PLOT_WIDTH / 2, below, "pages over time; dotted: targets", "s d", anchor="middle")

    def curve(self, points: Points, colour: str, *, dash: str, width: str, now: int) -> None:
        """A line of steps; at most so many points as can be told apart."""
        shown = _thinned([(time, pages) for time, pages in points if time >= self._start], self._end - self._start)
        before = [pages for time, pages in points if time < self._start][-1:]
        if before:
            shown.insert(0, (self._start, before[0]))
        if not shown:
            return
        parts = [f"M{number(self._x(shown[0][0]))} {number(self._y(shown[0][1]))}"]
        parts += [f"H{number(self._x(time))}V{number(self._y(pages))}" for time, pages in shown[1:]]
        parts.append(f"H{number(self._x(now))}")
        self._canvas.path("".join(parts), stroke=colour, stroke_width=width, stroke_dasharray=dash, fill="none")


def _thinned(points: Points, length: int) -> Points:
    """The last point in each of `_POINTS` equal parts of the time."""
    by_part = {time * _POINTS // max(length, 1): (time, pages) for time, pages in points}
    return list(by_part.values())
