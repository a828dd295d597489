"""The hypervisor's part of every address space (paper 2.1.1).

The problem: x86 has no tagged TLB, so a hypervisor in an address space of its own would cost
two TLB flushes for every hypercall.  Xen therefore lives at the top of each guest's address
space, where nothing needs to be switched to reach it.

The invariant: no guest can read, write or execute anything at or above `start_of`, except
the pages that are mapped there for it read-only.  On the paper's machines the limits of the
ring-1 and ring-3 segments see to that.  The emulated CPU does not check segment limits, so
here the range is simply absent from the page tables, and a touch of it is reported to the
guest as the limit violation that it would have been: #GP, not #PF.
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
)
from xenlab.machine.memory import PAGE_SIZE
from xenlab.machine.paging import PAE, PagingMode
from xenlab.machine.segments import Descriptor, flat_code, flat_data
from xenlab.machine.state import Segment

# Linear address of the descriptor table: 16 pages, of which the last two are the hypervisor's.
GDT_BASE = 0xFF00_0000
GDT_LIMIT = 16 * PAGE_SIZE - 1
RESERVED_GDT_BASE = GDT_BASE + FIRST_RESERVED_GDT_PAGE * PAGE_SIZE


def start_of(mode: PagingMode) -> int:
    """First linear address that belongs to the hypervisor."""
    return HYPERVISOR_START_PAE if mode is PAE else HYPERVISOR_START_TWO_LEVEL


def flat_descriptors(mode: PagingMode) -> dict[int, Descriptor]:
    """The flat segments of every guest, by selector; they end below the hypervisor."""
    limit = start_of(mode) - 1
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
