"""A guest whose pages lie all over its address space: the plan for it, chosen by a seed (paper 2.1.1, 3.3.4).

The frames are those that a machine really deals out, so a plan and the machine that it is built on agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from xenlab.grading.instances import Choices
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.frames import XEN
from xenlab.hypervisor.layout import start_of
from xenlab.hypervisor.lifecycle import new_domain
from xenlab.hypervisor.trace import Trace
from xenlab.machine.machine import Machine
from xenlab.machine.memory import PAGE_SHIFT, PAGE_SIZE
from xenlab.machine.paging import PagingMode

PAGES = 64
KINDS = ("writable", "read-only", "user", "kernel")
# Where in a page the judge leaves a word to be found.
TAG = 0xFF8
_MACHINE_MIB = 4
_SHIFTS = (1, 4, 9, 12)


@dataclass(frozen=True, slots=True)
class Region:
    """Pages side by side.

    Attributes:
        name, start: for people, and the linear address of the first page.
        pfns: for each page its pseudo-physical frame, None where none is present.
        parked: for each page that is not present the number that its entry has to hold, if it has to.
        writable, user: what may be done there, and by whom.
    """

    name: str
    start: int
    pfns: tuple[int | None, ...]
    parked: tuple[int | None, ...]
    writable: bool
    user: bool

    def address(self, page: int) -> int:
        """Linear address of one of its pages."""
        return self.start + page * PAGE_SIZE

    def plain(self) -> dict[str, Any]:
        """As the student gets it."""
        return {
            "name": self.name,
            "start": self.start,
            "pfns": list(self.pfns),
            "parked": list(self.parked),
            "writable": self.writable,
            "user": self.user,
        }


@dataclass(frozen=True, slots=True)
class SparseGuest:
    """A guest to be built.

    Attributes:
        name, mode: for people, and the format of its page tables.
        noise: how many frames of the machine are taken before its own.
        p2m: its machine frames.
        regions: what is to be mapped; "kernel" and "program" hold the code.
        tables: pseudo-physical frames for page tables.
        tables_at: where these are to be mapped for the kernel, None for nowhere.
        marker, marked: what stands in bits 9 to 11 of the entries of which regions, one of `KINDS`.
        shift: the bit from which on a parked number stands.
    """

    name: str
    mode: PagingMode
    noise: int
    p2m: tuple[int, ...]
    regions: tuple[Region, ...]
    tables: tuple[int, ...]
    tables_at: int | None = None
    marker: int = 0
    marked: str = "none"
    shift: int = 0

    def plain(self) -> dict[str, Any]:
        """As the student's function gets it."""
        return {
            "name": self.name,
            "format": self.mode.name,
            "p2m": list(self.p2m),
            "regions": [region.plain() for region in self.regions],
            "tables": list(self.tables),
            "tables_at": self.tables_at,
        }

    def region(self, name: str) -> Region:
        """A region by its name."""
        return next(region for region in self.regions if region.name == name)

    def is_marked(self, region: Region) -> bool:
        """Whether the entries of a region carry the marker."""
        kinds = {
            "writable": region.writable,
            "read-only": not region.writable,
            "user": region.user,
            "kernel": not region.user,
        }
        return kinds.get(self.marked, False)


def empty_domain(name: str, mode: PagingMode, noise: int) -> tuple[Hypervisor, Domain]:
    """A machine of its own with a domain that has memory and nothing in it."""
    xen = Hypervisor(Machine(_MACHINE_MIB), trace=Trace())
    xen.frames.allocate(noise, XEN)
    return xen, new_domain(xen, name, mode, PAGES)


def tag(pfn: int) -> int:
    """The word that stands at `TAG` in a page."""
    return int.from_bytes(sha256(f"page {pfn}".encode()).digest()[:4], "little")


def sparse_guest(choices: Choices, mode: PagingMode, *, marked: bool) -> SparseGuest:
    """The guest that a seed chooses.

    Args:
        mode: the format of its page tables.
        marked: whether its entries carry the marker, its holes numbers, and its tables are mapped.
    """
    name = f"{'marked' if marked else 'plain'} {mode.name}"
    noise = choices.number(f"{name}.noise", 5, 200)
    p2m = tuple(empty_domain(name, mode, noise)[1].frames)
    pfns = choices.sample(f"{name}.pfns", range(PAGES), PAGES)
    regions = _regions(choices, name, mode, pfns, parked=marked)
    tables_at = _page(choices, f"{name}.tables", 0x8000_0000, 0x8F00_0000) if marked else None
    mapped = [region.address(page) for region in regions for page in range(len(region.pfns))]
    most = [tables_at + number * PAGE_SIZE for number in range(PAGES // 2)] if tables_at else []
    count = _table_count(mode, mapped + most) + choices.number(f"{name}.spare", 0, 2)
    tables = tuple(pfns.pop() for _ in range(count))
    if not marked:
        return SparseGuest(name, mode, noise, p2m, regions, tables)
    marker, kind = choices.number("marker", 1, 7), choices.pick("marked", KINDS)
    return SparseGuest(name, mode, noise, p2m, regions, tables, tables_at, marker, kind, choices.pick("shift", _SHIFTS))


def _page(choices: Choices, name: str, low: int, high: int) -> int:
    return choices.number(name, low >> PAGE_SHIFT, high >> PAGE_SHIFT) << PAGE_SHIFT


def _table_count(mode: PagingMode, addresses: list[int]) -> int:
    """How many tables map these addresses, the root included."""
    return 1 + sum(len({address >> level.shift for address in addresses}) for level in mode.levels[:-1])


def _regions(choices: Choices, name: str, mode: PagingMode, pfns: list[int], *, parked: bool) -> tuple[Region, ...]:
    """The regions, in a seeded order; ``pfns`` loses what they take."""

    def start(region: str, low: int, high: int) -> int:
        return _page(choices, f"{name}.{region}", low, high)

    def region(title: str, at: int, count: int, *, writable: bool, user: bool, hole: bool = False) -> Region:
        missing = choices.number(f"{name}.{title}.hole", 1, count - 2) if hole else -1
        frames = tuple(None if page == missing else pfns.pop() for page in range(count))
        numbers = tuple(
            choices.number(f"{name}.{title}.parked", 1, 0xFFFF) if parked and page == missing else None
            for page in range(count)
        )
        return Region(title, at, frames, numbers, writable, user)

    # Half of it on either side of a border between two l1 tables.
    border = start("data", 0x4040_0000, 0x6000_0000) & -(1 << mode.levels[-2].shift)
    data = region("data", border - 2 * PAGE_SIZE, 4, writable=True, user=True, hole=True)
    made = [
        region("kernel", start("kernel", 0xC000_0000, 0xF000_0000), 3, writable=True, user=False),
        region("program", start("program", 0x0040_0000, 0x3000_0000), 1, writable=False, user=True),
        data,
        region("constants", start("constants", 0x9000_0000, 0xBF00_0000), 4, writable=False, user=False, hole=True),
        region("edge", start_of(mode) - 2 * PAGE_SIZE, 2, writable=True, user=False),
        _window(start("window", 0x6400_0000, 0x7F00_0000), data),
    ]
    return tuple(choices.sample(f"{name}.order", made, len(made)))


def _window(start: int, data: Region) -> Region:
    """The pages of ``data`` once more, in the opposite order, for the kernel to read."""
    frames = tuple(pfn for pfn in reversed(data.pfns) if pfn is not None)
    return Region("window", start, frames, (None,) * len(frames), writable=False, user=False)


__all__ = ["KINDS", "PAGES", "TAG", "Region", "SparseGuest", "empty_domain", "sparse_guest", "tag"]
