"""The hypervisor's part of every address space (paper 2.1.1).

The problem: x86 has no tagged TLB, so a hypervisor in an address space of its own would cost
two TLB flushes for every hypercall.  Xen therefore lives at the top of each guest's address
space, where nothing needs to be switched to reach it.

The invariant: no guest can read, write or execute anything at or above `start_of`, except
the pages that are mapped there for it read-only.  On the paper's machines the limits of the
ring-1 and ring-3 segments see to that.  The emulated CPU does not check segment limits, so
here the range is simply absent from the page tables, and a touch of it at or above `segments_end` is reported
to the guest as the limit violation that it would have been: #GP, not #PF.

What stands there, for guests to read or for the CPU to find::

    start_of                the machine-to-physical list
    GDT_BASE                the descriptor table: 14 pages of the guest's, two of the hypervisor's
    LDT_BASE                the local descriptor table: pages of the guest's, put there when the CPU asks for them
    TSS_BASE                the task state segment: on which stack a call gate leads into ring 1

The vCPUs of a domain may share an address space, but each has descriptor tables of its own.  So each has a *window*:
those of vCPU number n stand n times `WINDOW_BYTES` further on (Xen's GDT_VIRT_START), and its GDTR and LDTR say so.
Nothing has to be exchanged when another vCPU gets the CPU, and the tables of one that does not run can be looked at.
The windows of a domain are mapped by tables of its own, as many as its vCPUs need: the first is enough for eight of
them (PAE), or sixteen.
"""

from __future__ import annotations

from xenlab.abi.numbers import (
    FIRST_RESERVED_GDT_PAGE,
    FLAT_RING1_CS,
    FLAT_RING1_DS,
    FLAT_RING3_CS,
    FLAT_RING3_DS,
    HYPERVISOR_START_PAE,
    HYPERVISOR_START_TWO_LEVEL,
    MACH2PHYS_END_PAE,
    MACH2PHYS_END_TWO_LEVEL,
)
from xenlab.hypervisor.page_entries import Use
from xenlab.machine.memory import PAGE_SIZE
from xenlab.machine.paging import PAE, TWO_LEVEL, PagingMode
from xenlab.machine.segments import Descriptor, flat_code, flat_data
from xenlab.machine.state import Segment

# Linear address of the first vCPU's descriptor table: 16 pages, of which the last two are the hypervisor's.
GDT_BASE = 0xFF00_0000
GDT_PAGES = 16
GDT_LIMIT = GDT_PAGES * PAGE_SIZE - 1
LDT_BASE = GDT_BASE + GDT_LIMIT + 1
LDT_PAGES = 16
TSS_BASE = LDT_BASE + LDT_PAGES * PAGE_SIZE
RESERVED_GDT_BASE = GDT_BASE + FIRST_RESERVED_GDT_PAGE * PAGE_SIZE
# From the tables of one vCPU to those of the next.
WINDOW_BYTES = 0x4_0000


def start_of(mode: PagingMode) -> int:
    """First linear address that belongs to the hypervisor."""
    return HYPERVISOR_START_PAE if mode is PAE else HYPERVISOR_START_TWO_LEVEL


def first_reserved_slot(mode: PagingMode, use: int) -> int | None:
    """The first entry of a table, by its use, that belongs to the hypervisor; None where all are the guest's."""
    return _RESERVED_SLOTS[mode.name] if use == Use.L2_TOP else None


def m2p_slot(mode: PagingMode) -> int:
    """The entry of the top table behind which the machine-to-physical list is mapped."""
    return _slot(mode, start_of(mode))


def gdt_base(vcpu: int) -> int:
    """Linear address of the descriptor table of vCPU number ``vcpu`` of any domain."""
    return GDT_BASE + vcpu * WINDOW_BYTES


def descriptor_slots(mode: PagingMode, vcpus: int) -> range:
    """The entries of the top table behind which the descriptor tables of so many vCPUs are mapped, each a table."""
    return range(_slot(mode, GDT_BASE), _slot(mode, gdt_base(vcpus) - 1) + 1)


def _slot(mode: PagingMode, address: int) -> int:
    return mode.levels[-2].index(address)


def segments_end(mode: PagingMode) -> int:
    """First linear address that no segment of a guest reaches: behind the machine-to-physical list."""
    return MACH2PHYS_END_PAE if mode is PAE else MACH2PHYS_END_TWO_LEVEL


def flat_descriptors(mode: PagingMode) -> dict[int, Descriptor]:
    """The flat segments of every guest, by selector; of the hypervisor's range they reach the first list only."""
    limit = segments_end(mode) - 1
    return {
        FLAT_RING1_CS: flat_code(1, limit),
        FLAT_RING1_DS: flat_data(1, limit),
        FLAT_RING3_CS: flat_code(3, limit),
        FLAT_RING3_DS: flat_data(3, limit),
    }


def flat_segments(mode: PagingMode, *, code: bool) -> dict[int, Segment]:
    """The flat code segments, or the flat data segments, as the CPU holds them once loaded."""
    return {
        selector: Segment.of(selector, descriptor)
        for selector, descriptor in flat_descriptors(mode).items()
        if descriptor.is_code is code
    }


def reserved_gdt_page(mode: PagingMode) -> bytes:
    """The page of descriptors that the hypervisor puts into every guest's table."""
    page = bytearray(PAGE_SIZE)
    for selector, descriptor in flat_descriptors(mode).items():
        offset = (selector & ~7) - FIRST_RESERVED_GDT_PAGE * PAGE_SIZE
        page[offset : offset + 8] = descriptor.encode().to_bytes(8, "little")
    return bytes(page)


_RESERVED_SLOTS = {mode.name: m2p_slot(mode) for mode in (TWO_LEVEL, PAE)}
