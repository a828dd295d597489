"""Page tables that a guest writes to directly (paper 3.3.3; Xen's "writable page tables").

The problem: page tables are mapped read-only, so a guest would have to replace every store to one by a
hypercall.  Some of these stores are hard to find.

The idea: the guest just stores, and gets no page fault for it.  The hypervisor makes the page writable, lets the CPU
execute that one instruction, closes the page again, and looks at what has changed in the table.
Each changed entry is judged as `mmu_update` would have judged it.  If all are allowed, they are counted and stay.
If one is not, the table, whatever else the instruction stored, and the registers are put back, and the
guest gets its page fault.  No instruction has to be decoded for that.

Only l1 tables are opened, only for the guest's kernel, and only if it has asked for that by `vm_assist`.

The invariant: between two instructions of guests no page table is writable.  What breaks without it:
whatever is stored into an open table is believed by the MMU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xenlab.errors import HypercallError
from xenlab.hypervisor.domain import Domain, Vcpu
from xenlab.hypervisor.frames import VALIDATED, FrameType
from xenlab.hypervisor.page_entries import Use
from xenlab.hypervisor.tlb import OPENED
from xenlab.hypervisor.trace import Kind
from xenlab.machine.memory import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from xenlab.machine.paging import ACCESSED, DIRTY, PAE, PRESENT, RW, Fault, Translation, walk

if TYPE_CHECKING:
    from xenlab.hypervisor.core import Hypervisor

STORE = int(Fault.PROTECTION | Fault.WRITE)
_AD = ACCESSED | DIRTY
# A bit for software, turned round while a page is open, so that a store over the opened entry shows.
_MARK = 0x800


@dataclass(frozen=True, slots=True)
class _Open:
    """A table that is open for one instruction.

    Attributes:
        vcpu: whose instruction.
        table: the frame of the table that is stored to.
        mapped_by: table and index of the entry that maps it.
        entry: that entry, as it was.
        before: the contents of the table, and of its neighbours in the address space, by frame.
        registers: as they were.
        fault: error code and address of the page fault.
    """

    vcpu: Vcpu
    table: int
    mapped_by: tuple[int, int]
    entry: int
    before: dict[int, bytes]
    registers: bytes
    fault: tuple[int, int]


class WritableTables:
    """Opens a table for one instruction, and judges what that has stored.

    Args:
        xen: the hypervisor.
        refused: called with vCPU, error code and address when the guest has to be given its page fault.
    """

    def __init__(self, xen: Hypervisor, refused: Callable[[Vcpu, int, int], None]) -> None:
        self._xen, self._memory, self._frames, self._tables = xen, xen.memory, xen.frames, xen.page_tables
        self._refused = refused

    def open(self, vcpu: Vcpu, error: int, address: int) -> bool:
        """Whether a page fault was a store to an l1 table of the guest's; if so, the store is under way."""
        if error != STORE or not vcpu.domain.writable_tables or vcpu.state.cpl == 3:
            return False
        # An instruction that stores to two tables at once faults at one while the other is open, for ever.
        if vcpu.opened_at == self._xen.now:
            return False
        try:
            mapped_by = table, index = self._xen.mmu.leaf_of(vcpu, address)
        except HypercallError:
            return False
        mode = vcpu.domain.mode
        entry = mode.read(self._memory, table << PAGE_SHIFT, index)
        mfn = mode.frame_of(entry)
        if not entry & PRESENT or not self._is_table(vcpu.domain, mfn):
            return False
        vcpu.opened_at = self._xen.now
        before = self._around(vcpu, address, mfn)
        opened = _Open(vcpu, mfn, mapped_by, entry, before, vcpu.state.save(), (error, address))
        mode.write(self._memory, table << PAGE_SHIFT, index, (entry | RW) ^ _MARK)
        self._xen.tlb.flush(OPENED, address & PAGE_MASK)
        self._xen.cpu.single_step(lambda trapped: self._close(opened, trapped))
        return True

    def _is_table(self, domain: Domain, mfn: int) -> bool:
        frames = self._frames
        if frames.owner_of(mfn) != domain.domid or frames.type[mfn] != FrameType.L1:
            return False
        return bool(frames.flags[mfn] & VALIDATED)

    def _around(self, vcpu: Vcpu, address: int, table: int) -> dict[int, bytes]:
        """What one instruction that stores at ``address`` may change: it stores in one piece, or pushes."""
        frames = {table}
        for place in (address - PAGE_SIZE, address + PAGE_SIZE):
            found = walk(self._memory, vcpu.state.mode, vcpu.state.cr3, place & 0xFFFF_FFFF, update=False)
            if isinstance(found, Translation):
                frames.add(found.machine >> PAGE_SHIFT)
        return {mfn: bytes(self._memory.frame(mfn)) for mfn in frames}

    def _close(self, opened: _Open, trapped: bool) -> None:
        vcpu, mode = opened.vcpu, opened.vcpu.domain.mode
        self._close_entry(opened)
        self._xen.tlb.flush(OPENED, opened.fault[1] & PAGE_MASK)
        after = bytes(self._memory.frame(opened.table))
        changes = _changes(mode.entry_size, opened.before[opened.table], after)
        if self._keep(vcpu.domain, opened.table, changes):
            self._xen.record(Kind.TABLE_WRITE, vcpu.domid, opened.table, tuple(changes), True)
            return
        self._put_back(opened)
        self._xen.record(Kind.TABLE_WRITE, vcpu.domid, opened.table, tuple(changes), False)
        if not trapped:
            self._refused(vcpu, *opened.fault)

    def _close_entry(self, opened: _Open) -> None:
        """Make the page read-only again, unless the instruction has stored over the entry itself."""
        mode, (table, index) = opened.vcpu.domain.mode, opened.mapped_by
        now = mode.read(self._memory, table << PAGE_SHIFT, index)
        if not (now ^ opened.entry ^ RW ^ _MARK) & ~_AD:
            mode.write(self._memory, table << PAGE_SHIFT, index, opened.entry | ACCESSED)

    def _keep(self, domain: Domain, table: int, changes: list[tuple[int, int, int]]) -> bool:
        """Count what the changed entries name; False, with nothing counted, if one of them may not stand there."""
        taken: list[tuple[int, int]] = []
        for index, old, new in changes:
            try:
                self._tables.take_entry(domain, table, Use.L1, index, new)
            except HypercallError:
                if not _is_upper_half(domain, old, new):
                    for done, entry in taken:
                        self._tables.drop_entry(domain, table, Use.L1, done, entry)
                    return False
                # The lower half, which makes it present anew, is expected to be stored next.
                domain.mode.write(self._memory, table << PAGE_SHIFT, index, new & ~PRESENT)
            else:
                taken.append((index, new))
        for index, old, _new in changes:
            self._tables.drop_entry(domain, table, Use.L1, index, old)
        return True

    def _put_back(self, opened: _Open) -> None:
        for mfn, data in opened.before.items():
            if bytes(self._memory.frame(mfn)) != data:
                self._memory.frame(mfn)[:] = data
                self._xen.cpu.forget_code(mfn << PAGE_SHIFT, mfn + 1 << PAGE_SHIFT)
        opened.vcpu.state.restore(opened.registers)


def _changes(size: int, before: bytes, after: bytes) -> list[tuple[int, int, int]]:
    """Index, old and new value of each entry that differs in more than the marks that the MMU sets."""
    import numpy as np

    kind = np.uint32 if size == 4 else np.uint64
    old, new = (np.frombuffer(page, kind) for page in (before, after))
    places = np.flatnonzero(old != new).tolist()
    found = [(place, int(old[place]), int(new[place])) for place in places]
    return [change for change in found if (change[1] ^ change[2]) & ~_AD]


def _is_upper_half(domain: Domain, old: int, new: int) -> bool:
    """Whether only the upper word of a present PAE entry has changed: the halves came the wrong way round."""
    return domain.mode is PAE and bool(old & PRESENT) and not (old ^ new) & 0xFFFF_FFFF & ~_AD
