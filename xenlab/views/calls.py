"""The conversation between guests and hypervisor, line by line (lessons 02, 03; paper 2.1, 3.1).

A sequence chart: time runs downwards, the lanes are the rings, an arrow is a crossing.  One
line can be chosen; below the chart stand its registers, its result and the code at its site.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.trace import NO_DOMAIN, Kind
from xenlab.machine.engine import GENERAL
from xenlab.views.canvas import WIDTH, Canvas, clip
from xenlab.views.code import CodeLine, CodeReader
from xenlab.views.palette import APPLICATION, HYPERVISOR, KERNEL, domain_colour
from xenlab.views.picture import Picture, table
from xenlab.views.story import Step, answer_text, describe, last_steps, owner_of, site

_LANES = {3: 218.0, 1: 320.0, 0: 422.0}
_HEADS = {3: ("application", APPLICATION), 1: ("guest kernel", KERNEL), 0: ("hypervisor", HYPERVISOR)}
_ROW, _TOP, _TEXT_X = 25, 76, 446
_DETAIL_HEIGHT = 36 + 18 * 7  # a trap has thirteen values, two on a line
_DASHES = {Kind.TRAP: "7 3", Kind.DELIVER: "2 3", Kind.UPCALL: "2 3", Kind.EMULATE: "7 3"}


@dataclass(frozen=True, slots=True)
class Detail:
    """What is behind one line: named values, and the code at its site."""

    headline: str
    values: tuple[tuple[str, str], ...]
    code: tuple[CodeLine, ...]


class CallTimeline(Picture):
    """The last events as a sequence chart, with the details of the chosen one.

    Args:
        count: how many lines.
        sources: assembly source by domain id, where it is at hand.
    """

    title = "Calls and traps in time"

    def __init__(self, xen: Hypervisor, *, count: int = 12, sources: Mapping[int, str] | None = None) -> None:
        self._xen, self._count = xen, count
        self._code = CodeReader(xen, sources)
        self.selected: str | None = None

    def steps(self) -> list[Step]:
        """The lines of the chart, oldest first."""
        return last_steps(self._xen, self._count)

    def select(self, key: str) -> bool:
        if not any(step.key == key for step in self.steps()):
            return False
        self.selected = key
        return True

    def chosen(self, steps: list[Step]) -> Step | None:
        """The selected line; the newest one with a site in code, if none is selected or it has scrolled away."""
        selected = [step for step in steps if step.key == self.selected]
        return next((step for step in selected or reversed(steps) if selected or site(step.event)), None)

    def detail(self, step: Step) -> Detail:
        """Registers, results and disassembly of one line."""
        event = step.event
        place = site(event)
        code = self._code.around(event.domain, place[0], behind=place[1], before=3, after=2) if place else []
        return Detail(f"{event.time:,}  {describe(self._xen, step)}", _values(step), tuple(code))

    def text(self) -> str:
        steps = self.steps()
        rows = [(f"{step.event.time:,}", self._who(step), describe(self._xen, step)) for step in steps]
        parts = [f"{self.title}: the last {len(rows)} events", table(("time", "domain", "event"), rows)]
        chosen = self.chosen(steps)
        if chosen is not None:
            parts.append(_detail_text(self.detail(chosen)))
        return "\n\n".join(parts)

    def svg(self) -> str:
        steps = self.steps()
        canvas = Canvas(self.title, f"the last {len(steps)} events")
        # As high as it can become, so that nothing below moves while the run plays.
        bottom = _TOP + _ROW * self._count + 4
        self._lanes(canvas, bottom)
        chosen = self.chosen(steps)
        for place, step in enumerate(steps):
            self._line(canvas, step, _TOP + _ROW * place, step is chosen)
        if not steps:
            canvas.text(_TEXT_X, _TOP + 17, "Nothing has happened yet.", "d")
        if chosen is not None:
            _draw_detail(canvas, self.detail(chosen), bottom + 8)
        return canvas.render(bottom + _DETAIL_HEIGHT + 16)

    def _lanes(self, canvas: Canvas, bottom: float) -> None:
        for ring, x in _LANES.items():
            name, colour = _HEADS[ring]
            canvas.rect(x - 48, 42, 96, 20, fill=colour, rx="4")
            canvas.text(x, 56, f"{ring} {name}", "k s b", anchor="middle")
            canvas.line(x, 62, x, bottom, stroke_width="1.5")

    def _line(self, canvas: Canvas, step: Step, top: float, selected: bool) -> None:
        text, event, y = describe(self._xen, step), step.event, top + 17
        canvas.open_event(step.key, f"{event.time:,} {self._who(step)}: {text}", selected=selected)
        canvas.rect(8, top, WIDTH - 16, _ROW, "hit", rx="4")
        canvas.text(98, y, f"{event.time:,}", "m d", anchor="end")
        domain = self._domain(step)
        canvas.chip(106, y, domain, f"dom {domain}" if domain >= 0 else "xen", 50)
        _draw_crossing(canvas, step, y - 4, domain)
        canvas.text(_TEXT_X, y, clip(text, 57), "m")
        canvas.close()

    def _domain(self, step: Step) -> int:
        return owner_of(self._xen, step.event.to_vcpu) if step.event.kind is Kind.SWITCH else step.event.domain

    def _who(self, step: Step) -> str:
        domain = self._domain(step)
        return str(domain) if domain != NO_DOMAIN else "xen"


def _values(step: Step) -> tuple[tuple[str, str], ...]:
    rows = []
    for name, value in step.event.values.items():
        if name == "registers":
            rows += [(register, f"{word:08x}") for register, word in zip(GENERAL, value, strict=True)]
        elif name in ("words", "changes", "code", "data"):
            continue
        elif name in ("eip", "address", "handler", "frame"):
            rows.append((name, f"{value:08x}"))
        else:
            rows.append((name, str(value)))
    return (*rows, ("result", answer_text(step.result))) if step.result is not None else tuple(rows)


def _detail_text(detail: Detail) -> str:
    lines = [detail.headline, "  ".join(f"{name}={value}" for name, value in detail.values)]
    lines += [
        f"{'>' if line.here else ' '} {line.address:08x}  {line.text:<32} {line.source or line.label}"
        for line in detail.code
    ]
    return "\n".join(line.rstrip() for line in lines)


def _draw_crossing(canvas: Canvas, step: Step, y: float, domain: int) -> None:
    """The arrow of one line, or a mark in the hypervisor's lane where nothing crosses."""
    event, colour = step.event, domain_colour(domain)
    kernel, inner = _LANES[1], _LANES[0]
    dash = _DASHES.get(event.kind, "")
    if event.kind is Kind.HYPERCALL:
        canvas.arrow(kernel, y, inner, y, colour)
    elif event.kind is Kind.TRAP:
        canvas.arrow(_LANES.get(event.ring, kernel), y, inner, y, colour, dash)
    elif event.kind in (Kind.DELIVER, Kind.UPCALL, Kind.IRET):
        canvas.arrow(inner, y, _LANES.get(event.to_ring, kernel), y, colour, dash)
    elif event.kind is Kind.GATE:
        canvas.arrow(_LANES.get(event.from_ring, kernel), y, _LANES.get(event.to_ring, kernel), y, colour, dash)
    elif event.kind is Kind.SWITCH:
        canvas.line(_LANES[3] - 40.0, y, inner, y, "", stroke=colour, stroke_width="4")
    else:
        canvas.path(f"M{inner - 6} {y:g}l6 -6l6 6l-6 6z", fill=colour)


def _draw_detail(canvas: Canvas, detail: Detail, top: float) -> None:
    canvas.rect(16, top, WIDTH - 32, _DETAIL_HEIGHT, "soft", rx="6")
    canvas.text(28, top + 21, clip(detail.headline, 108), "m b")
    for place, (name, value) in enumerate(detail.values):
        x, y = 28 + 150 * (place % 2), top + 44 + 18 * (place // 2)
        canvas.text(x, y, name, "m d")
        canvas.text(x + 60, y, clip(value, 12), "m")
    for place, line in enumerate(detail.code):
        _draw_code(canvas, line, 340, top + 44 + 18 * place)


def _draw_code(canvas: Canvas, line: CodeLine, x: float, y: float) -> None:
    style = "m b" if line.here else "m"
    canvas.text(x, y, "▶" if line.here else "", "m b")
    canvas.text(x + 16, y, f"{line.address:08x}", "m d")
    canvas.text(x + 86, y, clip(line.text, 31), style)
    canvas.text(x + 314, y, clip(line.source or line.label, 30), "m d s")
