"""Where everything lies in a new domain: the start-of-day layout of xen.h, as numbers (paper 3.4).

The problem: a kernel's first instructions run before it has an allocator, page tables of its own or a console.
Whatever they need must lie where the kernel can find it, mapped, with room to work in behind it.

From the virtual base upwards, packed, each from the start of a page::

    image | list of frames | start_info | store | console | page tables | stack | at least 512 KiB | ...

The region ends at a multiple of 4 MiB, and only it is mapped: the kernel maps the rest of its memory itself.
The initial domain has no store and no console page.  A domain that is smaller than its region, as the small ones
of the lessons are, has simply all its memory mapped.

The page tables are in the region that they map, so there is a circle: more tables make it longer, and a longer
one may take more tables.  `plan` goes round until nothing changes.

The invariant: pseudo-physical frame ``n`` of the region is mapped at base + ``n`` pages.  What breaks without it: the
kernel's own arithmetic between the two, on which all its page-table code rests.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

from xenlab.errors import ImageError
from xenlab.hypervisor.layout import GDT_BASE, start_of
from xenlab.machine.memory import PAGE_SHIFT, PAGE_SIZE
from xenlab.machine.paging import Level, PagingMode
from xenlab.toolstack.image import Image

STACK_PAGES = 1
_PADDING, _REGION = 512 << 10, 4 << 20
_MFN_BYTES = 4


@dataclass(frozen=True, slots=True)
class Table:
    """A page table of the first ones.

    Attributes:
        level: which level it is of.
        number: which of its level, counted from linear address 0; the root is number 0.
    """

    level: Level
    number: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Pseudo-physical frame numbers.

    Attributes:
        base: linear address of frame 0.
        p2m, start_info, tables, stack: where these begin.
        store, console: these pages; None for the initial domain.
        table_list: the page tables in their order, the root first, then level by level.
        mapped: how many frames are mapped, from 0 on.
        total: how many there are.
    """

    base: int
    p2m: int
    start_info: int
    store: int | None
    console: int | None
    tables: int
    stack: int
    table_list: tuple[Table, ...]
    mapped: int
    total: int

    def address(self, pfn: int) -> int:
        """Linear address of a frame of the region."""
        return self.base + (pfn << PAGE_SHIFT)

    @property
    def top_of_stack(self) -> int:
        """What the stack pointer is at the start."""
        return self.address(self.stack + STACK_PAGES)


def plan(image: Image, memory_mib: int, *, privileged: bool = False) -> Plan:
    """Lay out a domain of ``memory_mib`` MiB.

    Raises:
        ImageError: the image does not fit into that memory or below the hypervisor.
    """
    if memory_mib < 1:
        raise ImageError(f"image {image.name!r}: memory of {memory_mib} MiB; at least 1 is needed")
    total, mode = memory_mib << 20 >> PAGE_SHIFT, image.mode
    pages = _pages(image.end - image.base)
    rings = 0 if privileged else 1
    p2m, start_info, store, console, tables = accumulate((pages, _pages(total * _MFN_BYTES), 1, rings, rings))
    table_list, mapped = _tables_and_region(mode, image.base, tables, total)
    stack = tables + len(table_list)
    _check(image, stack + STACK_PAGES, mapped, total)
    return Plan(
        image.base,
        p2m,
        start_info,
        None if privileged else store,
        None if privileged else console,
        tables,
        stack,
        table_list,
        mapped,
        total,
    )


def _tables_and_region(mode: PagingMode, base: int, before: int, total: int) -> tuple[tuple[Table, ...], int]:
    """The tables that map a region with ``before`` pages in front of them, and how many pages it has."""
    mapped = 1
    while True:
        tables = first_tables(mode, base, base + (mapped << PAGE_SHIFT))
        used = base + (before + len(tables) + STACK_PAGES << PAGE_SHIFT)
        end = -(-(used + _PADDING) // _REGION) * _REGION
        wanted = min(end - base >> PAGE_SHIFT, total)
        if wanted <= mapped:
            return tables, mapped
        mapped = wanted


def first_tables(mode: PagingMode, base: int, end: int) -> tuple[Table, ...]:
    """The page tables for linear addresses from ``base`` to ``end``, the root first, then level by level.

    In PAE mode that includes the table in which the hypervisor's range begins, if nothing else is there.
    """
    tables = [Table(mode.levels[0], 0)]
    for above, level in pairwise(mode.levels):
        numbers = set(range(base >> above.shift, (end - 1 >> above.shift) + 1))
        if level is not mode.levels[-1]:
            numbers.add(GDT_BASE >> above.shift)
        tables += [Table(level, number) for number in sorted(numbers)]
    return tuple(tables)


def _pages(size: int) -> int:
    return size + PAGE_SIZE - 1 >> PAGE_SHIFT


def _check(image: Image, used: int, mapped: int, total: int) -> None:
    if used > total:
        raise ImageError(
            f"image {image.name!r}: needs {used * 4} KiB with its page tables, the domain has {total * 4} KiB"
        )
    end = image.base + (mapped << PAGE_SHIFT)
    if end > start_of(image.mode):
        raise ImageError(
            f"image {image.name!r}: what it finds mapped, {image.base:#x} to {end:#x}, reaches into the hypervisor's "
            f"range at {start_of(image.mode):#x}"
        )
