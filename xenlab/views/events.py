"""The event bits of each domain, who is bound to whom, and what happened to them in time (lesson 08; paper 3.1).

Above, a line for each domain: from the ports' bits by way of selector and upcall flag to the callback,
in the order in which the hypervisor sets them.  Below, a lane for each over the last instructions (`event_lanes`).
Then the last steps in words, and the code of the chosen one.

A vCPU that sleeps while an event that is not masked waits for it is marked: it was lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import Domain, RunState
from xenlab.hypervisor.event_bits import WORD, Bits, bits_of
from xenlab.hypervisor.trace import Kind
from xenlab.timeline.bit_log import BitLog
from xenlab.views.canvas import WIDTH, Canvas, clip, printable
from xenlab.views.code import CodeLine, CodeReader
from xenlab.views.event_lanes import Lanes, callbacks
from xenlab.views.event_story import Mark, bits_in, bound_to, lost, marks
from xenlab.views.palette import REFUSED, domain_colour, ink_on
from xenlab.views.picture import Picture, table

_DOMAINS, _TILES, _TILES_IN_ROW = 3, 8, 4
_TILE_X, _TILE_WIDTH, _TILE_HEIGHT = 168, 104, 46
_SELECTOR_X, _UPCALL_X, _CLOSED_X, _CALLBACK_X = 604, 682, 764, 826
_LINE, _LINES = 20, 8
_MARKS, _SCANNED = 60, 4096
_STATES = {
    RunState.RUNNABLE: "waits for the CPU",
    RunState.BLOCKED: "asleep",
    RunState.PAUSED: "paused",
    RunState.ENDED: "ended",
    RunState.DOWN: "down",
}
_CODE_LINES, _CODE_BEFORE = 4, 1


@dataclass(frozen=True, slots=True)
class PortRow:
    """One port as the picture shows it."""

    port: int
    bound: str
    pending: bool
    masked: bool


@dataclass(frozen=True, slots=True)
class EventRow:
    """One domain as the picture shows it.

    Attributes:
        domid, name, state: who, and what it is doing.
        bits: its bits.
        words: the words of ports that it uses, each with its selector bit.
        ports: those in use.
        lost: ports with an event that it sleeps over.
        callback: whether it has registered one.
    """

    domid: int
    name: str
    state: str
    bits: Bits
    words: tuple[int, ...]
    ports: tuple[PortRow, ...]
    lost: tuple[int, ...]
    callback: bool


class EventsView(Picture):
    """Event bits, and what became of each event.

    Args:
        xen: the machine, with a trace.
        log: every change of the bits (`record_bits`), for the guests' own stores.
        span: how many instructions the lanes show.
        sources: assembly source by domain id, where it is at hand.
    """

    title = "Events"

    def __init__(
        self,
        xen: Hypervisor,
        log: BitLog | None = None,
        *,
        span: int = 300,
        sources: Mapping[int, str] | None = None,
    ) -> None:
        self._xen, self._log, self._span = xen, log, span
        self._code = CodeReader(xen, sources)
        self._chosen = ""

    def rows(self) -> list[EventRow]:
        """All domains, or of more than three those that have ports, in order of their ids."""
        domains = [domain for _domid, domain in sorted(self._xen.domains.items())]
        few = len(domains) <= _DOMAINS
        return [self._row(domain) for domain in domains if domain.vcpus and (few or domain.ports)]

    def _row(self, domain: Domain) -> EventRow:
        bits, vcpu = bits_of(self._xen, domain), domain.vcpus[0]
        asleep = vcpu.run_state is RunState.BLOCKED and not vcpu.polling
        ports = tuple(
            PortRow(port, bound_to(found), bool(bits.pending >> port & 1), bool(bits.mask >> port & 1))
            for port, found in sorted(domain.ports.items())
        )
        return EventRow(
            domain.domid,
            printable(domain.name),
            "on the CPU" if vcpu is self._xen.current else _STATES[vcpu.run_state],
            bits,
            tuple(sorted({port // WORD for port in domain.ports})),
            ports,
            tuple(lost(domain, bits, asleep)),
            vcpu.event_callback is not None,
        )

    def marks(self) -> list[Mark]:
        """What happened in the time that the lanes show."""
        return marks(self._xen, self._log, _MARKS, self._window()[0])

    def select(self, key: str) -> bool:
        if all(mark.key != key for mark in self.marks()):
            return False
        self._chosen = key
        return True

    def chosen(self, found: list[Mark]) -> Mark | None:
        """The chosen step; the newest one with code if none is chosen, or it is too long ago."""
        chosen = [mark for mark in found if mark.key == self._chosen]
        return next((mark for mark in chosen or reversed(found) if chosen or mark.code), None)

    def text(self) -> str:
        rows, found = self.rows(), self.marks()
        flags = [
            (
                str(row.domid),
                row.name,
                row.state,
                " ".join(str(bit) for bit in bits_in(row.bits.selector)) or "–",
                str(row.bits.upcall),
                str(row.bits.closed),
                f"LOST: {', '.join(map(str, row.lost))}" if row.lost else "",
            )
            for row in rows
        ]
        ports = [
            (str(row.domid), str(port.port), port.bound, str(int(port.pending)), str(int(port.masked)))
            for row in rows
            for port in row.ports
        ]
        steps = [(f"{mark.time:,}", str(mark.domid), mark.text) for mark in found[-_LINES:]]
        heads = ("domain", "name", "state", "selector bits", "upcall pending", "upcall mask", "")
        parts = [f"{self.title}: {self._summary()}", table(heads, flags)]
        parts.append(table(("domain", "port", "bound to", "pending", "masked"), ports))
        parts.append(table(("time", "domain", "what happened"), steps))
        chosen = self.chosen(found)
        if chosen is not None:
            parts.append("\n".join([f"{chosen.time:,}  {chosen.text}", *self._code_text(chosen)]))
        return "\n\n".join(parts)

    def _summary(self) -> str:
        current = self._xen.current
        return f"{self._xen.now:,} instructions, {f'domain {current.domid} on the CPU' if current else 'CPU idle'}"

    def _code_text(self, mark: Mark) -> list[str]:
        return [
            f"{'>' if line.here else ' '} {line.address:08x}  {line.text:<36} {line.source or line.label}".rstrip()
            for line in self._lines(mark)
        ]

    def _lines(self, mark: Mark) -> list[CodeLine]:
        if mark.code is None:
            return []
        domid, address, behind = mark.code
        return self._code.around(
            domid, address, behind=behind, before=_CODE_BEFORE, after=_CODE_LINES - _CODE_BEFORE - 1
        )

    def svg(self) -> str:
        rows, found = self.rows(), self.marks()
        canvas = Canvas(self.title, self._summary())
        bottom = 62.0
        _draw_heads(canvas, 54)
        for row in rows[:_DOMAINS]:
            bottom = _draw_row(canvas, row, bottom)
        if len(rows) > _DOMAINS:
            canvas.text(16, bottom + 14, f"and {len(rows) - _DOMAINS} more domains with ports", "d s")
            bottom += 20
        bottom = self._draw_lanes(canvas, rows[:_DOMAINS], found, bottom + 22)
        return canvas.render(self._draw_steps(canvas, found, bottom + 26) + 10)

    def _window(self) -> tuple[int, int]:
        """The time that the lanes show."""
        start = max(self._xen.now - self._span, 0)
        return start, start + self._span

    def _draw_lanes(self, canvas: Canvas, rows: list[EventRow], found: list[Mark], top: float) -> float:
        lanes = Lanes(canvas, {row.domid: place for place, row in enumerate(rows)}, top, self._window())
        lanes.frame()
        for domid, start, end in self._turns():
            lanes.turn(domid, start, end)
        for domid, start, end in callbacks(found, self._xen.now):
            lanes.callback(domid, start, end)
        chosen = self.chosen(found)
        for mark in found:
            lanes.mark(mark, selected=mark is chosen)
        return lanes.bottom

    def _turns(self) -> list[tuple[int, int, int]]:
        """Who was on the CPU, from when to when, within the window; the domain of each."""
        start, until = self._window()[0], self._xen.now
        owner = {vcpu.key: domid for domid, domain in self._xen.domains.items() for vcpu in domain.vcpus}
        turns = []
        newest = self._xen.trace.newest(_SCANNED) if self._xen.trace is not None else []
        for event in newest:
            if event[1] == Kind.SWITCH and event[0] <= until:
                if event[4] in owner and until > start:
                    turns.append((owner[event[4]], max(event[0], start), until))
                until = event[0]
                if until < start:
                    break
        return turns

    def _draw_steps(self, canvas: Canvas, found: list[Mark], top: float) -> float:
        chosen = self.chosen(found)
        for place, mark in enumerate(found[-_LINES:]):
            y = top + _LINE * place
            canvas.open_event(mark.key, f"{mark.time:,}: {mark.text}", selected=mark is chosen)
            canvas.rect(8, y - 14, WIDTH - 16, _LINE, "hit", rx="4")
            canvas.text(76, y, f"{mark.time:,}", "m d", anchor="end")
            canvas.chip(84, y, mark.domid, f"dom {mark.domid}", 50)
            canvas.text(142, y, clip(mark.text, 98), "m")
            canvas.close()
        if not found:
            canvas.text(84, top, "Nothing has happened in this time.", "d")
        top += _LINE * _LINES - 4
        canvas.rect(16, top, WIDTH - 32, 16 + 18 * _CODE_LINES, "soft", rx="6")
        for place, line in enumerate(self._lines(chosen) if chosen is not None else []):
            style, y = "m b" if line.here else "m", top + 20 + 18 * place
            canvas.text(28, y, "▶" if line.here else "", "m b")
            canvas.text(46, y, f"{line.address:08x}", "m d")
            canvas.text(118, y, clip(line.text, 46), style)
            canvas.text(470, y, clip(line.source or line.label, 52), "m d s")
        return top + 16 + 18 * _CODE_LINES


def _draw_heads(canvas: Canvas, y: float) -> None:
    canvas.text(_TILE_X, y, "ports: pending, mask", "d s")
    for x, text in (
        (_SELECTOR_X, "selector"),
        (_UPCALL_X, "upcall pending"),
        (_CLOSED_X, "upcall mask"),
        (_CALLBACK_X + 6, "callback"),
    ):
        canvas.text(x + 14, y, text, "d s", anchor="middle")


def _draw_row(canvas: Canvas, row: EventRow, top: float) -> float:
    lines = max(-(-min(len(row.ports), _TILES) // _TILES_IN_ROW), 1)
    height = _TILE_HEIGHT * lines + 8
    canvas.rect(8, top, WIDTH - 16, height - 4, "r", rx="6")
    canvas.chip(16, top + 22, row.domid, f"domain {row.domid}", 68)
    canvas.text(90, top + 22, clip(row.name, 10), "s")
    state = f"asleep: LOST {', '.join(map(str, row.lost[:3]))}" if row.lost else row.state
    canvas.text(16, top + 40, clip(state, 22), "b s" if row.lost or row.state == "on the CPU" else "d s")
    if row.lost:
        canvas.rect(10, top + 2, 4, height - 8, fill=REFUSED)
    for place, port in enumerate(row.ports[:_TILES]):
        line, column = divmod(place, _TILES_IN_ROW)
        _draw_port(canvas, port, row, (_TILE_X + column * _TILE_WIDTH, top + 4 + line * _TILE_HEIGHT))
    if len(row.ports) > _TILES:
        canvas.text(16, top + 56, f"and {len(row.ports) - _TILES} more ports", "d s")
    _draw_flags(canvas, row, top + 10)
    return top + height


def _draw_port(canvas: Canvas, port: PortRow, row: EventRow, at: tuple[float, float]) -> None:
    x, y = at
    warn = {"stroke": REFUSED, "stroke_width": "2"} if port.port in row.lost else {}
    canvas.rect(x, y, _TILE_WIDTH - 6, _TILE_HEIGHT - 6, "" if warn else "r", rx="4", fill="none", **warn)
    canvas.text(x + 6, y + 14, f"{port.port}", "m b")
    canvas.text(x + 12 + 7.3 * len(f"{port.port}"), y + 14, clip(port.bound.removeprefix("VIRQ "), 14), "d s")
    _draw_bit(canvas, (x + 6, y + 19), int(port.pending), domain_colour(row.domid))
    _draw_bit(canvas, (x + 36, y + 19), int(port.masked), "")
    canvas.text(x + 66, y + 31, "closed" if port.masked else "open", "d s")


def _draw_bit(canvas: Canvas, at: tuple[float, float], value: int, colour: str) -> None:
    """A bit; filled if it is 1: in a domain's colour where something is pending, in ink where something is shut."""
    x, y = at
    if not value:
        canvas.rect(x, y, 26, 16, "soft", rx="3")
        canvas.text(x + 13, y + 12, "0", "m d s", anchor="middle")
        return
    canvas.rect(x, y, 26, 16, fill=colour or "var(--ink)", rx="3")
    canvas.text(x + 13, y + 12, f"{value}", f"{ink_on(colour) if colour else 'bg'} m b s", anchor="middle")


def _draw_flags(canvas: Canvas, row: EventRow, top: float) -> None:
    colour, bits = domain_colour(row.domid), row.bits
    set_words = [word for word in row.words if bits.selector >> word & 1]
    places = (_SELECTOR_X - 52, _SELECTOR_X, _UPCALL_X, _CLOSED_X, _CALLBACK_X)
    for start, end in pairwise(places):
        canvas.arrow(start + 30, top + 12, end - 4, top + 12, "var(--rule)")
    _draw_bit(canvas, (_SELECTOR_X, top + 4), int(bool(bits.selector)), colour)
    words = f"word {', '.join(map(str, set_words[:3]))}" if set_words else ""
    canvas.text(_SELECTOR_X + 13, top + 34, words, "d s", anchor="middle")
    _draw_bit(canvas, (_UPCALL_X, top + 4), bits.upcall, colour)
    _draw_bit(canvas, (_CLOSED_X, top + 4), bits.closed, "")
    canvas.text(_CLOSED_X + 13, top + 34, "closed" if bits.closed else "open", "d s", anchor="middle")
    canvas.text(
        _CALLBACK_X + 20, top + 16, "ƒ" if row.callback else "none", "b" if row.callback else "d s", anchor="middle"
    )
