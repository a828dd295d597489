"""A domain's page tables as the tree that they are, and the update that was refused last (lesson 05; paper 3.3.3).

Each table is drawn as a field of its entries: the first one top left.  From left to right the levels follow one
another, root first; lines lead from an entry to the table that it names.  The entries of the hypervisor's range stand
apart, hatched.  A refused update is framed where it was to stand, and below it is told what it was to be,
what the guest got, and by which rule.

The tree is drawn from memory, as the MMU would walk it; what must hold of it is the auditor's to say, in the last line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby

from xenlab.hypervisor.auditor import audit
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.frames import PINNED, TABLES, VALIDATED, FrameType
from xenlab.hypervisor.layout import first_reserved_slot
from xenlab.hypervisor.page_entries import Use
from xenlab.hypervisor.page_tables import root_use
from xenlab.machine.memory import PAGE_SHIFT
from xenlab.machine.paging import PRESENT, RW
from xenlab.views.canvas import WIDTH, Canvas, clip
from xenlab.views.palette import FRAME_COLOURS, HYPERVISOR, REFUSED, ink_on
from xenlab.views.picture import Picture, table
from xenlab.views.refusals import TYPE_NAMES, Refusal, last_refusal

# By the number of a table's entries: how its field is divided, and how wide its card is.
_COLUMNS, _CELLS, _WIDTHS = {1024: 64, 512: 32, 4: 2}, {1024: 5, 512: 5, 4: 40}, {1024: 408, 512: 270, 4: 156}
_CARD_HEIGHT, _GAP, _LINES = 126, 30, 6
_TABLES = 2
_LEVELS_BELOW = {"l3": Use.L2, "l2": Use.L1}
_DETAIL_HEIGHT = 136
# What an entry is for: the colour that it has in the field.
_WRITABLE, _READ_ONLY, _TABLE, _OWN = "writable page", "read-only page", "table", "the hypervisor's"
_SHORT = {_WRITABLE: "w", _READ_ONLY: "r", _TABLE: "", _OWN: "x"}
_COLOURS = {
    _WRITABLE: FRAME_COLOURS[FrameType.WRITABLE],
    _READ_ONLY: "#9A9A9A",
    _TABLE: FRAME_COLOURS[FrameType.L1],
    _OWN: HYPERVISOR,
}


@dataclass(frozen=True, slots=True)
class Range:
    """Neighbouring present entries of one table that are for the same.

    Attributes:
        first, last: indices.
        purpose: a page to write, a page to read, a table, or the hypervisor's.
    """

    first: int
    last: int
    purpose: str


@dataclass(slots=True)
class Node:
    """A page table in the tree.

    Attributes:
        mfn: its frame.
        level: ``l1``, ``l2`` or ``l3``.
        ranges: its present entries.
        children: index of an entry, and the table that it names.
        linear: indices of entries that name a table of this or a higher level.
    """

    mfn: int
    level: str
    ranges: list[Range] = field(default_factory=list)
    children: list[tuple[int, Node]] = field(default_factory=list)
    linear: list[int] = field(default_factory=list)


class PageTree(Picture):
    """The tree of one domain, with the last refused update and the auditor's verdict.

    Args:
        domid: whose; the domain with the smallest id, if not given.
        tables: how many tables of a level are drawn; with the rest it is said how many are missing.
    """

    title = "Page tables"

    def __init__(self, xen: Hypervisor, domid: int | None = None, *, tables: int = _TABLES) -> None:
        self._xen, self._domid, self._tables = xen, domid, tables
        self.selected: int | None = None

    def domain(self) -> Domain | None:
        """Whose tables are shown; None while there is no domain."""
        domains = self._xen.domains
        if self._domid is None:
            return domains[min(domains)] if domains else None
        return domains.get(self._domid)

    def select(self, key: str) -> bool:
        """Choose a table: ``table.1e2`` for the one in frame 0x1e2."""
        found = {f"table.{node.mfn:x}": node.mfn for level in self.levels() for node in level}
        if key not in found:
            return False
        self.selected = found[key]
        return True

    def tree(self) -> Node | None:
        """The tables as the MMU would walk them."""
        domain = self.domain()
        if domain is None or not domain.vcpus:
            return None
        return self._node(domain, domain.vcpus[0].state.cr3 >> PAGE_SHIFT, domain.mode.levels[0].name, set())

    def _node(self, domain: Domain, mfn: int, level: str, seen: set[int]) -> Node:
        mode, node = domain.mode, Node(mfn, level)
        seen.add(mfn)
        size = next(found.entries for found in mode.levels if found.name == level)
        entries = self._xen.page_tables.entries(mode, mfn)[:size].tolist()
        use = self._xen.frames.type[mfn] if level != mode.levels[0].name else root_use(mode)
        reserved = first_reserved_slot(mode, use)
        own = size if reserved is None else reserved
        purposes = [
            (index, _OWN if index >= own else _purpose(level, entry))
            for index, entry in enumerate(entries)
            if entry & PRESENT
        ]
        node.ranges = _ranges(purposes)
        for index, _use in (item for item in purposes if level != "l1" and item[1] == _TABLE):
            below = mode.frame_of(entries[index])
            if below in seen or below >= self._xen.frames.count or self._is_linear(level, below):
                node.linear.append(index)
            else:
                node.children.append((index, self._node(domain, below, "l2" if level == "l3" else "l1", seen)))
        return node

    def _is_linear(self, level: str, below: int) -> bool:
        kind = self._xen.frames.type[below]
        return kind in TABLES and level == "l2" and kind != Use.L1

    def levels(self) -> list[list[Node]]:
        """The tables by level, the root's first."""
        root = self.tree()
        found, row = list[list[Node]](), [root] if root else []
        while row:
            found.append(row)
            row = [child for node in row for _index, child in node.children]
        return found

    def pinned_apart(self) -> list[int]:
        """Tables of the domain's that are tables only because they are pinned: nothing in the tree names them."""
        domain, frames = self.domain(), self._xen.frames
        if domain is None:
            return []
        inside = {node.mfn for level in self.levels() for node in level}
        mine = frames.owned_by(domain.domid)
        return [mfn for mfn in mine if frames.flags[mfn] & PINNED and mfn not in inside]

    def refusal(self) -> Refusal | None:
        """The domain's last update that was refused."""
        domain = self.domain()
        return last_refusal(self._xen, domain.domid) if domain is not None else None

    def verdict(self) -> str:
        """The auditor's, in a line."""
        found = audit(self._xen)
        if not found:
            return "the auditor is content"
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        return f"the auditor: {found[0]}{more}"

    # Text.

    def text(self) -> str:
        rows = [
            (node.level, f"{node.mfn:#x}", self._marks(node.mfn), _range_text(part), part.purpose)
            for level in self.levels()
            for node in level
            for part in node.ranges
        ]
        rows += [("pinned", f"{mfn:#x}", self._marks(mfn), "", "") for mfn in self.pinned_apart()]
        parts = [f"{self.title}: {self._summary()}", table(("level", "frame", "it is", "entries", "for"), rows)]
        refusal = self.refusal()
        if refusal is not None:
            parts.append(f"refused at instruction {refusal.time:,}: {refusal}")
        return "\n\n".join([*parts, self.verdict()])

    def _summary(self) -> str:
        domain = self.domain()
        if domain is None:
            return "no domain yet"
        count = sum(map(len, self.levels()))
        return f"domain {domain.domid}, {domain.name}, {domain.mode.name}: {count} tables"

    def _marks(self, mfn: int) -> str:
        frames = self._xen.frames
        kind = FrameType(frames.type[mfn])
        marks = [TYPE_NAMES[kind], f"{frames.uses[mfn]} use" + ("s" if frames.uses[mfn] != 1 else "")]
        marks += [name for bit, name in ((PINNED, "pinned"), (VALIDATED, "validated")) if frames.flags[mfn] & bit]
        return ", ".join(marks)

    # Picture.

    def svg(self) -> str:
        canvas = Canvas(self.title, clip(self._summary(), 70))
        _draw_legend(canvas, 44)
        bottom = 72 + self._tables * (_CARD_HEIGHT + 10)
        levels, refusal = self.levels(), self.refusal()
        places: dict[int, tuple[float, float]] = {}
        x = 16.0
        for nodes in levels:
            self._draw_level(canvas, nodes, x, refusal, places)
            x += _WIDTHS[self._size(nodes[0])] + _GAP
        for nodes in levels:
            _draw_lines(canvas, nodes, places, _WIDTHS[self._size(nodes[0])])
        self._draw_apart(canvas, bottom)
        self._draw_refusal(canvas, refusal, bottom + 24)
        return canvas.render(bottom + 24 + _DETAIL_HEIGHT + 12)

    def _draw_level(
        self,
        canvas: Canvas,
        nodes: list[Node],
        x: float,
        refusal: Refusal | None,
        places: dict[int, tuple[float, float]],
    ) -> None:
        for number, node in enumerate(nodes[: self._tables]):
            y = 72.0 + number * (_CARD_HEIGHT + 10)
            places[node.mfn] = (x, y)
            self._draw_card(canvas, node, x, y, refusal)
        if len(nodes) > self._tables:
            y = 72.0 + self._tables * (_CARD_HEIGHT + 10) - 2
            canvas.text(x, y, f"and {len(nodes) - self._tables} more {node.level} tables", "d s")

    def _draw_card(self, canvas: Canvas, node: Node, x: float, y: float, refusal: Refusal | None) -> None:
        size, marks = self._size(node), self._marks(node.mfn)
        width, field = _WIDTHS[size], _COLUMNS[size] * _CELLS[size]
        chosen = self.selected == node.mfn
        canvas.open_event(f"table.{node.mfn:x}", f"{node.level} table {node.mfn:#x}: {marks}", selected=chosen)
        canvas.rect(x, y, width, _CARD_HEIGHT, "soft", rx="5", stroke="var(--ink)" if chosen else "")
        self._draw_head(canvas, node, x, y, width)
        _draw_field(canvas, node, x + 8, y + 36, size)
        if refusal is not None and refusal.table == node.mfn and refusal.index >= 0:
            _draw_mark(canvas, refusal.index, x + 8, y + 36, size)
        lines = [_range_line(part) for part in node.ranges]
        lines = lines if len(lines) <= _LINES else [*lines[: _LINES - 1], f"{len(lines) - _LINES + 1} more"]
        for place, line in enumerate(lines):
            canvas.text(x + field + 14, y + 44 + 14 * place, line, "d s")
        canvas.close()

    def _draw_head(self, canvas: Canvas, node: Node, x: float, y: float, width: float) -> None:
        frames = self._xen.frames
        colour = FRAME_COLOURS[frames.type[node.mfn]]
        canvas.rect(x, y, 30, 18, fill=colour, rx="4")
        canvas.text(x + 15, y + 13, node.level, f"{ink_on(colour)} b s".strip(), anchor="middle")
        canvas.text(x + 37, y + 14, f"{node.mfn:#x}", "m b")
        _kind, _comma, detail = self._marks(node.mfn).partition(", ")
        canvas.text(x + 8, y + 30, clip(detail, int(width / 6)), "d s")

    def _size(self, node: Node) -> int:
        domain = self.domain()
        assert domain is not None
        return next(level.entries for level in domain.mode.levels if level.name == node.level)

    def _draw_apart(self, canvas: Canvas, y: float) -> None:
        apart = self.pinned_apart()
        if apart:
            names = ", ".join(f"{mfn:#x} ({TYPE_NAMES[FrameType(self._xen.frames.type[mfn])]})" for mfn in apart)
            canvas.text(16, y + 12, clip(f"Pinned, and not in this tree: {names}", 120), "d")

    def _draw_refusal(self, canvas: Canvas, refusal: Refusal | None, top: float) -> None:
        canvas.rect(16, top, WIDTH - 32, _DETAIL_HEIGHT, "soft", rx="6")
        if refusal is None:
            canvas.text(28, top + 22, "No update was refused so far.", "d")
        else:
            canvas.rect(16, top, 6, _DETAIL_HEIGHT - 30, fill=REFUSED, rx="2")
            head = f"✗ {refusal.how}: {refusal.answer}"
            canvas.text(32, top + 21, head, "b")
            canvas.text(WIDTH - 28, top + 21, f"at instruction {refusal.time:,}", "d", anchor="end")
            canvas.text(
                32, top + 42, clip(f"{refusal.place} was to be" if refusal.index >= 0 else refusal.entry, 110), "m"
            )
            if refusal.index >= 0:
                canvas.text(32, top + 60, clip(refusal.entry, 110), "m")
            if refusal.inside:
                canvas.text(32, top + 78, clip(refusal.inside, 110), "m")
            canvas.text(32, top + (98 if refusal.inside else 80), clip(f"because {refusal.why}", 132))
        verdict = self.verdict()
        sign = "✓" if verdict == "the auditor is content" else "✗"
        canvas.text(32, top + _DETAIL_HEIGHT - 12, clip(f"{sign} {verdict}", 130), "b")


def _purpose(level: str, entry: int) -> str:
    if level != "l1":
        return _TABLE
    return _WRITABLE if entry & RW else _READ_ONLY


def _ranges(purposes: list[tuple[int, str]]) -> list[Range]:
    """Entries that follow one another and are for the same, together."""
    found = []
    for (purpose, _start), group in groupby(enumerate(purposes), lambda item: (item[1][1], item[1][0] - item[0])):
        members = [entry[0] for _place, entry in group]
        found.append(Range(members[0], members[-1], purpose))
    return found


def _range_text(part: Range) -> str:
    return f"{part.first}" if part.first == part.last else f"{part.first} to {part.last}"


def _range_line(part: Range) -> str:
    numbers = f"{part.first}" if part.first == part.last else f"{part.first}–{part.last}"
    return f"{numbers} {_SHORT[part.purpose]}".strip()


def _draw_field(canvas: Canvas, node: Node, x: float, y: float, size: int) -> None:
    """All entries of a table as small squares; absent ones are left empty."""
    columns, cell = _COLUMNS[size], _CELLS[size]
    rows = -(-size // columns)
    canvas.rect(x, y, columns * cell, rows * cell, "bg", stroke="var(--rule)")
    for purpose, colour in _COLOURS.items():
        shape = "".join(
            f"M{x + first % columns * cell:g} {y + first // columns * cell:g}h{(last - first + 1) * cell - 0.6:g}"
            f"v{cell - 0.6:g}h-{(last - first + 1) * cell - 0.6:g}z"
            for part in node.ranges
            if part.purpose == purpose
            for first, last in _rows_of(part, columns)
        )
        if shape:
            dash = "1.5 1.5" if purpose in (_OWN, _READ_ONLY) else ""
            canvas.path(shape, fill=colour, stroke="#111111" if dash else "", stroke_dasharray=dash, stroke_width="0.8")


def _rows_of(part: Range, columns: int) -> list[tuple[int, int]]:
    """A range cut at the ends of the field's rows."""
    starts = [part.first, *range((part.first // columns + 1) * columns, part.last + 1, columns)]
    return [(start, min(part.last, start // columns * columns + columns - 1)) for start in starts]


def _draw_mark(canvas: Canvas, index: int, x: float, y: float, size: int) -> None:
    """The frame round a refused entry, with a cross beside it."""
    columns, cell = _COLUMNS[size], _CELLS[size]
    left, top = x + index % columns * cell, y + index // columns * cell
    side = max(cell, 9) + 4
    middle = (left + cell / 2, top + cell / 2)
    canvas.rect(middle[0] - side / 2, middle[1] - side / 2, side, side, fill="none", stroke=REFUSED, stroke_width="3")
    fits = middle[0] + side / 2 + 14 <= x + columns * cell
    beside, anchor = (side / 2 + 3, "start") if fits else (-side / 2 - 3, "end")
    canvas.text(middle[0] + beside, middle[1] + 5, "✗", "b", colour=REFUSED, anchor=anchor)


def _draw_lines(canvas: Canvas, nodes: list[Node], places: dict[int, tuple[float, float]], width: float) -> None:
    """From each drawn table to the drawn tables that it names."""
    for node in nodes:
        for index, child in node.children:
            if node.mfn in places and child.mfn in places:
                (x1, y1), (x2, y2) = places[node.mfn], places[child.mfn]
                end = y2 + 9
                canvas.arrow(x1 + width, y1 + 60, x2 - 1, end, "var(--dim)")
                canvas.text(x2 - 5, end - 5, str(index), "d s", anchor="end")


def _draw_legend(canvas: Canvas, y: float) -> None:
    x = 16.0
    for purpose, colour in _COLOURS.items():
        dash = "1.5 1.5" if purpose in (_OWN, _READ_ONLY) else ""
        canvas.rect(x, y, 14, 12, fill=colour, stroke="#111111" if dash else "", stroke_dasharray=dash)
        short = _SHORT[purpose]
        name = f"{purpose} ({short})" if short else purpose
        canvas.text(x + 20, y + 10, name, "s")
        x += 44 + 6.3 * len(name)
    canvas.rect(x, y, 12, 12, fill="none", stroke=REFUSED, stroke_width="3")
    canvas.text(x + 18, y + 10, "✗ refused", "s")


__all__ = ["Node", "PageTree", "Range"]
