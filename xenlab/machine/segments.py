"""Segment descriptors: the eight bytes that say what a selector may reach, and from which ring.

The problem: on x86 a ring is not a register that can be written; it is the privilege level
of the code segment that runs.  Whoever can put a descriptor of their choice into the
descriptor table chooses the ring.  So the hypervisor must read descriptors exactly as the
CPU does.  Layout of a code or data descriptor (Intel SDM volume 3, 3.4.5)::

     63      56 55  52 51    48 47   40 39            16 15             0
    | base 31:24| flags|lim19:16| access |   base 23:0    |  limit 15:0   |
                 G D L A          P DPL S type
"""

from __future__ import annotations

from dataclasses import dataclass

ACCESSED = 0x1
PRESENT, S_BIT, CODE, CONFORMING, WRITABLE = 0x80, 0x10, 0x08, 0x04, 0x02
LONG, BIG, GRANULAR = 0x2, 0x4, 0x8
DESCRIPTOR_SIZE = 8


@dataclass(frozen=True, slots=True)
class Descriptor:
    """One code or data segment descriptor.

    Attributes:
        base: linear address of the segment's first byte.
        limit: the last valid offset in the segment, in bytes (granularity already applied).
        access: the access byte (present, DPL, S, type).
        flags: the four flag bits (G, D/B, L, AVL).
    """

    base: int
    limit: int
    access: int
    flags: int = BIG | GRANULAR

    @property
    def dpl(self) -> int:
        """Descriptor privilege level, 0 to 3."""
        return self.access >> 5 & 3

    @property
    def present(self) -> bool:
        return bool(self.access & PRESENT)

    @property
    def is_segment(self) -> bool:
        """Whether it describes code or data, not a gate or a table."""
        return bool(self.access & S_BIT)

    @property
    def is_code(self) -> bool:
        return self.access & (S_BIT | CODE) == S_BIT | CODE

    @property
    def is_writable_data(self) -> bool:
        return self.access & (S_BIT | CODE | WRITABLE) == S_BIT | WRITABLE

    @property
    def is_readable(self) -> bool:
        """Whether a data segment register may hold it: data, or code that can be read."""
        return self.is_segment and bool(self.access & CODE == 0 or self.access & WRITABLE)

    @property
    def is_conforming(self) -> bool:
        return self.is_code and bool(self.access & CONFORMING)

    def encode(self) -> int:
        """The descriptor as the 64-bit value that stands in a descriptor table."""
        limit = self.limit >> 12 if self.flags & GRANULAR else self.limit
        return (
            (limit & 0xFFFF)
            | (self.base & 0xFF_FFFF) << 16
            | self.access << 40
            | (limit >> 16 & 0xF) << 48
            | self.flags << 52
            | (self.base >> 24) << 56
        )

    @classmethod
    def decode(cls, value: int) -> Descriptor:
        """Read a descriptor from its 64-bit value."""
        flags = value >> 52 & 0xF
        limit = (value & 0xFFFF) | (value >> 48 & 0xF) << 16
        if flags & GRANULAR:
            limit = limit << 12 | 0xFFF
        base = (value >> 16 & 0xFF_FFFF) | (value >> 56 & 0xFF) << 24
        return cls(base, limit, value >> 40 & 0xFF, flags)


def flat_code(dpl: int, limit: int = 0xFFFF_FFFF) -> Descriptor:
    """A readable 32-bit code segment from 0 to ``limit``, its accessed bit already set."""
    return Descriptor(0, limit, PRESENT | dpl << 5 | S_BIT | CODE | 0x2 | ACCESSED)


def flat_data(dpl: int, limit: int = 0xFFFF_FFFF) -> Descriptor:
    """A writable 32-bit data segment from 0 to ``limit``, its accessed bit already set."""
    return Descriptor(0, limit, PRESENT | dpl << 5 | S_BIT | WRITABLE | ACCESSED)
