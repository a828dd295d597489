"""The TLB of a recorded run: what is in it, whose it is, what is out of date, what flushed it (lesson 06; paper 2.1.1).

Three things are drawn: the slots, by set and way, in the colours of those whose pages they are; the
counters; and for the chosen entry the access that brought it in.  An entry is marked *stale* when the page tables
of the running vCPU say something else by now.

`space_bars` sets the cost of a hypervisor at the top of every address space beside that of one in its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.layout import start_of
from xenlab.hypervisor.tlb import REASONS
from xenlab.machine.accesses import UNKNOWN, AccessKind
from xenlab.machine.memory import PAGE_SHIFT
from xenlab.machine.paging import READ, RW, TWO_LEVEL, USER, PageFault, walk
from xenlab.machine.tlb import EVICTED, FIRST, FLUSHED, Tlb, TlbCost, TlbEntry
from xenlab.timeline.access_log import BY_HYPERVISOR, UNNAMED, AccessLog
from xenlab.timeline.tlb_replay import DEFAULT_HYPERVISOR_PAGES, ENTRY, EXIT, TlbReplay, both_spaces
from xenlab.views.bars import BarsView
from xenlab.views.canvas import WIDTH, Canvas, clip
from xenlab.views.palette import RING_COLOURS, RING_NAMES
from xenlab.views.picture import Picture, table
from xenlab.views.story import symbol

_COLUMNS, _ROW, _TOP, _LABEL = 4, 22, 66, 62
_FLUSH_COLUMNS, _COUNTERS = 4, (110, 222, 418, 548, 708)
_HELP = (
    "Page → machine frame, and whether it may be read (r) or written too (rw). Choose one to see what brought it in."
)
_MISSES = {FIRST: "first use", FLUSHED: "after a flush", EVICTED: "no room"}
_RIGHTS = RW | USER
_DID = {AccessKind.READ: "a read", AccessKind.WRITE: "a write", AccessKind.FETCH: "the fetch"}
HYPERVISOR, KERNEL, APPLICATION = 0, 1, 3


@dataclass(frozen=True, slots=True)
class TlbSlot:
    """One slot as the picture shows it.

    Attributes:
        place: set and way.
        entry: None for an empty slot.
        whose: `HYPERVISOR`, `KERNEL` or `APPLICATION`.
        now: what the page tables say instead, empty if they say the same.
    """

    place: tuple[int, int]
    entry: TlbEntry | None
    whose: int = KERNEL
    now: str = ""

    @property
    def leads_to(self) -> str:
        """The frame, and what may be done there."""
        if self.entry is None:
            return ""
        frame = "Xen's own" if self.entry.frame == UNKNOWN else f"{self.entry.frame:x}"
        return frame + (" rw" if self.entry.flags & RW else " r") + (" global" if self.entry.is_global else "")

    @property
    def key(self) -> str:
        """Its ``data-event`` key."""
        return f"page.{self.entry.page:05x}" if self.entry else ""


class TlbView(Picture):
    """The TLB at the time at which the machine is.

    Args:
        xen: the machine of the run that was recorded, at any time of it.
        replay: the record, with a TLB.
    """

    title = "The TLB"

    def __init__(self, xen: Hypervisor, replay: TlbReplay) -> None:
        self._xen, self._replay = xen, replay
        self._chosen = ""

    def slots(self) -> list[TlbSlot]:
        """All slots, in order of sets and ways."""
        tlb = self._replay.to(self._xen.now)
        return [self._slot(divmod(place, tlb.ways), entry) for place, entry in enumerate(tlb.slots)]

    def _slot(self, place: tuple[int, int], entry: TlbEntry | None) -> TlbSlot:
        if entry is None:
            return TlbSlot(place, None)
        vcpu = self._xen.current
        if entry.page << PAGE_SHIFT >= start_of(vcpu.state.mode if vcpu else TWO_LEVEL):
            whose = HYPERVISOR
        else:
            whose = APPLICATION if entry.flags & USER else KERNEL
        return TlbSlot(place, entry, whose, self._now(entry))

    def _now(self, entry: TlbEntry) -> str:
        """What a walk gives, if that is something else than the entry says."""
        vcpu = self._xen.current
        # Nobody runs, or the page is one of those that a replay has put in.
        if vcpu is None or entry.frame == UNKNOWN:
            return ""
        state = vcpu.state
        found = walk(self._xen.memory, state.mode, state.cr3, entry.page << PAGE_SHIFT, READ, update=False)
        if isinstance(found, PageFault):
            return "no page"
        frame = found.machine >> PAGE_SHIFT
        if frame == entry.frame and not (found.entry ^ entry.flags) & _RIGHTS:
            return ""
        return f"{frame:x}" + (" rw" if found.entry & RW else " r")

    def select(self, key: str) -> bool:
        if all(slot.key != key for slot in self.slots() if slot.entry):
            return False
        self._chosen = key
        return True

    def text(self) -> str:
        slots = self.slots()
        rows = [
            (
                f"{slot.place[0]}",
                f"{slot.place[1]}",
                f"{slot.entry.page:05x}",
                slot.leads_to,
                RING_NAMES[slot.whose],
                f"STALE, now {slot.now}" if slot.now else "",
            )
            for slot in slots
            if slot.entry
        ]
        tlb = self._replay.tlb
        parts = (
            f"{self.title}: {self._summary()}",
            table(("set", "way", "page", "leads to", "whose", ""), rows) if rows else "It is empty.",
            table(("", "accesses"), [(name, str(count)) for name, count in _accesses(tlb)]),
            table(("flushed", "times"), [(name, str(tlb.flushes[name])) for name in self._flush_reasons()]),
            self._detail(slots),
        )
        return "\n\n".join(part for part in parts if part)

    def svg(self) -> str:
        slots = self.slots()
        canvas = Canvas(self.title, self._summary())
        _draw_legend(canvas, 50)
        columns = min(_COLUMNS, self._replay.tlb.ways)
        for number, slot in enumerate(slots):
            row, column = divmod(number, columns)
            _draw_slot(canvas, slot, (row, column, columns), chosen=slot.key == self._chosen)
        bottom = _TOP + _ROW * -(-len(slots) // columns) + 26.0
        canvas.text(16, bottom, self._detail(slots) or _HELP, "d s")
        bottom = _draw_counters(canvas, self._replay.tlb, self._flush_reasons(), bottom + 26)
        return canvas.render(bottom)

    def _summary(self) -> str:
        tlb, log = self._replay.tlb, self._replay.log
        where = "an address space of its own" if self._replay.own_space else "the top 64 MB"
        ways = "fully associative" if tlb.sets == 1 else f"{tlb.sets} sets × {tlb.ways}"
        late = f", recorded up to {log.end:,}" if self._xen.now > log.end else ""
        return f"{self._xen.now:,} instructions{late}; {tlb.entries} entries, {ways}; hypervisor in {where}"

    def _flush_reasons(self) -> Sequence[str]:
        ways = (ENTRY, EXIT) if self._replay.own_space else ()
        return (*REASONS, UNNAMED, *ways)

    def _detail(self, slots: list[TlbSlot]) -> str:
        slot = next((slot for slot in slots if slot.entry and slot.key == self._chosen), None)
        if slot is None or slot.entry is None:
            return ""
        text = f"Page {slot.entry.page:05x} leads to {slot.leads_to}"
        if slot.now:
            text += f", by the page tables to {slot.now}"
        return f"{text}. {self._cause(slot.entry)}"

    def _cause(self, entry: TlbEntry) -> str:
        touch = self._replay.causes.get(entry.page)
        if touch is None or entry.frame == UNKNOWN:
            return "The hypervisor touches it each time that it is entered."
        if touch.eip == BY_HYPERVISOR:
            return f"Brought in at {touch.time:,} by a copy that the hypervisor made."
        current = self._xen.current
        name = symbol(current.domain if current else None, touch.eip)
        place = f"{touch.eip:08x}" + (f" ({name})" if name else "")
        return f"Brought in at {touch.time:,} by {_DID[touch.kind]} of the instruction at {place}."


def _draw_legend(canvas: Canvas, y: float) -> None:
    x = 16.0
    for ring in (HYPERVISOR, KERNEL, APPLICATION):
        label = f"{RING_NAMES[ring]}'s page"
        canvas.rect(x, y - 11, 14, 14, fill=RING_COLOURS[ring], rx="3")
        canvas.text(x + 20, y, f"{_letter(ring)}  {label}", "s")
        x += 56 + 6.3 * len(label)
    canvas.rect(x, y - 11, 14, 14, "soft", stroke="var(--ink)", stroke_width="2", stroke_dasharray="4 2", rx="3")
    canvas.text(x + 20, y, "stale: by now the page tables say what follows ≠", "s")


def _letter(ring: int) -> str:
    return {HYPERVISOR: "X", KERNEL: "K", APPLICATION: "A"}[ring]


def _draw_slot(canvas: Canvas, slot: TlbSlot, at: tuple[int, int, int], *, chosen: bool) -> None:
    row, column, columns = at
    width = (WIDTH - 16 - _LABEL) / columns
    x, y = _LABEL + column * width, _TOP + row * _ROW
    if not column and slot.place[1] < columns:
        canvas.text(16, y + 15, f"set {slot.place[0]}", "d s")
    if slot.entry is None:
        canvas.rect(x, y, width - 3, _ROW - 3, "soft", rx="3")
        return
    stale = f" ≠ {slot.now}" if slot.now else ""
    label = f"page {slot.entry.page:05x} → {slot.leads_to}, {RING_NAMES[slot.whose]}{', stale' if stale else ''}"
    canvas.open_event(slot.key, label, selected=chosen)
    outline = {"stroke": "var(--ink)", "stroke_width": "2"} if chosen or stale else {}
    dash = {"stroke_dasharray": "4 2"} if stale else {}
    canvas.rect(x, y, width - 3, _ROW - 3, fill=RING_COLOURS[slot.whose], rx="3", **outline, **dash)
    shown = f"{_letter(slot.whose)} {slot.entry.page:05x} → {slot.leads_to}{stale}"
    canvas.text(x + 6, y + 14, clip(shown, int((width - 12) / 6.7)), "m k b s" if stale else "m k s")
    canvas.close()


def _accesses(tlb: Tlb) -> list[tuple[str, int]]:
    return [("hits", tlb.hits), ("misses", tlb.misses)] + [(name, tlb.fills[why]) for why, name in _MISSES.items()]


def _draw_counters(canvas: Canvas, tlb: Tlb, flushes: Sequence[str], top: float) -> float:
    canvas.text(16, top, "Accesses", "b")
    for place, (name, count) in enumerate(_accesses(tlb)):
        _draw_count(canvas, (_COUNTERS[place], top), name, count)
    canvas.text(340, top, "of these", "d")
    top += 26
    canvas.text(16, top, "Flushes", "b")
    for place, name in enumerate(flushes):
        row, column = divmod(place, _FLUSH_COLUMNS)
        _draw_count(canvas, (110 + 192 * column, top + 20 * row), name, tlb.flushes[name])
    return top + 20 * -(-len(flushes) // _FLUSH_COLUMNS)


def _draw_count(canvas: Canvas, at: tuple[float, float], name: str, count: int) -> None:
    canvas.text(*at, f"{count:,}", "m b" if count else "m d")
    canvas.text(at[0] + 10 + 7.25 * len(f"{count:,}"), at[1], name, "" if count else "d")


def space_bars(
    log: AccessLog,
    *,
    cost: TlbCost | None = None,
    entries: int = 64,
    ways: int | None = 4,
    hypervisor_pages: int = DEFAULT_HYPERVISOR_PAGES,
) -> BarsView:
    """Cycles each time that the hypervisor was entered: at the top of every address space, and in one of its own."""
    cost = cost or TlbCost()
    entered = max(log.traps(), 1)
    labels, values = [], []
    both = both_spaces(log, entries=entries, ways=ways, hypervisor_pages=hypervisor_pages)
    for name, tlb in zip(("top 64 MB", "space of its own"), both, strict=True):
        labels += [f"{name}: flushes", f"{name}: misses"]
        values += [cost.flushing(tlb) / entered, cost.walks(tlb) / entered]
    unit = "cycles each time the hypervisor is entered"
    return BarsView(labels, values, unit, title="Where the hypervisor lives, and what that costs")


__all__ = ["TlbSlot", "TlbView", "space_bars"]
