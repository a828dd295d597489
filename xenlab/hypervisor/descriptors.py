"""Finding the segment behind a selector, as the CPU would (paper 2.1.1).

The invariant: what a selector means is read from the guest's descriptor table at the moment
of use, and a segment that would give ring 0 is never loaded.  What breaks without it: a
guest returns from an exception into ring 0.
"""

from __future__ import annotations

from collections.abc import Callable

from xenlab.abi.numbers import FIRST_RESERVED_GDT_PAGE, FLAT_RING1_CS
from xenlab.hypervisor.domain import Vcpu
from xenlab.machine.gates import descriptor_of
from xenlab.machine.memory import PAGE_SIZE, Memory
from xenlab.machine.paging import PageFault, walk
from xenlab.machine.segments import DESCRIPTOR_SIZE, Descriptor
from xenlab.machine.state import Segment

_TABLE_INDICATOR, _KERNEL_RING = 4, 1
FIRST_RESERVED_GDT_ENTRY = FIRST_RESERVED_GDT_PAGE * PAGE_SIZE // DESCRIPTOR_SIZE


def checked_selector(selector: int) -> int:
    """A selector as Xen stores it for a guest: one that asks for ring 0 is moved to ring 1."""
    return selector if selector & 3 else selector | _KERNEL_RING


def gate_may_name(selector: int) -> bool:
    """Whether a gate may lead to ``selector``, whose own level a gate ignores: not into the hypervisor's descriptors,
    but for the one of the flat code segment of kernels."""
    return bool(selector & _TABLE_INDICATOR or selector >> 3 < FIRST_RESERVED_GDT_ENTRY or selector == FLAT_RING1_CS)


class SegmentLookup:
    """Loads segments as the CPU would, for the hypervisor.

    Attributes:
        page_in: shows the CPU a page of an LDT, called with a vCPU, 0 and an address; false if it may not be shown.
    """

    page_in: Callable[[Vcpu, int, int], bool]

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def descriptor(self, vcpu: Vcpu, selector: int) -> Descriptor | None:
        """The descriptor of ``selector``, present or not, or None where there is none."""
        if selector & _TABLE_INDICATOR and (selector >> 3) < vcpu.ldt[1]:
            address = vcpu.ldt_base + (selector & ~7)
            if isinstance(walk(self._memory, vcpu.state.mode, vcpu.state.cr3, address, update=False), PageFault):
                self.page_in(vcpu, 0, address)
        return descriptor_of(self._memory, vcpu.state, selector)

    def lookup(self, vcpu: Vcpu, selector: int) -> Descriptor | None:
        """The descriptor of ``selector``, or None where there is none that a guest may use."""
        found = self.descriptor(vcpu, selector)
        return found if found is not None and found.present and found.dpl else None

    def code(self, vcpu: Vcpu, selector: int) -> Segment | None:
        """The code segment that a transfer to ``selector`` would load, or None if it would fault."""
        found = self.lookup(vcpu, selector)
        if found is None or not found.is_code:
            return None
        ring = selector & 3
        usable = found.dpl == ring or (found.is_conforming and found.dpl <= ring)
        return Segment.of(selector, found) if usable else None

    def stack(self, vcpu: Vcpu, selector: int, ring: int) -> Segment | None:
        """The stack segment that entering ``ring`` with ``selector`` would load, or None."""
        found = self.lookup(vcpu, selector)
        usable = found is not None and found.is_writable_data and found.dpl == ring == selector & 3
        return Segment.of(selector, found) if usable else None

    def usable_in(self, vcpu: Vcpu, selector: int, ring: int) -> bool:
        """Whether a data segment register may go on holding ``selector`` in ``ring``."""
        if selector in vcpu.flat_data:
            return selector & 3 >= ring
        found = self.lookup(vcpu, selector)
        return found is not None and (found.dpl >= ring or found.is_conforming)

    def loadable(self, vcpu: Vcpu, selector: int) -> Descriptor | None:
        """The descriptor that ring 0 would load into a data segment register, or None if that would fault."""
        found = self.lookup(vcpu, selector)
        if found is None or not found.is_readable:
            return None
        return found if found.is_conforming or found.dpl >= selector & 3 else None

    def is_absent(self, vcpu: Vcpu, selector: int) -> bool:
        """Whether ``selector`` names a descriptor that only is not present."""
        found = self.descriptor(vcpu, selector)
        return found is not None and not found.present and bool(found.dpl)
