"""The guest's own segment descriptors: its GDT and LDT (paper 2.1.1, 3.3.3).

The problem: a descriptor says in which ring a code segment runs.  A guest that could write one as it
likes would write one for ring 0.  So a frame of descriptors has a type as a page table has: it is checked when
it becomes one, the guest can only read it, and changes go through `update_descriptor`.

A guest hands over whole frames for its GDT, at most 14; behind them come two pages of the hypervisor's, with the
flat segments that every guest may use.  An LDT is named by its linear address, and its pages are taken one by
one when the CPU first looks for a descriptor in them.  Both belong to a vCPU, and stand in a window of its own
(`layout`): two vCPUs that name the same frames hold each one twice, and what one puts aside the other keeps.

What is checked is what Xen checks: a descriptor that is not present may be anything.  One for ring 0 is moved
to ring 1, where the guest's kernel runs.  A segment is cut off where the hypervisor begins.  A call
gate may lead to code of the guest's own, by which an application calls its kernel without the hypervisor: the CPU
takes it alone, on the stack that stands in the task state segment.  All other system descriptors are refused: task
state segments, tables, gates for interrupts and tasks.  Besides, the accessed bit is set in each segment, so that the
CPU never has to write to the table.

The invariant: no descriptor that the CPU can load gives ring 0, or leads there.  What breaks without it: one far
jump, and the guest is the hypervisor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from xenlab.abi.numbers import Errno, Hypercall
from xenlab.errors import HypercallError
from xenlab.hypervisor.descriptors import checked_selector, gate_may_name
from xenlab.hypervisor.domain import Domain, Vcpu
from xenlab.hypervisor.frames import EMPTY_FRAME
from xenlab.hypervisor.layout import GDT_BASE, LDT_PAGES, segments_end, start_of
from xenlab.hypervisor.page_entries import Use
from xenlab.hypervisor.page_types import REFUSED
from xenlab.hypervisor.tlb import DESCRIPTORS
from xenlab.machine.memory import PAGE_SHIFT, PAGE_SIZE
from xenlab.machine.paging import ACCESSED, NX, PRESENT, Fault, PageFault, PagingMode, walk
from xenlab.machine.segments import ACCESSED as SEGMENT_ACCESSED
from xenlab.machine.segments import CODE, DESCRIPTOR_SIZE, GRANULAR, LONG, Descriptor

if TYPE_CHECKING:
    from xenlab.hypervisor.core import Hypervisor

GUEST_GDT_PAGES = 14
_PER_PAGE = PAGE_SIZE // DESCRIPTOR_SIZE
MOST_GDT_ENTRIES = GUEST_GDT_PAGES * _PER_PAGE
MOST_LDT_ENTRIES = LDT_PAGES * _PER_PAGE
_EXPAND_DOWN = 0x4
_CALL_GATE = 0xC
_GATE_RESERVED = 0xE0 << 32


def checked_descriptor(value: int, start: int) -> int:
    """A descriptor in the form in which it may stand in a table.

    Args:
        value: the eight bytes as the guest wants them.
        start: the first address that no segment may reach.

    Raises:
        HypercallError: EINVAL for a system descriptor that is not a call gate into the guest's own code, for 64-bit
            code, and for a segment that grows downwards.
    """
    found = Descriptor.decode(value)
    if not found.present:
        return value
    if not found.dpl:
        value |= 1 << 45
    if found.is_segment:
        return _checked_segment(value | SEGMENT_ACCESSED << 40, start)
    if found.access & 0xF == _CALL_GATE:
        return _checked_gate(value)
    if found.access & 0xF:
        raise HypercallError(Errno.EINVAL)
    return value  # the second half of a longer descriptor, which does nothing here


def _checked_gate(value: int) -> int:
    """A gate ignores its selector's own level, so what counts is where the selector points."""
    selector = checked_selector(value >> 16 & 0xFFFF)
    if value & _GATE_RESERVED or not gate_may_name(selector):
        raise HypercallError(Errno.EINVAL)
    return value & ~(0xFFFF << 16) | selector << 16


def _checked_segment(value: int, start: int) -> int:
    found = Descriptor.decode(value)
    if found.flags & LONG:
        raise HypercallError(Errno.EINVAL)
    if not found.access & CODE and found.access & _EXPAND_DOWN:
        raise HypercallError(Errno.EINVAL)  # it would reach upwards to the end of all addresses
    if found.base < start <= found.base + found.limit:
        limit, flags = start - 1 - found.base, found.flags
        # In whole pages, if it was in pages before and one is left.
        if flags & GRANULAR and limit >= PAGE_SIZE - 1:
            limit = (limit + 1 & ~(PAGE_SIZE - 1)) - 1
        else:
            flags &= ~GRANULAR
        return Descriptor(found.base, limit, found.access, flags).encode()
    return value


class DescriptorTables:
    """GDT and LDT of each vCPU, as the CPU finds them in the hypervisor's range."""

    def __init__(self, xen: Hypervisor) -> None:
        self._xen, self._memory, self._guest, self._frames = xen, xen.memory, xen.guest_memory, xen.frames
        xen.traps.segments.page_in = self.page_in_ldt
        xen.hypercalls.register(Hypercall.set_gdt, self.set_gdt)
        xen.hypercalls.register(Hypercall.update_descriptor, self.update_descriptor)

    def check_frame(self, domain: Domain, mfn: int) -> None:
        """Check a frame that becomes descriptors, and store them as they may stand.  Raises HypercallError."""
        words, first = self._memory.qwords, mfn * _PER_PAGE
        checked = [checked_descriptor(value, segments_end(domain.mode)) for value in words[first : first + _PER_PAGE]]
        for number, value in enumerate(checked):
            if words[first + number] != value:
                words[first + number] = value

    def set_gdt(self, vcpu: Vcpu, address: int, entries: int, *_: int) -> int:
        """Use other frames as descriptor table.

        Args:
            address: of an array of frame numbers.
            entries: how many descriptors there are, of which the last page may be only partly used.
        """
        if entries > MOST_GDT_ENTRIES:
            raise HypercallError(Errno.EINVAL)
        count = -(-entries // _PER_PAGE)
        data = self._guest.read(vcpu, address, 4 * count)
        frames = tuple(int.from_bytes(data[at : at + 4], "little") for at in range(0, 4 * count, 4))
        self.take_all(vcpu.domain, frames)
        before = vcpu.gdt
        self.install_gdt(vcpu, frames)
        self.drop_all(vcpu.domain, before)
        self._xen.tlb.flush(DESCRIPTORS)
        self._xen.exceptions.segment_registers.reload(vcpu.domain)
        return 0

    def take_all(self, domain: Domain, frames: Sequence[int]) -> None:
        """Use all these frames as descriptors once more.  Raises HypercallError; none is used then."""
        taken: list[int] = []
        try:
            for mfn in frames:
                self._take(domain, mfn)
                taken.append(mfn)
        except HypercallError:
            self.drop_all(domain, taken)
            raise

    def drop_all(self, domain: Domain, frames: Sequence[int]) -> None:
        """Undo `take_all`."""
        for mfn in frames:
            self._xen.page_tables.drop(domain, mfn, Use.DESCRIPTORS)

    def install_gdt(self, vcpu: Vcpu, frames: tuple[int, ...]) -> None:
        """Let the CPU find these frames, which were taken, as descriptor table of ``vcpu``."""
        self._show_gdt(vcpu, frames)
        vcpu.gdt = frames

    def _take(self, domain: Domain, mfn: int) -> None:
        if self._frames.owner_of(mfn) != domain.domid:
            raise HypercallError(Errno.EINVAL)
        self._xen.page_tables.take(domain, mfn, Use.DESCRIPTORS)

    def _show_gdt(self, vcpu: Vcpu, frames: tuple[int, ...]) -> None:
        for page in range(GUEST_GDT_PAGES):
            self._show(
                vcpu.domain, vcpu.gdt_base + page * PAGE_SIZE, frames[page] if page < len(frames) else EMPTY_FRAME
            )

    def _show(self, domain: Domain, address: int, mfn: int) -> None:
        mode, (table, index) = domain.mode, place_of(domain.mode, domain.own_tables, address)
        mode.write(self._memory, table << PAGE_SHIFT, index, read_only_entry(mode, mfn))

    def update_descriptor(self, vcpu: Vcpu, low: int, high: int, first: int, second: int, *_: int) -> int:
        """Change one descriptor.

        Args:
            low, high: its machine address.
            first, second: its two words.
        """
        address, domain = low | high << 32, vcpu.domain
        mfn = address >> PAGE_SHIFT
        if self._frames.owner_of(mfn) != domain.domid or address % DESCRIPTOR_SIZE:
            raise HypercallError(Errno.EINVAL)
        value = checked_descriptor(first | second << 32, segments_end(domain.mode))
        use = Use.DESCRIPTORS if self._frames.type[mfn] == Use.DESCRIPTORS else Use.WRITE
        if self._xen.page_tables.types.take(mfn, use) == REFUSED:
            raise HypercallError(Errno.EINVAL)
        self._memory.qwords[address >> 3] = value
        self._xen.page_tables.drop(domain, mfn, use)
        self._xen.cpu.forget_code(mfn << PAGE_SHIFT, mfn + 1 << PAGE_SHIFT)
        if use == Use.DESCRIPTORS:
            self._xen.exceptions.segment_registers.reload(domain)
        return 0

    def set_ldt(self, vcpu: Vcpu, address: int, entries: int) -> None:
        """Use the descriptors at a linear address as LDT.  Raises HypercallError."""
        end = address + entries * DESCRIPTOR_SIZE
        if address % PAGE_SIZE or entries > MOST_LDT_ENTRIES or end > start_of(vcpu.domain.mode):
            raise HypercallError(Errno.EINVAL)
        self.forget_ldt(vcpu)
        self.install_ldt(vcpu, address, entries)
        self._xen.exceptions.segment_registers.reload(vcpu.domain)

    def install_ldt(self, vcpu: Vcpu, address: int, entries: int) -> None:
        """Let ``vcpu`` have so many local descriptors at a linear address that was checked."""
        vcpu.ldt = address, entries
        vcpu.state.set_ldt(vcpu.ldt_base if entries else 0, max(entries * DESCRIPTOR_SIZE - 1, 0))

    def forget_ldt(self, vcpu: Vcpu) -> None:
        """Drop the pages of the LDT that the CPU has asked for."""
        frames = self.ldt_frames(vcpu)
        if not frames:
            return
        mode, (table, first) = vcpu.domain.mode, self._ldt_place(vcpu)
        for page in range(LDT_PAGES):
            mode.write(self._memory, table << PAGE_SHIFT, first + page, 0)
        self.drop_all(vcpu.domain, frames)
        self._xen.tlb.flush(DESCRIPTORS)

    def _ldt_place(self, vcpu: Vcpu) -> tuple[int, int]:
        return place_of(vcpu.domain.mode, vcpu.domain.own_tables, vcpu.ldt_base)

    def ldt_frames(self, vcpu: Vcpu) -> list[int]:
        """The frames of descriptors that are shown to the CPU as LDT of ``vcpu``."""
        mode, (table, first) = vcpu.domain.mode, self._ldt_place(vcpu)
        entries = (mode.read(self._memory, table << PAGE_SHIFT, first + page) for page in range(LDT_PAGES))
        return [mode.frame_of(entry) for entry in entries if entry & PRESENT]

    def page_in_ldt(self, vcpu: Vcpu, error: int, address: int) -> bool:
        """The CPU looked for a descriptor at ``address`` in the LDT: show it the page, if it may be shown.

        Not if the page is there already and the guest has tried to write to it or to execute it: it would for ever.
        """
        offset = address - vcpu.ldt_base
        base, entries = vcpu.ldt
        if error & (Fault.PROTECTION | Fault.USER) or not 0 <= offset < entries * DESCRIPTOR_SIZE:
            return False
        at = base + (offset & ~(PAGE_SIZE - 1)) & 0xFFFF_FFFF
        state = vcpu.state
        found = walk(self._memory, state.mode, state.cr3, at, update=False)
        if isinstance(found, PageFault):
            return False
        mfn = found.machine >> PAGE_SHIFT
        try:
            self._take(vcpu.domain, mfn)
        except HypercallError:
            return False
        self._show(vcpu.domain, address, mfn)
        return True

    def release(self, vcpu: Vcpu) -> None:
        """Drop all tables of a vCPU that ends."""
        self.forget_ldt(vcpu)
        self._show_gdt(vcpu, ())
        self.drop_all(vcpu.domain, vcpu.gdt)
        vcpu.gdt, vcpu.ldt = (), (0, 0)


def place_of(mode: PagingMode, own_tables: Sequence[int], address: int) -> tuple[int, int]:
    """Where the entry of a domain's own tables stands that maps ``address``: a frame, and the index in it."""
    leaf = mode.levels[-1]
    return own_tables[(address - GDT_BASE) // (leaf.entries * PAGE_SIZE)], leaf.index(address)


def read_only_entry(mode: PagingMode, mfn: int) -> int:
    """An entry in a table of the hypervisor's through which a guest's kernel can read a frame."""
    return mode.entry(mfn, PRESENT | ACCESSED | (NX if mode.has_nx else 0))


__all__ = ["DescriptorTables", "checked_descriptor", "place_of", "read_only_entry"]
