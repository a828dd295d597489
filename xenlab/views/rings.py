"""The rings, where the CPU is among them, and the frames built on the way (lesson 02; paper 2.1.2).

Trap: into ring 0.  Deliver: out to the guest's handler, with a frame on its stack.  Return: back
out.  The picture draws the last such moves as numbered arrows and the frames word by word.
"""

from __future__ import annotations

from math import cos, pi, sin

from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.trace import Event, Kind
from xenlab.machine.vectors import vector_name
from xenlab.views.canvas import Canvas, clip
from xenlab.views.palette import APPLICATION, HYPERVISOR, KERNEL, RING_COLOURS, RING_NAMES
from xenlab.views.picture import Picture, table
from xenlab.views.story import FrameWord, Move, frame_words, last_moves, newest_first, symbol

_CENTRE = (196.0, 244.0)
_RADII = {3: 180.0, 2: 132.0, 1: 112.0, 0: 58.0}
_ORBITS = {3: 157.0, 2: 122.0, 1: 86.0, 0: 36.0}
_FIRST_ANGLE, _ANGLE_STEP = -20.0, 28.0
_FRAME_X, _LINE = 410, 20
_FRAME_HEIGHT = 10 + 6 * _LINE + 38  # six words, when there is an error code


class RingsView(Picture):
    """The four rings with the CPU's position, its last moves, and the last exception frames.

    Args:
        moves: how many changes of ring are drawn.
        frames: how many frames are shown.
    """

    title = "Rings and traps"

    def __init__(self, xen: Hypervisor, *, moves: int = 6, frames: int = 2) -> None:
        self._xen, self._moves, self._frames = xen, moves, frames

    def position(self) -> tuple[int, int, int] | None:
        """Ring, domain and EIP of the vCPU on the CPU; None when the CPU is idle."""
        vcpu = self._xen.current
        return None if vcpu is None else (vcpu.state.cpl, vcpu.domain.domid, vcpu.state.eip)

    def moves(self) -> list[Move]:
        """The last changes of ring, oldest first."""
        return last_moves(self._xen, self._moves)

    def frames(self) -> list[tuple[Event, list[FrameWord]]]:
        """The last frames that were built, newest first, with their words as pushed."""
        found: list[tuple[Event, list[FrameWord]]] = []
        for _key, event in newest_first(self._xen):
            if event.kind in (Kind.DELIVER, Kind.GATE):
                found.append((event, frame_words(self._xen, event)))
            if len(found) == self._frames:
                break
        return found

    def text(self) -> str:
        moves = [
            (f"{move.time:,}", _domain(move.domain), f"{move.from_ring} -> {move.to_ring}", move.why)
            for move in self.moves()
        ]
        parts = [f"{self.title}: {self._summary()}", table(("time", "domain", "rings", "why"), moves)]
        for event, words in self.frames():
            rows = [(f"{word.address:#010x}", word.name, f"{word.value:#010x}", word.meaning) for word in words]
            parts.append(_frame_title(event) + "\n" + table(("address", "word", "value", "meaning"), rows))
        return "\n\n".join(parts)

    def svg(self) -> str:
        canvas = Canvas(self.title, self._summary())
        _draw_rings(canvas)
        moves = self.moves()
        for place, move in enumerate(moves):
            _draw_move(canvas, place, move)
        self._draw_cpu(canvas)
        _draw_legend(canvas, moves)
        bottom = top = 96.0 + _LINE * self._moves
        frames = self.frames()
        if not frames:
            canvas.text(_FRAME_X, bottom, "No exception frame was built yet.", "d")
        for event, words in frames:
            bottom = _draw_frame(canvas, event, words, bottom)
        # As high as it can become, so that nothing below moves while the run plays.
        return canvas.render(max(top + _FRAME_HEIGHT * self._frames, 460))

    def _summary(self) -> str:
        found = self.position()
        if found is None:
            return f"{self._xen.now:,} instructions, CPU idle"
        ring, domid, eip = found
        name = symbol(self._xen.domains.get(domid), eip)
        place = f"{eip:#010x}" + (f" ({name})" if name else "")
        return f"{self._xen.now:,} instructions, domain {domid} in ring {ring} at {clip(place, 40)}"

    def _draw_cpu(self, canvas: Canvas) -> None:
        found = self.position()
        if found is None:
            canvas.text(_CENTRE[0], _CENTRE[1] + 204, "CPU idle", "b", anchor="middle")
            return
        x, y = _point(found[0], 180)
        canvas.circle(x, y, 17, "bg", stroke="var(--ink)", stroke_width="3")
        canvas.text(x, y + 4, "CPU", "b s", anchor="middle")


def _draw_rings(canvas: Canvas) -> None:
    for ring, radius in _RADII.items():
        canvas.circle(*_CENTRE, radius, fill=RING_COLOURS[ring], stroke="var(--bg)", stroke_width="2")
    x, y = _CENTRE
    for ring, label_y, style in ((3, -154.0, "k b"), (2, -117.0, "d s"), (1, -86.0, "k b"), (0, -34.0, "k b")):
        canvas.text(x, y + label_y + 4, f"{ring} {RING_NAMES[ring]}", style if ring != 0 else "k b s", anchor="middle")


def _point(ring: int, degrees: float) -> tuple[float, float]:
    angle = degrees * pi / 180
    return _CENTRE[0] + _ORBITS[ring] * cos(angle), _CENTRE[1] + _ORBITS[ring] * sin(angle)


def _draw_move(canvas: Canvas, place: int, move: Move) -> None:
    """An arrow between two rings, its number at its start."""
    degrees = _FIRST_ANGLE + _ANGLE_STEP * place
    (x1, y1), (x2, y2) = _point(move.from_ring, degrees), _point(move.to_ring, degrees)
    canvas.arrow(x1, y1, x2, y2, "#111111")
    canvas.circle(x1, y1, 9, fill="#111111")
    canvas.text(x1, y1 + 4, str(place + 1), "w b s", anchor="middle")


def _draw_legend(canvas: Canvas, moves: list[Move]) -> None:
    canvas.text(_FRAME_X, 56, "Last moves", "b")
    for place, move in enumerate(moves):
        y = 78 + _LINE * place
        canvas.text(_FRAME_X, y, f"{place + 1}", "b")
        canvas.text(_FRAME_X + 22, y, f"{move.time:,}", "m d")
        canvas.text(_FRAME_X + 130, y, f"{move.from_ring} → {move.to_ring}", "m b")
        canvas.text(_FRAME_X + 190, y, clip(f"{_domain(move.domain)}: {move.why}", 38))
    if not moves:
        canvas.text(_FRAME_X, 78, "None yet.", "d")


def _draw_frame(canvas: Canvas, event: Event, words: list[FrameWord], top: float) -> float:
    """The words of one frame as boxes, highest address on top, as in the manuals."""
    canvas.text(_FRAME_X, top, clip(_frame_title(event), 64), "b")
    colour = APPLICATION if event.to_ring == 3 else KERNEL
    for place, word in enumerate(words):
        y = top + 10 + _LINE * place
        canvas.text(_FRAME_X, y + 15, f"{word.address:08x}", "m d")
        canvas.rect(_FRAME_X + 72, y, 172, _LINE, fill=colour, stroke="var(--bg)")
        canvas.text(_FRAME_X + 80, y + 15, word.name, "k b")
        canvas.text(_FRAME_X + 238, y + 15, f"{word.value:08x}", "m k", anchor="end")
        canvas.text(_FRAME_X + 254, y + 15, clip(word.meaning, 30), "d s")
    bottom = top + 10 + _LINE * len(words)
    canvas.path(f"M{_FRAME_X + 72} {bottom + 8}l7 -6v4h12v4h-12v4z", fill=HYPERVISOR)
    canvas.text(_FRAME_X + 98, bottom + 12, "ESP in the handler", "d s")
    return bottom + 38


def _frame_title(event: Event) -> str:
    rings = f"ring {event.from_ring} → {event.to_ring}"
    return f"Frame for {vector_name(event.vector)}, {rings}, at instruction {event.time:,}"


def _domain(domid: int) -> str:
    return f"domain {domid}" if domid >= 0 else "hypervisor"
