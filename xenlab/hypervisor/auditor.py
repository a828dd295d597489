"""The auditor: everything that must hold, recomputed from the page tables themselves (paper 3.3.3).

The mechanisms keep types and counts up to date call by call.  The auditor believes none of that.  It
starts from what the MMU starts from, the base pointers, adds what was pinned, walks every table as the MMU
would, and counts again.  Then it compares.  What must hold is listed in `Invariant`.

It runs after every hypercall in tests, and where a lesson or a grader asks for it.  It changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from xenlab.abi.numbers import FIRST_RESERVED_GDT_PAGE
from xenlab.errors import HypercallError, InvariantError
from xenlab.hypervisor.descriptor_tables import checked_descriptor, read_only_entry
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.frames import EMPTY_FRAME, FREE, ORPHAN, OWNED, PINNED, TSS_FRAME, FrameType
from xenlab.hypervisor.layout import (
    GDT_BASE,
    GDT_PAGES,
    LDT_BASE,
    LDT_PAGES,
    TSS_BASE,
    first_reserved_slot,
    gdt_base,
    segments_end,
)
from xenlab.hypervisor.page_entries import Use, flags_are_ordinary
from xenlab.hypervisor.page_tables import root_use
from xenlab.hypervisor.page_types import FrameTypes
from xenlab.machine.memory import PAGE_SHIFT, PAGE_SIZE
from xenlab.machine.paging import ACCESSED, DIRTY, NX, PRESENT, RW, USER, PagingMode

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from xenlab.hypervisor.core import Hypervisor

_BRANCHES = (Use.L2, Use.L2_TOP, Use.L3)
_MANY = 20


class Invariant(Enum):
    """What must hold between two instructions of guests, each with what would break without it."""

    EXCLUSIVE = "no frame is at the same time a page table, or descriptors, and writable by a guest"
    ONE_LEVEL = "no frame is a table of two levels, or a table and descriptors, at once"
    OWNERSHIP = "no guest maps a frame that it neither owns nor was allowed to map"
    TABLES_OWNED = "a guest's page tables are frames of its own"
    RANGE = "no guest entry reaches the hypervisor's range, and nothing there can be written"
    FLAGS = "no entry has a flag that gives it another meaning than the one that was checked"
    DESCRIPTORS = "no descriptor leads to ring 0"
    FREE = "a free frame is nobody's, mapped nowhere and scrubbed"
    COUNTS = "types and counts are what the page tables say"
    TLB = "no translation that the hypervisor remembers leads where the guest may not go"


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing that does not hold: what, and where it was found."""

    invariant: Invariant
    where: str

    def __str__(self) -> str:
        return f"{self.invariant.value}: {self.where}"


@dataclass(slots=True)
class _Tree:
    """The page tables of one domain, as they are reached from its base pointers and pins.

    Attributes:
        uses: for each table its use, by frame.
        leaves: frames of l1 tables.
    """

    uses: dict[int, int] = field(default_factory=dict)
    leaves: list[int] = field(default_factory=list)


def audit(xen: Hypervisor) -> list[Violation]:
    """Everything that does not hold; empty if the auditor is content."""
    found = _Audit(xen)
    found.run()
    return found.violations


def check(xen: Hypervisor) -> None:
    """Raise InvariantError, with the first few violations, unless the auditor is content."""
    violations = audit(xen)
    if violations:
        lines = [str(violation) for violation in violations[:_MANY]]
        raise InvariantError(violations[0].invariant.name, "\n".join(lines))


class _Audit:
    def __init__(self, xen: Hypervisor) -> None:
        import numpy as np

        self.xen, self.frames, self.memory = xen, xen.frames, xen.memory
        self.violations: list[Violation] = []
        count = xen.frames.count
        self.refs, self.uses = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self.types = np.zeros(count, np.uint8)
        self.owners = np.frombuffer(xen.frames.owner, np.int32)
        self.writable = np.zeros(count, bool)

    def run(self) -> None:
        for domain in self.xen.domains.values():
            self._domain(domain)
        self._exclusive()
        self._free_frames()
        self._counts()
        self._translations()

    def complain(self, invariant: Invariant, where: str) -> None:
        self.violations.append(Violation(invariant, where))

    # What a domain's tables say.

    def _domain(self, domain: Domain) -> None:
        flags = self.frames.flags
        mine = [mfn for mfn in self.frames.owned_by(domain.domid) if flags[mfn] & OWNED]
        self.refs[mine] += 1
        self._use(domain, domain.shared_info_mfn, Use.WRITE, "the shared page")
        for vcpu in domain.vcpus:
            if vcpu.info_mfn:
                self._use(domain, vcpu.info_mfn, Use.WRITE, "a vCPU's record")
        tree = _Tree()
        for mfn, use, what in self._roots(domain, mine):
            self._table(domain, tree, mfn, use, what)
        for mfn in self.xen.page_tables.partial:
            if self.owners[mfn] == domain.domid:
                self._table(domain, tree, mfn, self.frames.type[mfn], "an interrupted check")
        self._all_leaves(domain, tree)
        self._own_tables(domain)

    def _roots(self, domain: Domain, mine: list[int]) -> Iterator[tuple[int, int, str]]:
        use = root_use(domain.mode)
        for vcpu in domain.vcpus:
            if vcpu.initialised:
                yield vcpu.state.cr3 >> PAGE_SHIFT, use, "a base pointer"
            if vcpu.user_base:
                yield vcpu.user_base, use, "a base pointer for applications"
        for mfn in mine:
            if self.frames.flags[mfn] & PINNED:
                yield mfn, self.frames.type[mfn], "a pin"

    def _use(self, domain: Domain, mfn: int, use: int, what: str) -> bool:
        """Count one typed use; False where the frame cannot be that."""
        if not 0 <= mfn < self.frames.count or self.owners[mfn] != domain.domid:
            self.complain(Invariant.TABLES_OWNED, f"{what} of domain {domain.domid} names frame {mfn:#x}")
            return False
        if self.types[mfn] not in (FrameType.NONE, use):
            both = f"{FrameType(self.types[mfn]).name} and {FrameType(use).name}"
            self.complain(Invariant.ONE_LEVEL, f"frame {mfn:#x} of domain {domain.domid} is {both} ({what})")
            return False
        self.types[mfn] = use
        self.uses[mfn] += 1
        self.refs[mfn] += 1
        return True

    def _table(self, domain: Domain, tree: _Tree, mfn: int, use: int, what: str) -> None:
        if not self._use(domain, mfn, use, what) or mfn in tree.uses:
            return
        tree.uses[mfn] = use
        if use == Use.L1:
            tree.leaves.append(mfn)
        elif use in _BRANCHES:
            self._branches(domain, tree, mfn, use)

    def _branches(self, domain: Domain, tree: _Tree, mfn: int, use: int) -> None:
        mode = domain.mode
        import numpy as np

        entries = self.xen.page_tables.entries(mode, mfn)
        reserved = first_reserved_slot(mode, use)
        entries = entries[: mode.levels[0].entries] if use == Use.L3 else entries
        for index in np.flatnonzero(entries[: self.xen.page_tables.partial.get(mfn, reserved)] & PRESENT).tolist():
            self._branch(domain, tree, mfn, use, index, int(entries[index]))
        if reserved is not None and mfn not in self.xen.page_tables.partial:
            self._reserved_slots(domain, mfn, entries[reserved:].tolist(), reserved)

    def _branch(self, domain: Domain, tree: _Tree, table: int, use: int, index: int, entry: int) -> None:
        mode, what = domain.mode, f"entry {index} of table {table:#x}"
        below = mode.frame_of(entry)
        extra = (
            entry & ~mode.frame_mask & ~(PRESENT | RW | USER | ACCESSED | DIRTY | 0xE00 | (NX if mode.has_nx else 0))
        )
        if extra or (use == Use.L3 and entry & (RW | USER)):
            self.complain(Invariant.FLAGS, f"{what} of domain {domain.domid}: {describe_entry(mode, entry)}")
        wanted = Use.L1
        if use == Use.L3:
            wanted = Use.L2_TOP if index == mode.levels[0].entries - 1 else Use.L2
        if below < self.frames.count and wanted == Use.L1 and self._is_linear(table, below, entry):
            if below != table:
                self._use(domain, below, self.frames.type[below], what)
            return
        self._table(domain, tree, below, wanted, what)

    def _is_linear(self, table: int, below: int, entry: int) -> bool:
        kinds = (FrameType.L2, FrameType.L2_TOP)
        return not entry & RW and (below == table or self.frames.type[below] in kinds)

    def _reserved_slots(self, domain: Domain, table: int, entries: list[int], reserved: int) -> None:
        for index, entry in enumerate(entries, reserved):
            if entry & ~(ACCESSED | DIRTY) != domain.hypervisor_slots.get(index, 0) & ~(ACCESSED | DIRTY):
                where = f"entry {index} of table {table:#x} of domain {domain.domid} is {entry:#x}"
                self.complain(Invariant.RANGE, where)

    def _all_leaves(self, domain: Domain, tree: _Tree) -> None:
        import numpy as np

        mode = domain.mode
        for table in tree.leaves:
            entries = self.xen.page_tables.entries(mode, table)
            if table in self.xen.page_tables.partial:
                entries = entries[: self.xen.page_tables.partial[table]]
            if not flags_are_ordinary(mode, entries):
                self.complain(Invariant.FLAGS, f"an entry of l1 table {table:#x} of domain {domain.domid}")
            places = np.flatnonzero(entries & PRESENT)
            mfns = ((entries[places] & mode.frame_mask) >> PAGE_SHIFT).astype(np.int64)
            self._leaf_owners(domain, table, entries, places, mfns)
            inside = mfns < self.frames.count
            written = ((entries[places] & RW) != 0)[inside]
            mfns = mfns[inside]
            np.add.at(self.refs, mfns, 1)
            np.add.at(self.uses, mfns[written], 1)
            self.writable[mfns[written]] = True

    def _leaf_owners(
        self,
        domain: Domain,
        table: int,
        entries: NDArray[np.unsignedinteger],
        places: NDArray[np.integer],
        mfns: NDArray[np.int64],
    ) -> None:
        owners = self.owners[mfns.clip(0, self.frames.count - 1)]
        foreign = (owners != domain.domid) | (mfns >= self.frames.count)
        if domain.privileged:
            foreign &= (owners < 0) & (owners != ORPHAN)
        for place in places[foreign].tolist():
            entry = int(entries[place])
            where = (
                f"entry {place} of l1 table {table:#x} of domain {domain.domid}: {describe_entry(domain.mode, entry)}"
            )
            mfn = domain.mode.frame_of(entry)
            whose = self.frames.describe(mfn) if mfn < self.frames.count else "no such frame"
            self.complain(Invariant.OWNERSHIP, f"{where} ({whose})")

    def _own_tables(self, domain: Domain) -> None:
        """The tables of the hypervisor's through which the CPU finds the descriptors of the domain's vCPUs."""
        import numpy as np

        mode, own = domain.mode, domain.own_tables
        found = np.concatenate([self.xen.page_tables.entries(mode, mfn) for mfn in own])
        expected, leaf = np.zeros_like(found), mode.levels[-1].entries

        def place(address: int) -> int:
            return (address - GDT_BASE) // PAGE_SIZE

        for number, base in enumerate(map(gdt_base, range(domain.max_vcpus))):
            first, local = place(base), place(base + LDT_BASE - GDT_BASE)
            expected[first : first + GDT_PAGES] = read_only_entry(mode, EMPTY_FRAME)
            reserved = read_only_entry(mode, self.xen.shared_pages.descriptors(mode))
            expected[first + FIRST_RESERVED_GDT_PAGE] = reserved
            shown = [pair for vcpu in domain.vcpus[number : number + 1] for pair in enumerate(vcpu.gdt, first)]
            ldt = range(local, local + LDT_PAGES)
            shown += [(index, mode.frame_of(int(found[index]))) for index in ldt if found[index] & PRESENT]
            for index, mfn in shown:
                expected[index] = read_only_entry(mode, mfn)
                self._descriptors(domain, mfn)
        expected[place(TSS_BASE)] = read_only_entry(mode, TSS_FRAME)
        for index in np.flatnonzero(found != expected).tolist():
            table, value = own[index // leaf], int(found[index])
            self.complain(Invariant.RANGE, f"entry {index % leaf} of the hypervisor's table {table:#x} is {value:#x}")

    def _descriptors(self, domain: Domain, mfn: int) -> None:
        if not self._use(domain, mfn, Use.DESCRIPTORS, "a descriptor table"):
            return
        count = PAGE_SIZE // 8
        for number, value in enumerate(self.memory.qwords[mfn * count : (mfn + 1) * count]):
            if value and not _is_safe(value, segments_end(domain.mode)):
                where = f"descriptor {number} in frame {mfn:#x} of domain {domain.domid}: {value:#018x}"
                self.complain(Invariant.DESCRIPTORS, where)

    # What all of them say together.

    def _exclusive(self) -> None:
        import numpy as np

        typed = (self.types != FrameType.NONE) & (self.types != FrameType.WRITABLE)
        for mfn in np.flatnonzero(typed & self.writable).tolist():
            where = f"frame {mfn:#x} is {FrameType(self.types[mfn]).name} and mapped writable"
            self.complain(Invariant.EXCLUSIVE, where)
        self.types[self.writable & ~typed] = FrameType.WRITABLE

    def _free_frames(self) -> None:
        import numpy as np

        free = np.flatnonzero(self.owners == FREE)
        if len(free) != self.frames.free_frames:
            self.complain(Invariant.FREE, f"{self.frames.free_frames} free frames are listed, {len(free)} are free")
        for mfn in free[self.refs[free] != 0].tolist():
            self.complain(Invariant.FREE, f"frame {mfn:#x} is free and referred to {self.refs[mfn]} times")
        # Only frames that were mapped once: reading the others would make them cost memory of the host.
        left = np.frombuffer(self.frames.left, np.int64)
        for mfn in free[left[free] >= 0].tolist():
            if not self.memory.is_zero(mfn):
                self.complain(Invariant.FREE, f"frame {mfn:#x} is free and not all zeros")

    def _counts(self) -> None:
        import numpy as np

        if not isinstance(self.xen.page_types, FrameTypes):
            return  # a part that keeps its counts to itself
        columns: dict[str, NDArray[np.integer]] = {"type": self.types, "uses": self.uses, "refs": self.refs}
        for name, expected in columns.items():
            found = np.frombuffer(getattr(self.frames, name), np.uint8 if name == "type" else np.int32)
            for mfn in np.flatnonzero(found != expected).tolist():
                where = f"{name} of {self.frames.describe(mfn)}; the tables say {expected[mfn]}"
                self.complain(Invariant.COUNTS, where)
        for domain in self.xen.domains.values():
            # The shared page is beside what a domain's memory is counted to be.
            owned = int((self.owners == domain.domid).sum()) - 1
            if owned != domain.pages:
                where = f"domain {domain.domid} has {owned} frames and is said to have {domain.pages}"
                self.complain(Invariant.COUNTS, where)

    def _translations(self) -> None:
        for domain in self.xen.domains.values():
            for vcpu in domain.vcpus:
                if vcpu.translated_at != self.xen.cpu.flushes:
                    continue
                for key, machine in vcpu.translations.items():
                    self._translation(domain, key, machine >> PAGE_SHIFT)

    def _translation(self, domain: Domain, key: int, mfn: int) -> None:
        own = self.owners[mfn] == domain.domid
        foreign = domain.privileged and (self.owners[mfn] >= 0 or self.owners[mfn] == ORPHAN)
        table = key < 0 and self.types[mfn] not in (FrameType.NONE, FrameType.WRITABLE)
        if not (own or foreign) or table:
            address = (~key if key < 0 else key) << PAGE_SHIFT
            where = f"domain {domain.domid}, address {address:#x} leads to {self.frames.describe(mfn)}"
            self.complain(Invariant.TLB, where)


def _is_safe(value: int, start: int) -> bool:
    try:
        return checked_descriptor(value, start) == value
    except HypercallError:
        return False


def describe_entry(mode: PagingMode, entry: int) -> str:
    """A page-table entry in words: ``0x1e2067: frame 0x1e2, present, writable, user, accessed, dirty``."""
    if not entry & PRESENT:
        return f"{entry:#x}: not present"
    names = (
        (PRESENT, "present"),
        (RW, "writable"),
        (USER, "user"),
        (0x8, "write-through"),
        (0x10, "uncached"),
        (ACCESSED, "accessed"),
        (DIRTY, "dirty"),
        (0x80, "superpage"),
        (0x100, "global"),
        (NX if mode.has_nx else 0, "no-execute"),
    )
    marks = [name for bit, name in names if entry & bit]
    return f"{entry:#x}: frame {mode.frame_of(entry):#x}, {', '.join(marks)}"


__all__ = ["Invariant", "Violation", "audit", "check", "describe_entry"]
