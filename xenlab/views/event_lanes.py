"""Lanes of time for `events`: who was on the CPU, who was in a callback, and each send as an arrow (lesson 08)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from xenlab.hypervisor.events import THROUGH
from xenlab.views.canvas import WIDTH, Canvas, number
from xenlab.views.event_story import END, POLL, RETURN, SEND, SLEEP, STORE, UNMASK, UPCALL, Mark
from xenlab.views.palette import domain_colour

_X, _HEIGHT = 92, 46
_WIDTH = WIDTH - _X - 24
_SIGNS = {SLEEP: "z", POLL: "p", UNMASK: "u", STORE: "•", END: "×", RETURN: "", UPCALL: "", SEND: ""}
_HELP = (
    "→ an event that made an upcall pending    ⇢ one that stopped before    framed: in its callback    "
    "z block    p poll    u unmask    • a store"
)


def callbacks(found: Sequence[Mark], now: int) -> list[tuple[int, int, int]]:
    """When domains were in their callbacks: domain, from, to."""
    entered: dict[int, list[int]] = {}
    spans = []
    for mark in found:
        if mark.kind == UPCALL:
            entered.setdefault(mark.domid, []).append(mark.time)
        elif mark.kind == RETURN and entered.get(mark.domid):
            spans.append((mark.domid, entered[mark.domid].pop(), mark.time))
    return spans + [(domid, time, now) for domid, times in entered.items() for time in times]


class Lanes:
    """Time from left to right, a lane for each domain and one for the hypervisor.

    Attributes:
        bottom: where they end.
    """

    def __init__(self, canvas: Canvas, places: Mapping[int, int], top: float, window: tuple[int, int]) -> None:
        self._canvas, self._places, self._window = canvas, places, window
        self._top = top + 16
        self.bottom = self._top + _HEIGHT * max(len(places), 1) + 26

    def _x(self, time: int) -> float:
        start, end = self._window
        return _X + _WIDTH * (min(max(time, start), end) - start) / (end - start)

    def _y(self, domid: int) -> float:
        """The middle of a domain's lane; above all of them for who has none."""
        return self._top + _HEIGHT * self._places[domid] + 30 if domid in self._places else self._top

    def frame(self) -> None:
        """Names, lines and the ends of the time."""
        self._canvas.text(_X, self._top - 16, _HELP, "d s")
        for domid in self._places:
            y = self._y(domid)
            self._canvas.chip(16, y + 5, domid, f"domain {domid}", 68)
            self._canvas.line(_X, y, _X + _WIDTH, y)
        for time, anchor in zip(self._window, ("", "end"), strict=True):
            self._canvas.text(self._x(time), self.bottom, f"{time:,}", "m s d", anchor=anchor)
        self._canvas.text(_X + _WIDTH / 2, self.bottom, "instructions", "s d", anchor="middle")

    def turn(self, domid: int, start: int, end: int) -> None:
        """A domain was on the CPU."""
        if domid in self._places:
            width = max(self._x(end) - self._x(start), 1)
            self._canvas.rect(self._x(start), self._y(domid) - 4, width, 8, fill=domain_colour(domid))

    def callback(self, domid: int, start: int, end: int) -> None:
        """A domain was in its callback."""
        if domid in self._places:
            width = max(self._x(end) - self._x(start), 3)
            self._canvas.rect(
                self._x(start), self._y(domid) - 8, width, 16, fill=domain_colour(domid), stroke="var(--ink)", rx="2"
            )

    def mark(self, mark: Mark, *, selected: bool) -> None:
        """Something that happened; it can be chosen."""
        if mark.domid not in self._places:
            return
        canvas, x, y = self._canvas, self._x(mark.time), self._y(mark.domid)
        canvas.open_event(mark.key, f"{mark.time:,}, domain {mark.domid}: {mark.text}", selected=selected)
        if mark.kind == SEND:
            self._arrow(mark, x, y)
        else:
            canvas.rect(x - 4, y + 8, 8, 14, "hit")
            canvas.text(x, y + 18, _SIGNS[mark.kind], "m b s", anchor="middle")
        if selected:
            canvas.path(f"M{number(x)} {number(y + 22)}l-4 6h8z", fill="var(--ink)")
        canvas.close()

    def _arrow(self, mark: Mark, x: float, y: float) -> None:
        colour, dash = domain_colour(mark.sender), "" if mark.stopped == THROUGH else "3 3"
        start = self._y(mark.sender)
        if mark.sender == mark.domid:
            start = y - 26
        end = y - 9 if start < y else y + 9
        self._canvas.rect(x - 4, min(start, end), 8, abs(end - start), "hit")
        self._canvas.arrow(x, start, x, end, colour, dash)
