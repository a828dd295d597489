"""Page tables as data, and the walk that the MMU does, in Python.

The problem: the hypervisor must know what an address means to a guest before it touches
it, and must decide about entries that the emulated MMU will walk later.  The paper's Xen
knew one format of page table; the Xen that released kernels expect knows PAE too.  Both are
one parameter here, `PagingMode`, so nothing above this file is written twice.

The invariant: `walk` gives the same result, the same page-fault error code and the same
accessed and dirty bits as the emulated CPU (a property test compares them).  What breaks
without it: a hypercall would read memory that the guest itself may not read (paper 2.1.1).

An entry, in both formats (Intel SDM volume 3, 4.3 and 4.4)::

     63  62        52 51                12 11  9 8 7  6 5 4   3   2   1   0
    | NX | reserved  |    frame number    | avl |G|PS|D|A|PCD|PWT|U/S|R/W| P |    8 bytes, PAE
                     31                12 11  9 8 7  6 5 4   3   2   1   0
                     |   frame number    | avl |G|PS|D|A|PCD|PWT|U/S|R/W| P |    4 bytes, two-level
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntFlag

from xenlab.machine.memory import PAGE_SHIFT, PAGE_SIZE, Memory

PRESENT, RW, USER, ACCESSED, DIRTY, PSE, GLOBAL = 0x1, 0x2, 0x4, 0x20, 0x40, 0x80, 0x100
NX = 1 << 63
# The CPU model has 36 physical address bits; bits above them are reserved in PAE entries.
_PAE_RESERVED = 0x7FFF_FFF0_0000_0000
_PDPTE_RESERVED = NX | 0x1E6 | _PAE_RESERVED


class Fault(IntFlag):
    """Bits of the page-fault error code (Intel SDM volume 3, 4.7)."""

    PROTECTION = 1
    WRITE = 2
    USER = 4
    RESERVED = 8
    FETCH = 16


@dataclass(frozen=True, slots=True)
class Level:
    """One level of a page-table tree: how an address selects an entry.

    Attributes:
        name: Xen's name, ``l1`` for the level that maps pages.
        shift: the lowest address bit that indexes this level.
        entries: number of entries in a table of this level.
    """

    name: str
    shift: int
    entries: int

    def index(self, address: int) -> int:
        """Index of the entry that ``address`` selects."""
        return address >> self.shift & (self.entries - 1)


@dataclass(frozen=True, slots=True)
class PagingMode:
    """A format of page tables.

    Attributes:
        name: what it is called in messages.
        entry_size: bytes of an entry, 4 or 8.
        levels: from the root down to ``l1``.
        superpages: whether PS in an ``l2`` entry maps a large page.
        frame_mask: bits of an entry that hold the machine address.
        has_nx: whether entries have a no-execute bit.
    """

    name: str
    entry_size: int
    levels: tuple[Level, ...]
    superpages: bool
    frame_mask: int
    has_nx: bool

    def read(self, memory: Memory, table: int, index: int) -> int:
        """Entry ``index`` of the table at machine address ``table``."""
        if self.entry_size == 4:
            return memory.words[(table >> 2) + index]
        return memory.qwords[(table >> 3) + index]

    def write(self, memory: Memory, table: int, index: int, entry: int) -> None:
        """Store ``entry``.  The TLB still holds the old one until it is flushed."""
        if self.entry_size == 4:
            memory.words[(table >> 2) + index] = entry
        else:
            memory.qwords[(table >> 3) + index] = entry

    def entry(self, mfn: int, flags: int) -> int:
        """An entry that points to machine frame ``mfn``."""
        return mfn << PAGE_SHIFT | flags

    def frame_of(self, entry: int) -> int:
        """Machine frame number that ``entry`` points to."""
        return (entry & self.frame_mask) >> PAGE_SHIFT

    def root_address(self, cr3: int) -> int:
        """Machine address of the root table that ``cr3`` names."""
        return cr3 & ~(0xFFF if self.entry_size == 4 else 0x1F)


TWO_LEVEL = PagingMode("two-level", 4, (Level("l2", 22, 1024), Level("l1", 12, 1024)), False, 0xFFFF_F000, has_nx=False)
PAE = PagingMode(
    "PAE",
    8,
    (Level("l3", 30, 4), Level("l2", 21, 512), Level("l1", 12, 512)),
    True,
    0x000F_FFFF_FFFF_F000,
    has_nx=True,
)


@dataclass(frozen=True, slots=True)
class Translation:
    """Where an address leads: machine address, the frame's entry and the size of its page."""

    machine: int
    entry: int
    page_size: int


@dataclass(frozen=True, slots=True)
class PageFault:
    """Why an address leads nowhere.

    Attributes:
        address: the linear address.
        error: the error code that the CPU would push.
        level: name of the level at which the walk ended.
    """

    address: int
    error: Fault
    level: str


@dataclass(frozen=True, slots=True)
class Access:
    """What is being done to an address: a read unless one of the others is set."""

    write: bool = False
    user: bool = False
    fetch: bool = False


READ, WRITE, USER_READ, USER_WRITE = Access(), Access(write=True), Access(user=True), Access(write=True, user=True)


def walk(
    memory: Memory,
    mode: PagingMode,
    cr3: int,
    address: int,
    access: Access = READ,
    *,
    update: bool = True,
) -> Translation | PageFault:
    """Translate a linear address as the CPU does, with CR0.WP set and, in PAE mode, NX on.

    Args:
        memory: machine memory with the tables in it.
        mode: the tables' format.
        cr3: the root, as the register holds it.
        address: linear address, 0 to 0xFFFFFFFF.
        access: the kind of access.
        update: whether to set accessed and dirty bits, as the CPU would.

    Returns:
        A `Translation`, or the `PageFault` that the CPU would raise.
    """
    table = mode.root_address(cr3)
    rights = RW | USER
    executable = True
    for level in mode.levels:
        index = level.index(address)
        if table + (index + 1) * mode.entry_size > memory.size:
            return _fault(mode, address, access, level, Fault(0))
        entry = mode.read(memory, table, index)
        if not entry & PRESENT:
            return _fault(mode, address, access, level, Fault(0))
        leaf = level.name == "l1" or bool(level.name == "l2" and mode.superpages and entry & PSE)
        if _reserved(mode, level, entry, leaf):
            return _fault(mode, address, access, level, Fault.RESERVED | Fault.PROTECTION)
        if level.name != "l3":
            rights &= entry
            executable = executable and not entry & NX
        if leaf:
            break
        if update and level.name != "l3" and not entry & ACCESSED:
            mode.write(memory, table, index, entry | ACCESSED)
        table = mode.frame_of(entry) << PAGE_SHIFT
    if _denied(access, rights, executable):
        return _fault(mode, address, access, level, Fault.PROTECTION)
    marks = ACCESSED | (DIRTY if access.write else 0)
    if update and entry & marks != marks:
        mode.write(memory, table, index, entry | marks)
    size = 1 << level.shift
    return Translation(entry & mode.frame_mask & ~(size - 1) | address & (size - 1), entry, size)


def _reserved(mode: PagingMode, level: Level, entry: int, leaf: bool) -> bool:
    if mode.entry_size == 4:
        return False
    if level.name == "l3":
        return bool(entry & _PDPTE_RESERVED)
    large = 0x1F_E000 if leaf and level.name == "l2" else 0
    return bool(entry & (_PAE_RESERVED | large))


def _denied(access: Access, rights: int, executable: bool) -> bool:
    if access.user and not rights & USER:
        return True
    if access.write and not rights & RW:
        return True
    return access.fetch and not executable


def _fault(mode: PagingMode, address: int, access: Access, level: Level, error: Fault) -> PageFault:
    if access.write:
        error |= Fault.WRITE
    if access.user:
        error |= Fault.USER
    if access.fetch and mode.has_nx:
        error |= Fault.FETCH
    return PageFault(address, error, level.name)


def mapped_pages(memory: Memory, mode: PagingMode, cr3: int) -> Iterator[tuple[int, int]]:
    """All present leaf entries below ``cr3`` as ``(linear address, entry)``, in address order."""
    yield from _leaves(memory, mode, mode.root_address(cr3), 0, 0)


def _leaves(memory: Memory, mode: PagingMode, table: int, depth: int, base: int) -> Iterator[tuple[int, int]]:
    level = mode.levels[depth]
    if table + level.entries * mode.entry_size > memory.size:
        return
    for index in range(level.entries):
        entry = mode.read(memory, table, index)
        if not entry & PRESENT:
            continue
        address = base | index << level.shift
        if level.name == "l1" or (level.name == "l2" and mode.superpages and entry & PSE):
            yield address, entry
        else:
            yield from _leaves(memory, mode, mode.frame_of(entry) << PAGE_SHIFT, depth + 1, address)


__all__ = [
    "ACCESSED",
    "DIRTY",
    "GLOBAL",
    "NX",
    "PAE",
    "PAGE_SIZE",
    "PRESENT",
    "PSE",
    "READ",
    "RW",
    "TWO_LEVEL",
    "USER",
    "USER_READ",
    "USER_WRITE",
    "WRITE",
    "Access",
    "Fault",
    "Level",
    "PageFault",
    "PagingMode",
    "Translation",
    "mapped_pages",
    "walk",
]
