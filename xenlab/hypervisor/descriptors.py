"""Finding the segment behind a selector, as the CPU would (paper 2.1.1).

The invariant: what a selector means is read from the guest's descriptor table at the moment
of use, and a segment that would give ring 0 is never loaded.  What breaks without it: a
guest returns from an exception into ring 0.
"""

from __future__ import annotations

from xenlab.abi.numbers import FIRST_RESERVED_GDT_PAGE, FLAT_RING1_CS
from xenlab.hypervisor.domain import Vcpu
from xenlab.hypervisor.layout import GDT_BASE, GDT_LIMIT
from xenlab.machine.memory import PAGE_SIZE, Memory
from xenlab.machine.paging import READ, Translation, walk
from xenlab.machine.segments import DESCRIPTOR_SIZE, Descriptor
from xenlab.machine.state import Segment

_TABLE_INDICATOR, _KERNEL_RING = 4, 1
FIRST_RESERVED_GDT_ENTRY = FIRST_RESERVED_GDT_PAGE * PAGE_SIZE // DESCRIPTOR_SIZE


def lookup(memory: Memory, vcpu: Vcpu, selector: int) -> Descriptor | None:
    """The descriptor of ``selector``, or None where there is none that a guest may use."""
    if selector < 4 or selector & _TABLE_INDICATOR or (selector | 7) > GDT_LIMIT:
        return None
    found = walk(memory, vcpu.state.mode, vcpu.state.cr3, GDT_BASE + (selector & ~7), READ)
    if not isinstance(found, Translation):
        return None
    descriptor = Descriptor.decode(memory.qwords[found.machine >> 3])
    return descriptor if descriptor.present and descriptor.dpl else None


def checked_selector(selector: int) -> int:
    """A selector as Xen stores it for a guest: one that asks for ring 0 is moved to ring 1."""
    return selector if selector & 3 else selector | _KERNEL_RING


def gate_may_name(selector: int) -> bool:
    """Whether a gate may lead to ``selector``, whose own level a gate ignores: not into the hypervisor's descriptors,
    but for the one of the flat code segment of kernels."""
    return bool(selector & _TABLE_INDICATOR or selector >> 3 < FIRST_RESERVED_GDT_ENTRY or selector == FLAT_RING1_CS)


def code_segment(memory: Memory, vcpu: Vcpu, selector: int) -> Segment | None:
    """The code segment that a transfer to ``selector`` would load, or None if it would fault."""
    found = lookup(memory, vcpu, selector)
    if found is None or not found.is_code:
        return None
    ring = selector & 3
    usable = found.dpl == ring or (found.is_conforming and found.dpl <= ring)
    return Segment.of(selector, found) if usable else None


def stack_segment(memory: Memory, vcpu: Vcpu, selector: int, ring: int) -> Segment | None:
    """The stack segment that entering ``ring`` with ``selector`` would load, or None."""
    found = lookup(memory, vcpu, selector)
    usable = found is not None and found.is_writable_data and found.dpl == ring == selector & 3
    return Segment.of(selector, found) if usable else None


def usable_in(memory: Memory, vcpu: Vcpu, selector: int, ring: int) -> bool:
    """Whether a data segment register may go on holding ``selector`` in ``ring``."""
    if selector in vcpu.flat_data:
        return selector & 3 >= ring
    found = lookup(memory, vcpu, selector)
    return found is not None and (found.dpl >= ring or found.is_conforming)
