"""The trap table of a guest: for each vector who takes it, where it leads, how often (lesson 07; paper 2.1.2).

The hypervisor's answer to a vector follows from the guest's table: with a handler it is bounced; without one an
exception ends the guest.  Two are looked at first: a #GP may be a privileged instruction, which is emulated, and a page
fault may be a store to a page table.  One software interrupt may have a gate of the CPU's own, which the
hypervisor does not see.

A choice shows the last frame of that vector, word by word, and the instruction that caused it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.trace import Event, Kind
from xenlab.machine.vectors import EXCEPTIONS, PAGE_FAULT, PROTECTION, WITH_ERROR_CODE, vector_name
from xenlab.views.canvas import WIDTH, Canvas, clip
from xenlab.views.frames import word_meaning
from xenlab.views.palette import APPLICATION, KERNEL, ink_on
from xenlab.views.picture import Picture, table
from xenlab.views.story import FrameWord, frame_words, newest_first, symbol

DIRECT, BOUNCED, CHECKED, ENDS, REFUSED = "direct", "bounced", "checked, bounced", "ends the guest", "refused: #GP"
_COLOURS = {DIRECT: APPLICATION, BOUNCED: KERNEL, CHECKED: KERNEL, ENDS: "var(--soft)", REFUSED: "var(--soft)"}
_LAST_EXCEPTION, _INTEL_ONLY = 31, (2, 18)
_ROW, _TOP = 21, 82
_COLUMNS = (16, 52, 204, 332, 476, 514, 606)
_HEADS = ("vector", "", "who takes it", "handler", "ring", "INT by", "taken")
_DETAIL_X, _DETAIL_ROWS = 636, 6
# So many software interrupts have a row in the picture.
_FEW_INTERRUPTS, _MOST_INTERRUPTS = 3, 12
_CHECKED_NOTE = "Checked first: is a #GP a privileged instruction, a page fault a store to a page table?"


@dataclass(frozen=True, slots=True)
class TrapRow:
    """One vector.

    Attributes:
        vector: its number.
        way: one of `DIRECT`, `BOUNCED`, `CHECKED`, `ENDS` and `REFUSED`.
        handler: the handler's name, empty without one.
        ring: where the handler runs, 0 without one.
        dpl: the outermost ring that may raise it by INT, 0 without one.
        masks: whether it is entered with events masked.
        taken: how often it was delivered, as far back as a view looks.
    """

    vector: int
    way: str
    handler: str
    ring: int
    dpl: int
    masks: bool
    taken: int

    @property
    def key(self) -> str:
        """Its ``data-event`` key."""
        return f"vector.{self.vector}"

    @property
    def has_error_code(self) -> bool:
        """Whether its frame has an error code."""
        return self.vector in WITH_ERROR_CODE

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        mask = " +mask" if self.masks else ""
        where = (f"{self.handler}{mask}", str(self.ring), f"0-{self.dpl}") if self.handler else ("", "", "")
        number = f"{self.vector}" if self.vector <= _LAST_EXCEPTION else f"{self.vector:#x}"
        return (number, vector_name(self.vector), self.way, *where, str(self.taken) if self.taken else "")


class TrapTableView(Picture):
    """The virtual trap table of a domain's first vCPU, and the frames that were built by it.

    Args:
        xen: the machine.
        domid: the domain.
    """

    title = "The trap table"

    def __init__(self, xen: Hypervisor, domid: int = 0) -> None:
        self._xen, self._domid = xen, domid
        self._chosen = -1

    @property
    def _domain(self) -> Domain:
        return self._xen.domains[self._domid]

    def rows(self) -> list[TrapRow]:
        """All exceptions, and the software interrupts that have a handler, by number."""
        taken = Counter(event.vector for event in self._deliveries())
        traps = self._domain.vcpus[0].traps
        exceptions = [vector for vector in EXCEPTIONS if vector not in _INTEL_ONLY]
        others = [vector for vector, gate in enumerate(traps) if gate is not None and vector not in exceptions]
        return [self._row(vector, taken[vector]) for vector in sorted(exceptions + others)]

    def _row(self, vector: int, taken: int) -> TrapRow:
        vcpu = self._domain.vcpus[0]
        gate, real = vcpu.traps[vector], vcpu.state.gate
        if gate is None:
            return TrapRow(vector, ENDS if vector <= _LAST_EXCEPTION else REFUSED, "", 0, 0, False, taken)
        way = CHECKED if vector in (PROTECTION, PAGE_FAULT) else BOUNCED
        if real is not None and real.vector == vector:
            way = DIRECT
        name = symbol(self._domain, gate.eip) or f"{gate.eip:#010x}"
        return TrapRow(vector, way, name, gate.cs & 3, gate.dpl, gate.masks_events, taken)

    def _deliveries(self) -> list[Event]:
        """Newest first."""
        kinds = (Kind.DELIVER, Kind.GATE)
        events = (event for _key, event in newest_first(self._xen) if event.kind in kinds)
        return [event for event in events if event.domain == self._domid]

    def frame(self) -> tuple[Event, list[FrameWord]] | None:
        """The last frame of the chosen vector, or of any if none is chosen; highest address first."""
        events = [event for event in self._deliveries() if self._chosen in (-1, event.vector)]
        return (events[0], frame_words(self._xen, events[0])) if events else None

    def select(self, key: str) -> bool:
        rows = {row.key: row for row in self.rows()}
        if key not in rows:
            return False
        self._chosen = -1 if rows[key].vector == self._chosen else rows[key].vector
        return True

    def text(self) -> str:
        rows = table(_HEADS, [row.cells() for row in self.rows()])
        parts = [f"{self.title}: {self._summary()}", rows, self._detail()]
        found = self.frame()
        if found is not None:
            vector, cells = found[0].vector, []
            for word in found[1]:
                cells.append((f"{word.address:#010x}", word.name, f"{word.value:#010x}", word_meaning(vector, word)))
            parts.append(table(("address", "word", "value", "meaning"), cells))
        return "\n\n".join(parts)

    def _summary(self) -> str:
        entered = sum(event.kind is Kind.DELIVER for event in self._deliveries())
        direct = sum(event.kind is Kind.GATE for event in self._deliveries())
        return f"{self._xen.now:,} instructions; {entered} bounced, {direct} direct"

    def _detail(self) -> str:
        found = self.frame()
        if found is None:
            return "No frame yet." if self._chosen == -1 else f"No frame for {vector_name(self._chosen)} yet."
        event, words = found
        by = "the CPU itself" if event.kind is Kind.GATE else "the hypervisor"
        return (
            f"{vector_name(event.vector)} at instruction {event.time:,}, ring {event.from_ring} → {event.to_ring}: "
            f"{len(words)} words, pushed by {by}"
        )

    def svg(self) -> str:
        canvas, rows = Canvas(self.title, self._summary()), self.rows()
        exceptions = sum(row.vector <= _LAST_EXCEPTION for row in rows)
        most = exceptions + (_MOST_INTERRUPTS if len(rows) - exceptions > _FEW_INTERRUPTS else _FEW_INTERRUPTS)
        _draw_legend(canvas)
        for x, head in zip(_COLUMNS, _HEADS, strict=True):
            canvas.text(x, _TOP - 8, head, "d s", anchor="end" if head == "taken" else "")
        for place, row in enumerate(rows[:most]):
            _draw_row(canvas, row, _TOP + _ROW * place, chosen=row.vector == self._chosen)
        # As high as it becomes when the guest has registered its handlers, so that nothing below moves.
        bottom = _TOP + _ROW * most + 34.0
        more = f"  ({len(rows) - most} rows more in the text.)" if len(rows) > most else ""
        canvas.text(16, bottom - 16, _CHECKED_NOTE + more, "d s")
        self._draw_frame(canvas, _TOP - 8.0)
        return canvas.render(max(bottom, _TOP + 60 + 38 * _DETAIL_ROWS + 20))

    def _draw_frame(self, canvas: Canvas, y: float) -> None:
        found = self.frame()
        canvas.text(_DETAIL_X, y, "Last frame" + ("" if self._chosen == -1 else " of this vector"), "b")
        if found is None:
            canvas.text(_DETAIL_X, y + 22, "None yet.", "d")
            return
        event, words = found
        by = "the CPU itself" if event.kind is Kind.GATE else "the hypervisor"
        canvas.text(_DETAIL_X, y + 20, f"{clip(vector_name(event.vector), 20)}, at {event.time:,}")
        canvas.text(_DETAIL_X, y + 37, f"ring {event.from_ring} → {event.to_ring}, by {by}", "d s")
        for place, word in enumerate(words):
            colour = APPLICATION if event.kind is Kind.GATE else KERNEL
            _draw_word(canvas, event.vector, word, y + 48 + 38 * place, colour)


def _draw_legend(canvas: Canvas) -> None:
    x = 16.0
    for way, says in (
        (DIRECT, "by the CPU itself, 3 → 1"),
        (BOUNCED, "through the hypervisor, 3 → 0 → 1"),
        (ENDS, "there is no handler"),
    ):
        canvas.rect(x, 41, 14, 14, fill=_COLOURS[way], rx="3", stroke="var(--rule)")
        canvas.text(x + 20, 53, f"{way}: {says}", "s")
        x += 44 + 6.0 * len(f"{way}: {says}")


def _draw_row(canvas: Canvas, row: TrapRow, y: float, *, chosen: bool) -> None:
    number, name, way, handler, ring, dpl, taken = row.cells()
    canvas.open_event(row.key, f"{name}: {way}, {handler or 'no handler'}, taken {row.taken} times", selected=chosen)
    canvas.rect(8, y, _DETAIL_X - 24, _ROW - 1, "hit", rx="3")
    dim = "" if row.handler or row.taken else " d"
    canvas.text(_COLUMNS[0], y + 15, number, f"m{dim}")
    canvas.text(_COLUMNS[1], y + 15, clip(name, 19), f"b{dim}" if row.handler else "d")
    colour = _COLOURS[row.way]
    canvas.rect(_COLUMNS[2], y + 2, 114, _ROW - 5, fill=colour, rx="3")
    canvas.text(_COLUMNS[2] + 57, y + 14, way, f"{ink_on(colour)} s".strip(), anchor="middle")
    canvas.text(_COLUMNS[3], y + 15, clip(handler, 20), "m s")
    canvas.text(_COLUMNS[4], y + 15, ring, "m")
    canvas.text(_COLUMNS[5], y + 15, dpl, "m")
    canvas.text(_COLUMNS[6], y + 15, taken, "m b", anchor="end")
    canvas.close()


def _draw_word(canvas: Canvas, vector: int, word: FrameWord, y: float, colour: str) -> None:
    width = WIDTH - 16 - _DETAIL_X
    canvas.rect(_DETAIL_X, y, width, 36, fill=colour, stroke="var(--bg)")
    canvas.text(_DETAIL_X + 8, y + 15, word.name, "k b")
    canvas.text(_DETAIL_X + width - 8, y + 15, f"{word.value:08x}", "m k", anchor="end")
    canvas.text(_DETAIL_X + 8, y + 30, f"{word.address:08x}", "m k s")
    canvas.text(_DETAIL_X + 82, y + 30, clip(word_meaning(vector, word), 25), "k s")


__all__ = ["BOUNCED", "CHECKED", "DIRECT", "ENDS", "REFUSED", "TrapRow", "TrapTableView"]
