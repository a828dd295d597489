"""Pseudo-physical frames against machine frames, there and back (lesson 04; paper 3.3.4).

On the left the guest's frames in the order that the guest believes in; in the middle machine memory, row by
row, in the colours of its owners; on the right another domain's frames with the same
numbers.  The lines are the physical-to-machine lists.  The cells at the bottom are the way back: the
machine-to-physical list around the chosen frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.frames import FREE, NO_PFN, FrameType
from xenlab.machine.memory import PAGE_SHIFT
from xenlab.views.canvas import WIDTH, Canvas, clip
from xenlab.views.pages import (
    Page,
    flag_text,
    name_of,
    names_by_frame,
    owner_name,
    pages,
    pfn_text,
    places,
    read_p2m,
)
from xenlab.views.palette import domain_colour, ink_on
from xenlab.views.picture import Picture, table

_LEFT, _RIGHT = 16.0, WIDTH - 16.0
_ROW, _TOP, _COLUMN = 22.0, 76.0, 306.0
_MAP_LEFT, _MAP_COLUMNS, _SQUARE = 404.0, 18, 4
_CELLS, _CELL, _CELLS_X = 7, 62.0, 430.0
_DETAIL = 152.0
_SIDES = 2


@dataclass(frozen=True, slots=True)
class Row:
    """One pseudo-physical frame.

    Attributes:
        domid, pfn: whose, and its number there.
        mfn: what the guest's list says.
        pages: where the frame is mapped now.
        name: what it is for.
        back: what the machine-to-physical list says of ``mfn``; None where there is no such frame.
        owner: whose the frame is.
    """

    domid: int
    pfn: int
    mfn: int
    pages: tuple[Page, ...]
    name: str
    back: int | None
    owner: int

    @property
    def key(self) -> str:
        """How it is chosen."""
        return f"{self.domid}:{self.pfn}"

    @property
    def consistent(self) -> bool:
        """Whether both lists agree and the frame is the domain's."""
        return self.back == self.pfn and self.owner == self.domid


class P2mView(Picture):
    """The two lists: pseudo-physical to machine for up to two domains, and back around one frame.

    Args:
        domids: which domains; the first two there are, if empty.
        first, count: the frames that have a line of their own.

    Attributes:
        selected: the chosen frame as ``domain:pfn``.
    """

    title = "Pseudo-physical and machine frames"

    def __init__(self, xen: Hypervisor, domids: Sequence[int] = (), *, first: int = 0, count: int = 12) -> None:
        self._xen, self._domids, self._first, self._count = xen, tuple(domids), first, count
        self.selected: str | None = None

    def domains(self) -> list[Domain]:
        """The domains that are shown."""
        there = self._xen.domains
        wanted = self._domids or sorted(there)
        return [there[domid] for domid in wanted if domid in there and there[domid].vcpus][:_SIDES]

    def rows(self, domain: Domain, pfns: Sequence[int] | None = None) -> list[Row]:
        """The lines of one domain: those of the picture, or of ``pfns``."""
        found = read_p2m(self._xen, domain, places(self._xen, domain))
        known, mapped = names_by_frame(self._xen, domain), dict[int, list[Page]]()
        for page in pages(self._xen, domain):
            mapped.setdefault(page.mfn, []).append(page)
        window = range(self._first, self._first + self._count) if pfns is None else pfns
        return [
            self._row(domain, pfn, found[pfn], mapped.get(found[pfn], []), known) for pfn in window if pfn < len(found)
        ]

    def _row(self, domain: Domain, pfn: int, mfn: int, mapped: list[Page], known: dict[int, str]) -> Row:
        frames = self._xen.frames
        back = frames.m2p[mfn] if mfn < frames.count else None
        name = name_of(self._xen, domain, mapped[0], known) if mapped else f"{known.get(mfn, 'page')}, not mapped"
        return Row(domain.domid, pfn, mfn, tuple(mapped), name, back, frames.owner_of(mfn))

    def select(self, key: str) -> bool:
        domid, _, pfn = key.partition(":")
        shown = {str(domain.domid): len(domain.frames) for domain in self.domains()}
        if not pfn.isascii() or not pfn.isdigit() or int(pfn) >= shown.get(domid, 0):
            return False
        self.selected = f"{domid}:{int(pfn)}"
        return True

    def chosen(self) -> Row | None:
        """The selected frame; the first that has a line, if none is."""
        for domain in self.domains():
            if self.selected and self.selected.startswith(f"{domain.domid}:"):
                return self.rows(domain, [int(self.selected.split(":")[1])])[0]
        return next((row for domain in self.domains() for row in self.rows(domain)), None)

    def neighbours(self, mfn: int) -> list[tuple[int, int, int]]:
        """Frame, owner and entry of the machine-to-physical list, for the frames around ``mfn``."""
        frames = self._xen.frames
        first = min(max(mfn - _CELLS // 2, 0), max(frames.count - _CELLS, 0))
        return [(at, frames.owner[at], frames.m2p[at]) for at in range(first, min(first + _CELLS, frames.count))]

    def detail(self, row: Row) -> list[tuple[str, str]]:
        """One frame: names and values."""
        frames, page = self._xen.frames, row.pages[0] if row.pages else None
        where = " ".join(f"{page.address:#010x}" for page in row.pages[:2]) or "not mapped"
        entry = f"{page.entry:#x}: {flag_text(page.entry)}" if page else "none"
        kind = FrameType(frames.type[row.mfn]).name.lower() if row.back is not None else "no such frame"
        return [
            ("linear address", where + (" …" if len(row.pages) > 2 else "")),
            ("pfn", f"{row.pfn:#05x}"),
            ("mfn (P2M list)", f"{row.mfn:#x}, so machine address {row.mfn << PAGE_SHIFT:#x}"),
            ("back (M2P list)", "no entry" if row.back is None else pfn_text(row.back)),
            ("page-table entry", entry),
            ("owner", f"{owner_name(row.owner)}, type {kind}"),
        ]

    def text(self) -> str:
        domains = self.domains()
        if not domains:
            return f"{self.title}: no domain yet"
        parts = [f"{self.title}: {self._summary(domains)}"]
        headings = ("domain", "pfn", "mfn", "back", "linear", "guest may", "what")
        parts.append(table(headings, [_cells(row) for domain in domains for row in self.rows(domain)]))
        chosen = self.chosen()
        if chosen is not None:
            parts.append(table(("chosen", chosen.name), self.detail(chosen)))
            around = [
                (f"{mfn:#x}", "free" if owner == FREE else owner_name(owner), pfn_text(back))
                for mfn, owner, back in self.neighbours(chosen.mfn)
            ]
            parts.append(table(("machine frame", "owner", "pfn (M2P list)"), around))
        return "\n\n".join(parts)

    def _summary(self, domains: list[Domain]) -> str:
        beside = sum(_beside(read_p2m(self._xen, domain, places(self._xen, domain))) for domain in domains)
        total = sum(len(domain.frames) for domain in domains)
        return f"{total} frames of {len(domains)} domain{'s' * (len(domains) > 1)}, {beside} beside their neighbour"

    def svg(self) -> str:
        domains, chosen = self.domains(), self.chosen()
        if chosen is None:
            canvas = Canvas(self.title)
            canvas.text(16, 60, "No domain yet.", "d")
            return canvas.render(80)
        canvas = Canvas(self.title, self._summary(domains))
        bottom = _TOP + _ROW * self._count
        self._draw_machine(canvas)
        for side, domain in enumerate(domains):
            self._draw_side(canvas, side, domain, chosen)
        if len(domains) == 1:
            canvas.text(_RIGHT - _COLUMN, _TOP + 14, "No second domain.", "d")
        self._draw_detail(canvas, chosen, bottom + 20)
        return canvas.render(bottom + 20 + _DETAIL)

    def _frames_in_a_cell(self) -> int:
        cells = _MAP_COLUMNS * int(_ROW * self._count / _SQUARE)
        return -(-self._xen.frames.count // cells)

    def _place(self, mfn: int) -> tuple[float, float]:
        """The middle of a frame's cell in the map of the machine."""
        row, column = divmod(mfn // self._frames_in_a_cell(), _MAP_COLUMNS)
        return _MAP_LEFT + (column + 0.5) * _SQUARE, _TOP + (row + 0.5) * _SQUARE

    def _draw_machine(self, canvas: Canvas) -> None:
        frames, middle = self._xen.frames, _MAP_LEFT + _MAP_COLUMNS * _SQUARE / 2
        canvas.text(middle, _TOP - 24, "machine memory", "b", anchor="middle")
        canvas.text(middle, _TOP - 9, f"frames 0 to {frames.count - 1:x}", "d s", anchor="middle")
        height = self._place(frames.count - 1)[1] + _SQUARE / 2 - _TOP
        canvas.rect(_MAP_LEFT, _TOP, _MAP_COLUMNS * _SQUARE, height, "soft")
        squares: dict[int, list[str]] = {}
        step = self._frames_in_a_cell()
        for first in range(0, frames.count, step):
            # Of several frames in a cell the first that has an owner is shown.
            owner = next((found for found in frames.owner[first : first + step] if found != FREE), FREE)
            if owner != FREE:
                x, y = self._place(first)
                squares.setdefault(owner, []).append(f"M{x - 2:g} {y - 2:g}h3v3h-3z")
        for owner, shapes in sorted(squares.items()):
            canvas.path("".join(shapes), fill=domain_colour(owner))

    def _draw_side(self, canvas: Canvas, side: int, domain: Domain, chosen: Row) -> None:
        left = _LEFT if side == 0 else _RIGHT - _COLUMN + 10
        canvas.chip(left, _TOP - 12, domain.domid, f"domain {domain.domid}", 74)
        canvas.text(left + 84, _TOP - 12, clip(domain.name, 24), "b")
        rows = self.rows(domain)
        for row in sorted(rows, key=lambda row: row.key == chosen.key):
            self._draw_line(canvas, side, row, selected=row.key == chosen.key)
        for row in rows:
            _draw_row(canvas, left, row, self._row_top(row), selected=row.key == chosen.key)

    def _row_top(self, row: Row) -> float:
        return _TOP + _ROW * (row.pfn - self._first)

    def _draw_line(self, canvas: Canvas, side: int, row: Row, *, selected: bool) -> None:
        if row.back is None:
            return
        start = _LEFT + _COLUMN if side == 0 else _RIGHT - _COLUMN
        y, (x, target) = self._row_top(row) + _ROW / 2, self._place(row.mfn)
        colour = "var(--ink)" if selected else domain_colour(row.domid)
        canvas.line(start, y, x, target, "", stroke=colour, stroke_width="2.5" if selected else "1.5", fill="none")
        canvas.circle(x, target, 4 if selected else 3, fill=colour, stroke="var(--bg)")

    def _draw_detail(self, canvas: Canvas, row: Row, top: float) -> None:
        canvas.rect(_LEFT, top, _RIGHT - _LEFT, _DETAIL - 14, "soft", rx="6")
        canvas.chip(_LEFT + 12, top + 22, row.domid, f"domain {row.domid}", 74)
        canvas.text(_LEFT + 96, top + 22, clip(f"{row.name}", 30), "b")
        for place, (name, value) in enumerate(self.detail(row)):
            y = top + 44 + 17 * place
            canvas.text(_LEFT + 12, y, name, "d s")
            canvas.text(_LEFT + 112, y, clip(value, 40), "m s")
        canvas.text(_CELLS_X, top + 22, "M2P list: its neighbours in the machine", "b")
        for place, (mfn, owner, back) in enumerate(self.neighbours(row.mfn)):
            _draw_cell(canvas, _CELLS_X + place * _CELL, top + 52, (mfn, owner, back), here=mfn == row.mfn)
        canvas.text(_CELLS_X, top + 124, "above: machine frame · inside: its owner's number for it", "d s")


def _beside(p2m: list[int]) -> int:
    """How many frames have the next pseudo-physical frame beside them in the machine."""
    return sum(after == mfn + 1 for mfn, after in pairwise(p2m))


def _cells(row: Row) -> tuple[str, ...]:
    first = row.pages[0] if row.pages else None
    back = "no such frame" if row.back is None else pfn_text(row.back)
    linear = f"{first.address:#010x}" if first else "not mapped"
    may = "" if first is None else ("read, write" if first.writable else "read") + (", ring 3" if first.user else "")
    return str(row.domid), f"{row.pfn:#05x}", f"{row.mfn:#x}", back, linear, may, row.name


def _draw_row(canvas: Canvas, left: float, row: Row, top: float, *, selected: bool) -> None:
    _domid, pfn, mfn, back, linear, _may, name = _cells(row)
    canvas.open_event(row.key, f"domain {row.domid}, pfn {pfn}: mfn {mfn}, {name}, {linear}", selected=selected)
    canvas.rect(left - 6, top, _COLUMN + 6, _ROW - 1, "hit", rx="4")
    y = top + 15
    canvas.text(left, y, pfn, "m b")
    canvas.text(left + 48, y, "→", "d")
    canvas.text(left + 66, y, mfn, "m b")
    if row.consistent:
        canvas.text(left + 118, y, clip(name, 28), "s")
    else:
        canvas.text(left + 118, y, clip(f"≠ back: {back}, of {owner_name(row.owner)}", 30), "b s")
    canvas.close()


def _draw_cell(canvas: Canvas, x: float, top: float, frame: tuple[int, int, int], *, here: bool) -> None:
    mfn, owner, back = frame
    colour = "var(--bg)" if owner == FREE else domain_colour(owner)
    canvas.text(x + _CELL / 2 - 3, top - 8, f"{mfn:#x}", "m b s" if here else "m d s", anchor="middle")
    canvas.rect(x, top, _CELL - 6, 30, fill=colour, stroke="var(--ink)" if here else "var(--rule)", rx="3")
    style = "d s" if owner == FREE else f"{ink_on(colour)} s"
    label = "free" if owner == FREE else "–" if back == NO_PFN else f"{back:#x}"
    canvas.text(x + _CELL / 2 - 3, top + 19, label, f"m {style}" if back != NO_PFN else style, anchor="middle")
    whose = "" if owner == FREE else "xen" if owner < 0 else f"dom {owner}"
    canvas.text(x + _CELL / 2 - 3, top + 46, whose, "d s", anchor="middle")


__all__ = ["P2mView", "Row"]
