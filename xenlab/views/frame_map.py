"""The frame map: what each frame of the machine is used as, how often, and whose it is (lesson 05; paper 3.3.3).

Machine frames are dealt out scattered, so a map in machine order looks like noise.  Here the frames of each
owner stand together, in the order of the numbers that the owner knows them by (its pseudo-physical frame numbers).
Equal neighbours are one piece; each piece can be chosen, and then says what the frame table has about it and
which entries name it.

The count of a cell is its uses as that type.  A dot marks a pinned frame, a bar below a validated table.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from xenlab.hypervisor.auditor import describe_entry
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.frames import FREE, NO_PFN, ORPHAN, OWNED, PINNED, TABLES, VALIDATED, XEN, FrameType
from xenlab.machine.memory import PAGE_SHIFT
from xenlab.machine.paging import PRESENT, PagingMode
from xenlab.views.canvas import WIDTH, Canvas, clip
from xenlab.views.palette import FRAME_COLOURS, FRAME_SIGNS, ink_on
from xenlab.views.picture import Picture, table
from xenlab.views.refusals import TYPE_NAMES

_PER_ROW, _CELL, _HEIGHT, _LEFT = 32, 25, 21, 64
_ROWS, _SHOWN, _NAMED = 9, 3, 5
_LEVEL_NAMES = {FrameType.L1: "l1", FrameType.L2: "l2", FrameType.L2_TOP: "l2", FrameType.L3: "l3"}
_LEGEND = (FrameType.NONE, FrameType.WRITABLE, FrameType.L1, FrameType.L2, FrameType.L3, FrameType.DESCRIPTORS)
_KINDS = {FrameType.NONE: "no type", FrameType.WRITABLE: "writable"}


@dataclass(frozen=True, slots=True)
class Look:
    """What a cell shows of a frame: type, uses, and its marks."""

    kind: FrameType
    uses: int
    flags: int


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbours that look alike.

    Attributes:
        place: of the first one among its owner's.
        frames: the machine frames.
        look: what all of them are.
    """

    place: int
    frames: tuple[int, ...]
    look: Look

    @property
    def key(self) -> str:
        """What it is selected by."""
        return f"frame.{self.frames[0]:x}"


class FrameMap(Picture):
    """Frames by owner, coloured by type, with their counts; and one of them in detail.

    Args:
        rows: how many rows of 32 frames are drawn for each domain; with the rest it is said how many are missing.
    """

    title = "The frame map"

    def __init__(self, xen: Hypervisor, *, rows: int = _ROWS) -> None:
        self._xen, self._rows = xen, rows
        self.selected: int | None = None

    def select(self, key: str) -> bool:
        """Choose a frame: ``frame.1e2`` for machine frame 0x1e2."""
        head, _dot, digits = key.partition(".")
        try:
            mfn = int(digits, 16) if head == "frame" else -1
        except ValueError:
            return False
        if not 0 <= mfn < self._xen.frames.count:
            return False
        self.selected = mfn
        return True

    def runs(self, domid: int) -> list[Run]:
        """All frames of a domain, in the order of its own numbers, equal neighbours together."""
        frames = self._in_order(domid)
        found: list[Run] = []
        # Rows of the picture end a run.
        for (_row, look), group in groupby(enumerate(frames), lambda item: (item[0] // _PER_ROW, self.look(item[1]))):
            members = list(group)
            found.append(Run(members[0][0], tuple(mfn for _place, mfn in members), look))
        return found

    def look(self, mfn: int) -> Look:
        """What is shown of one frame."""
        frames = self._xen.frames
        return Look(FrameType(frames.type[mfn]), frames.uses[mfn], frames.flags[mfn] & (PINNED | VALIDATED))

    def _in_order(self, domid: int) -> list[int]:
        m2p = self._xen.frames.m2p
        return sorted(self._xen.frames.owned_by(domid), key=lambda mfn: (m2p[mfn], mfn))

    def chosen(self) -> int | None:
        """The selected frame; the first table of the domain on the CPU, if none is selected."""
        if self.selected is not None:
            return self.selected
        domains = sorted(self._xen.domains)
        tables = (mfn for domid in domains for mfn in self._in_order(domid) if self._xen.frames.type[mfn] in TABLES)
        return next(tables, None)

    def named_by(self, mfn: int) -> list[str]:
        """What names a frame: entries of validated page tables, base pointers, pins, owning it."""
        frames, found = self._xen.frames, list[str]()
        if frames.flags[mfn] & OWNED:
            found.append(f"domain {frames.owner[mfn]} owns it")
        if frames.flags[mfn] & PINNED:
            found.append("it is pinned")
        for domid, domain in sorted(self._xen.domains.items()):
            found += [
                f"base pointer of domain {domid}, vCPU {number}"
                for number, vcpu in enumerate(domain.vcpus)
                if vcpu.initialised and vcpu.state.cr3 >> PAGE_SHIFT == mfn
            ]
            found += [f"descriptor table of domain {domid}" for vcpu in domain.vcpus if mfn in vcpu.gdt]
            found += self._entries_naming(domid, domain.mode, mfn)
        return found

    def _entries_naming(self, domid: int, mode: PagingMode, mfn: int) -> list[str]:
        import numpy as np

        frames, found = self._xen.frames, list[str]()
        for owned in self._in_order(domid):
            if frames.type[owned] not in TABLES or not frames.flags[owned] & VALIDATED:
                continue
            name = _LEVEL_NAMES[FrameType(frames.type[owned])]
            entries = self._xen.page_tables.entries(mode, owned)
            entries = entries[:4] if name == "l3" else entries
            hits = np.flatnonzero((entries & PRESENT).astype(bool) & ((entries & mode.frame_mask) >> PAGE_SHIFT == mfn))
            found += [
                f"entry {place} of {name} table {owned:#x}: {describe_entry(mode, int(entries[place]))}"
                for place in hits.tolist()
            ]
        return found

    # Text.

    def text(self) -> str:
        rows = []
        for domid in sorted(self._xen.domains):
            for run in self._whole_runs(domid):
                rows.append((str(domid), _places(run), *_look_texts(run.look)))
        headings = ("domain", "its frames", "type", "uses", "marks")
        parts = [f"{self.title}: {self._summary()}", table(headings, rows)]
        mfn = self.chosen()
        if mfn is not None:
            parts.append("\n".join((self._headline(mfn), *(f"  {line}" for line in self.named_by(mfn)))))
        return "\n\n".join(parts)

    def _whole_runs(self, domid: int) -> Iterable[Run]:
        """The runs, not cut at the ends of rows."""
        for look, group in groupby(self.runs(domid), lambda run: run.look):
            parts = list(group)
            yield Run(parts[0].place, tuple(mfn for run in parts for mfn in run.frames), look)

    def _summary(self) -> str:
        owner = self._xen.frames.owner
        own, free = owner.count(XEN), owner.count(FREE)
        orphans = owner.count(ORPHAN)
        gone = f", {orphans} of domains that are gone" if orphans else ""
        return f"{len(owner):,} frames: {own} the hypervisor's, {free:,} free{gone}"

    def _headline(self, mfn: int) -> str:
        pfn = self._xen.frames.m2p[mfn]
        return self._xen.frames.describe(mfn) + (f", pfn {pfn:#x}" if pfn != NO_PFN else "")

    # Picture.

    def svg(self) -> str:
        canvas = Canvas(self.title, self._summary())
        _draw_legend(canvas, 46)
        bottom = 72.0
        domains = sorted(self._xen.domains)
        for domid in domains[:_SHOWN]:
            bottom = self._draw_domain(canvas, domid, bottom)
        if len(domains) > _SHOWN:
            canvas.text(16, bottom + 14, f"and {len(domains) - _SHOWN} more domains", "d")
            bottom += 22
        if not domains:
            canvas.text(16, bottom + 14, "No domain yet.", "d")
            bottom += 22
        self._draw_detail(canvas, bottom + 6)
        return canvas.render(bottom + 6 + 34 + 18 * (_NAMED + 1) + 10)

    def _draw_domain(self, canvas: Canvas, domid: int, top: float) -> float:
        name, runs = self._xen.domains[domid].name, self.runs(domid)
        total = sum(len(run.frames) for run in runs)
        limit = self._rows * _PER_ROW
        canvas.chip(16, top + 14, domid, f"domain {domid}", 74)
        rest = f"; the first {limit:,} are shown" if total > limit else ""
        canvas.text(98, top + 14, clip(f"{name}, {total:,} frames{rest}", 90), "d")
        for row in range(self._rows):
            canvas.text(_LEFT - 8, top + 37 + row * _HEIGHT, f"{row * _PER_ROW:#05x}", "m d s", anchor="end")
        for run in runs:
            if run.place < limit:
                self._draw_run(canvas, domid, run, top + 22)
        return top + 22 + self._rows * _HEIGHT + 12

    def _draw_run(self, canvas: Canvas, domid: int, run: Run, top: float) -> None:
        row, column = divmod(run.place, _PER_ROW)
        x, y, width = _LEFT + column * _CELL, top + row * _HEIGHT, len(run.frames) * _CELL
        selected = self.selected in run.frames
        label = f"domain {domid}, {_places(run)}: {', '.join(filter(None, _look_texts(run.look)))}"
        canvas.open_event(run.key, label, selected=selected)
        colour = FRAME_COLOURS[run.look.kind]
        canvas.rect(x, y, width, _HEIGHT, fill=colour, stroke="var(--bg)", stroke_width="1")
        # Cells of one run, told apart by thin lines.
        shape = "".join(f"M{x + _CELL * n} {y:g}v{_HEIGHT}" for n in range(1, len(run.frames)))
        canvas.path(shape, stroke="var(--bg)", stroke_width="1", opacity="0.6")
        self._draw_signs(canvas, run, x, y)
        if selected:
            at = x + run.frames.index(self.selected or 0) * _CELL
            canvas.rect(at + 1, y + 1, _CELL - 2, _HEIGHT - 2, fill="none", stroke="var(--ink)", stroke_width="2.5")
        canvas.close()

    def _draw_signs(self, canvas: Canvas, run: Run, x: float, y: float) -> None:
        look = run.look
        style = f"{ink_on(FRAME_COLOURS[look.kind])} s".strip()
        for number in range(len(run.frames)):
            at = x + number * _CELL
            if sign := _sign(look):
                canvas.text(at + _CELL / 2, y + 15, sign, style, anchor="middle")
            if look.flags & PINNED:
                canvas.circle(at + 3.5, y + 3, 2.2, fill="#111111")
            if look.flags & VALIDATED:
                canvas.rect(at + 3, y + _HEIGHT - 4, _CELL - 6, 2, fill="#111111")

    def _draw_detail(self, canvas: Canvas, top: float) -> None:
        canvas.rect(16, top, WIDTH - 32, 34 + 18 * (_NAMED + 1), "soft", rx="6")
        mfn = self.chosen()
        if mfn is None:
            return
        canvas.text(28, top + 21, clip(self._headline(mfn), 112), "m b")
        lines = self.named_by(mfn)
        for place, line in enumerate(lines[:_NAMED]):
            canvas.text(28, top + 42 + 18 * place, clip(line, 112), "m")
        if len(lines) > _NAMED:
            canvas.text(28, top + 42 + 18 * _NAMED, f"and {len(lines) - _NAMED} more", "m d")
        if not lines:
            canvas.text(28, top + 42, "nothing names it", "m d")


def _sign(look: Look) -> str:
    """The type and how often, where that is more than once: ``l1``, ``w 2``, nothing for a plain page."""
    sign = FRAME_SIGNS[look.kind]
    if look.kind is FrameType.WRITABLE and look.uses == 1:
        return ""
    return f"{sign} {look.uses}" if look.uses > 1 else sign


def _places(run: Run) -> str:
    last = run.place + len(run.frames) - 1
    return f"{run.place:#x}" if last == run.place else f"{run.place:#x} to {last:#x}"


def _look_texts(look: Look) -> tuple[str, str, str]:
    marks = [name for bit, name in ((PINNED, "pinned"), (VALIDATED, "validated")) if look.flags & bit]
    return TYPE_NAMES[look.kind], str(look.uses), ", ".join(marks)


def _draw_legend(canvas: Canvas, y: float) -> None:
    x = 16.0
    for kind in _LEGEND:
        colour, name = FRAME_COLOURS[kind], _KINDS.get(kind, TYPE_NAMES[kind])
        canvas.rect(x, y, _CELL, 16, fill=colour, stroke="var(--rule)")
        canvas.text(x + _CELL / 2, y + 12, FRAME_SIGNS[kind], f"{ink_on(colour)} s".strip(), anchor="middle")
        canvas.text(x + _CELL + 6, y + 12, name, "s")
        x += _CELL + 16 + 6.3 * len(name)
    canvas.circle(x + 5, y + 8, 3, fill="var(--ink)")
    canvas.text(x + 13, y + 12, "pinned", "s")
    canvas.rect(x + 60, y + 11, 16, 2, fill="var(--ink)")
    canvas.text(x + 82, y + 12, "validated", "s")
    canvas.text(WIDTH - 16, y + 12, "a number: that many uses", "s d", anchor="end")


__all__ = ["FrameMap", "Look", "Run"]
