"""The hypervisor's own pages that guests see: its descriptors, and the machine-to-physical list (paper 2.1.1, 3.3.4).

Every address space has the same pages at its top, through tables that are the hypervisor's and that no
guest can change: one table with the machine-to-physical list, made once for each format of page tables, and for
each domain those with the descriptor tables of its vCPUs, of which the last pages are the same for all.

The invariant: nothing here can be written from ring 1 or 3.  What breaks without it: see `descriptor_tables`.
"""

from __future__ import annotations

from typing import Any

from xenlab.abi.numbers import FIRST_RESERVED_GDT_PAGE
from xenlab.hypervisor.descriptor_tables import place_of, read_only_entry
from xenlab.hypervisor.frames import EMPTY_FRAME, TSS_FRAME, XEN, FrameTable
from xenlab.hypervisor.layout import (
    GDT_LIMIT,
    TSS_BASE,
    descriptor_slots,
    gdt_base,
    m2p_slot,
    reserved_gdt_page,
)
from xenlab.machine.memory import PAGE_SHIFT, PAGE_SIZE, Memory
from xenlab.machine.paging import ACCESSED, PRESENT, PagingMode


class SharedPages:
    """Makes them when the first guest of a format needs them."""

    def __init__(self, memory: Memory, frames: FrameTable) -> None:
        self._memory, self._frames = memory, frames
        # By format: the frame of descriptors, and the table with the machine-to-physical list.
        self._made: dict[str, tuple[int, int]] = {}

    def descriptors(self, mode: PagingMode) -> int:
        """The frame with the flat segments for guests in ``mode``."""
        return self._made[mode.name][0]

    def m2p_table(self, mode: PagingMode) -> int:
        """The l1 table that maps the machine-to-physical list."""
        return self._made[mode.name][1]

    def are_made(self, mode: PagingMode) -> bool:
        """Whether there was a guest of this format before."""
        return mode.name in self._made

    def make(self, mode: PagingMode) -> None:
        """Make them, if they are not there.  Raises MachineError when memory is full."""
        if mode.name not in self._made:
            descriptors, table = self._frames.allocate(2, XEN)
            self._memory.frame(descriptors)[:] = reserved_gdt_page(mode)
            for page, mfn in enumerate(self._frames.m2p_frames):
                mode.write(self._memory, table << PAGE_SHIFT, page, read_only_entry(mode, mfn))
            self._made[mode.name] = descriptors, table

    def fill_own_tables(self, mode: PagingMode, tables: list[int], vcpus: int) -> None:
        """Make the frames ``tables`` a domain's own: descriptor tables of its vCPUs, with nothing of the guest's yet.

        A selector without a descriptor has to find an empty one: #GP with the selector, not a page fault.
        """

        def show(address: int, mfn: int) -> None:
            table, index = place_of(mode, tables, address)
            mode.write(self._memory, table << PAGE_SHIFT, index, read_only_entry(mode, mfn))

        for base in map(gdt_base, range(vcpus)):
            for address in range(base, base + GDT_LIMIT, PAGE_SIZE):
                show(address, EMPTY_FRAME)
            show(base + FIRST_RESERVED_GDT_PAGE * PAGE_SIZE, self.descriptors(mode))
        show(TSS_BASE, TSS_FRAME)

    def slots(self, mode: PagingMode, own_tables: list[int], vcpus: int) -> dict[int, int]:
        """The hypervisor's entries of a top table, by index."""
        tables = {m2p_slot(mode): self.m2p_table(mode)}
        tables |= zip(descriptor_slots(mode, vcpus), own_tables, strict=True)
        return {slot: mode.entry(mfn, PRESENT | ACCESSED) for slot, mfn in tables.items()}

    def state(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return dict(self._made)

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        self._made = dict(state)
