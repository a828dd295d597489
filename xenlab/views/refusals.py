"""Which update of a page table was refused, and why, in words (lesson 05; paper 3.3.3).

The hypervisor answers with an errno.  Many rules share one, so the reason is found again here: from the
entry, and from what its frame is.  A whole table that is refused names a chain: the entry that the
guest stored, and in the table that this names, the entry that broke a rule.  `Refusal.cause` is the innermost.

The invariant: only what the trace and the frame table say is told.  The frame table tells what a frame is now: of an
entry that nothing is against any more it is said what may have been against it then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from xenlab.abi.numbers import Errno, Hypercall, MmuextOp
from xenlab.errors import HypercallError
from xenlab.hypervisor.auditor import describe_entry
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.frames import FREE, ORPHAN, TABLES, XEN, FrameType
from xenlab.hypervisor.layout import first_reserved_slot
from xenlab.hypervisor.page_entries import judge_entry
from xenlab.hypervisor.page_types import FrameTypes
from xenlab.hypervisor.trace import Event, Kind
from xenlab.machine.memory import PAGE_SHIFT
from xenlab.machine.paging import PRESENT, RW
from xenlab.views.story import answer_text, hypercall_name, newest_first

TYPE_NAMES = {
    FrameType.NONE: "none",
    FrameType.L1: "l1 table",
    FrameType.L2: "l2 table",
    FrameType.L3: "l3 table",
    FrameType.L2_TOP: "l2 table",
    FrameType.DESCRIPTORS: "descriptors",
    FrameType.WRITABLE: "writable",
}
_MMU_CALLS = (
    Hypercall.mmu_update,
    Hypercall.update_va_mapping,
    Hypercall.update_va_mapping_otherdomain,
    Hypercall.mmuext_op,
)
_PINS = {MmuextOp.PIN_L1_TABLE: "l1", MmuextOp.PIN_L2_TABLE: "l2", MmuextOp.PIN_L3_TABLE: "l3"}
_BELOW = {"l2": (FrameType.L1,), "l3": (FrameType.L2, FrameType.L2_TOP)}
_LAST_L3_SLOT = 3
_ROOTS = (MmuextOp.NEW_BASEPTR, MmuextOp.NEW_USER_BASEPTR)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Something about page tables that was refused.

    Attributes:
        time: instructions begun.
        domain: whose attempt.
        how: ``mmu_update``, ``store`` and so on.
        answer: what the guest got: ``-EBUSY``, ``page fault``.
        table, index: where the entry was to stand; -1 where no entry was asked for.
        entry: the entry in words.
        why: the rule, in a sentence.
        inside: the entry, in words, of the table that ``entry`` names, if the rule is broken there.
    """

    time: int
    domain: int
    how: str
    answer: str
    table: int
    index: int
    entry: str
    why: str
    inside: str = ""

    @property
    def place(self) -> str:
        """Where it was to stand, in words."""
        return f"entry {self.index} of the table in frame {self.table:#x}" if self.index >= 0 else self.entry

    def __str__(self) -> str:
        what = f"{self.place} = {self.entry}" if self.index >= 0 else self.entry
        return f"{self.how}: {self.answer}: {what}: {self.because}"

    @property
    def because(self) -> str:
        """The rule, and where it is broken."""
        return f"{self.inside}: {self.why}" if self.inside else self.why


def last_refusal(xen: Hypervisor, domid: int | None = None) -> Refusal | None:
    """The newest refusal in the trace, of one domain if given."""
    found = _newest_group(xen, domid)
    if found is None:
        return None
    events, end = found
    domain = xen.domains[end.domain]
    if end.kind is Kind.TABLE_WRITE:
        return _of_entry(xen, domain, end, events, "store", "page fault")
    how, answer = hypercall_name(end.number), answer_text(end.result)
    if events:
        return _of_entry(xen, domain, end, events, how, answer)
    call = next((event for _key, event in newest_first(xen) if _is_call(event, end)), None)
    what, why = _of_call(xen, domain, call)
    return Refusal(end.time, end.domain, how, answer, -1, -1, what, why)


def _is_call(event: Event, end: Event) -> bool:
    return event.kind is Kind.HYPERCALL and (event.time, event.domain) == (end.time, end.domain)


def _newest_group(xen: Hypervisor, domid: int | None) -> tuple[list[Event], Event] | None:
    """The end of the newest attempt that failed, and the entries that were refused in it, newest first."""
    end: Event | None = None
    entries: list[Event] = []
    for _key, event in newest_first(xen):
        if end is not None and (event.time, event.domain) != (end.time, end.domain):
            break
        if end is None and _failed(event) and domid in (None, event.domain) and event.domain in xen.domains:
            end = event
        elif end is not None and event.kind is Kind.REFUSED:
            entries.append(event)
    return (entries, end) if end is not None else None


def _failed(event: Event) -> bool:
    if event.kind is Kind.TABLE_WRITE:
        return not event.kept
    return event.kind is Kind.RETURN and event.number in _MMU_CALLS and event.result < 0


def _of_entry(xen: Hypervisor, domain: Domain, end: Event, refused: list[Event], how: str, answer: str) -> Refusal:
    """The entry that the guest asked for, and the reason of the innermost one."""
    chain = list(_chain(domain, refused))
    asked, cause = chain[0], chain[-1]
    why = reason(xen, domain, cause.table, cause.index, cause.entry, cause.errno)
    entry, inside = describe_entry(domain.mode, asked.entry), ""
    if cause is not asked:
        inside = f"entry {cause.index} of the table {cause.table:#x} is {describe_entry(domain.mode, cause.entry)}"
    return Refusal(end.time, end.domain, how, answer, asked.table, asked.index, entry, why, inside)


def _chain(domain: Domain, refused: list[Event]) -> Iterator[Event]:
    """From the entry that was asked for down to the one that broke a rule; they were recorded the other way."""
    asked = refused[0]
    yield asked
    for event in refused[1:]:
        if domain.mode.frame_of(asked.entry) != event.table:
            return
        yield event
        asked = event


def reason(xen: Hypervisor, domain: Domain, table: int, index: int, entry: int, errno: int) -> str:
    """The rule that an entry breaks, as far as it can be seen now."""
    mode, frames = domain.mode, xen.frames
    kind = frames.type[table] if table < frames.count else FrameType.NONE
    reserved = first_reserved_slot(mode, kind)
    if reserved is not None and index >= reserved:
        return f"entries from {reserved} on are the hypervisor's, in every address space"
    if kind == FrameType.L3 and index >= _LAST_L3_SLOT:
        return "the table behind the last entry holds the hypervisor's range: it must be there at every moment"
    level = _level(kind, errno)
    if judge_entry(level, entry & ~mode.frame_mask, 0, 0) < 0:
        return "with this flag the entry would mean something else to the MMU than what was checked"
    mfn = mode.frame_of(entry)
    if mfn >= frames.count:
        return f"there is no such frame: the machine has {frames.count:#x}"
    if mfn == table and level != "l1":
        return "a table may name itself, but only to be read"
    return _owner_reason(xen, domain, mfn) or _type_reason(xen, mfn, level, entry)


def _level(kind: int, errno: int) -> str:
    names = {FrameType.L1: "l1", FrameType.L2: "l2", FrameType.L2_TOP: "l2", FrameType.L3: "l3"}
    # A table that was refused as a whole has no type any more; the errno of pages differs from that of tables.
    return names.get(FrameType(kind), "l1" if errno in (Errno.EBUSY, Errno.EPERM) else "l2")


def _owner_reason(xen: Hypervisor, domain: Domain, mfn: int) -> str:
    owner = xen.frames.owner[mfn]
    if owner == domain.domid:
        return ""
    whose = {XEN: "the hypervisor's", FREE: "free, and may be somebody's next", ORPHAN: "of a domain that is gone"}
    return "the frame is " + whose.get(owner, f"domain {owner}'s")


def _type_reason(xen: Hypervisor, mfn: int, level: str, entry: int) -> str:
    frames = xen.frames
    kind, uses = FrameType(frames.type[mfn]), frames.uses[mfn]
    is_now = f"the frame is {_article(kind)} now ({_times(uses)})"
    if level == "l1":
        if entry & RW and kind in (*TABLES, FrameType.DESCRIPTORS):
            return f"{is_now}: it must not be writable at the same time"
    elif kind is FrameType.WRITABLE:
        return f"the frame is mapped writable ({_times(uses)}): what was checked could be changed behind the check"
    elif kind is not FrameType.NONE and kind not in _BELOW[level]:
        return f"{is_now}: it cannot be a table of another level at the same time"
    return _past_reason(xen, level, entry)


def _past_reason(xen: Hypervisor, level: str, entry: int) -> str:
    """What nothing is against now was refused for what the frame was then."""
    if not isinstance(xen.page_types, FrameTypes):
        return "this validator has a rule of its own against it, or the frame was something else then"
    if level == "l1":
        return "the frame was a table or held descriptors then" if entry & RW else "the frame had too many uses then"
    return "the frame was mapped writable then, or a table of another level"


def _article(kind: FrameType) -> str:
    name = TYPE_NAMES[kind]
    return f"an {name}" if name[0] == "l" else name


def _times(uses: int) -> str:
    return f"{uses} use" + ("" if uses == 1 else "s")


def _of_call(xen: Hypervisor, domain: Domain, call: Event | None) -> tuple[str, str]:
    """What a call without a refused entry was about: a command about a frame, or an entry in a frame."""
    words = _first_element(xen, domain, call)
    if call is None or words is None:
        return "its arguments", "they are not what such a call expects"
    if call.number == Hypercall.mmuext_op:
        return _of_command(xen, domain, words)
    mfn = (words[0] | words[1] << 32) >> PAGE_SHIFT
    return f"an entry in frame {mfn:#x}", _frame_reason(xen, domain, mfn) or "the frame is no validated table"


def _first_element(xen: Hypervisor, domain: Domain, call: Event | None) -> tuple[int, ...] | None:
    # Of a longer array it is not known which element was refused.
    if call is None or call.number not in (Hypercall.mmu_update, Hypercall.mmuext_op) or call.registers[1] != 1:
        return None
    try:
        return xen.guest_memory.read_words(domain.vcpus[0], call.registers[3], 4)
    except HypercallError:
        return None


def _of_command(xen: Hypervisor, domain: Domain, words: tuple[int, ...]) -> tuple[str, str]:
    command, mfn = words[:2]
    name = MmuextOp(command).name if command in MmuextOp._value2member_map_ else f"command {command}"
    if command not in (*_PINS, *_ROOTS, MmuextOp.UNPIN_TABLE):
        return name, "it is not what such a call expects"
    what = f"{name} of frame {mfn:#x}"
    found = _frame_reason(xen, domain, mfn)
    if found or command == MmuextOp.UNPIN_TABLE:
        return what, found or "it is not pinned"
    # A table of level n is what an entry of level n + 1 names.
    level = {"l1": "l2", "l2": "l3"}.get(_PINS.get(MmuextOp(command), ""), "l3")
    return what, _type_reason(xen, mfn, level, PRESENT)


def _frame_reason(xen: Hypervisor, domain: Domain, mfn: int) -> str:
    if mfn >= xen.frames.count:
        return f"there is no such frame: the machine has {xen.frames.count:#x}"
    return _owner_reason(xen, domain, mfn)


__all__ = ["TYPE_NAMES", "Refusal", "last_refusal", "reason"]
