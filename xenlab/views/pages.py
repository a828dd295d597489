"""What is mapped where, and what each page is for: reading a domain's page tables for a picture.

The problem: a page table says which frame stands at an address and not what it is good for.  What the builder
put where is written in the guest's own ``start_info``, so the names come from there; whether a frame
is a page table, and whose it is, comes from the frame table.

The invariant: reading changes nothing, neither an accessed bit nor a remembered translation.  What breaks without
it: a run that was looked at differs from one that was not.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from xenlab.abi.structures import START_INFO_MAGIC, StartInfo
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.frames import FREE, NO_PFN, ORPHAN, TABLES, XEN
from xenlab.hypervisor.hypercalls import hypercall_page
from xenlab.hypervisor.layout import GDT_BASE, LDT_BASE, RESERVED_GDT_BASE, TSS_BASE, WINDOW_BYTES, start_of
from xenlab.machine.memory import PAGE_SHIFT, PAGE_SIZE, Memory
from xenlab.machine.paging import ACCESSED, DIRTY, NX, PRESENT, RW, USER, PagingMode, Translation, walk

_FLAGS = ((PRESENT, "P"), (RW, "RW"), (USER, "US"), (ACCESSED, "A"), (DIRTY, "D"), (NX, "NX"))
_ENTIRE = 1 << 32
_IMAGE, _FREE_PAGES, _HYPERCALLS = "image", "free pages", "hypercall page"


@dataclass(frozen=True, slots=True)
class Page:
    """One page that is mapped.

    Attributes:
        address: linear address.
        entry: its l1 entry.
        mfn: the frame there.
        writable, user: whether all levels of the tables allow a write, and ring 3.
    """

    address: int
    entry: int
    mfn: int
    writable: bool
    user: bool


@dataclass(frozen=True, slots=True)
class Area:
    """Pages side by side that are for the same and allow the same; without pages, a gap.

    Attributes:
        start, end: first linear address, and the one behind the last.
        name: what it is for.
        pages: what is mapped.
    """

    start: int
    end: int
    name: str
    pages: tuple[Page, ...] = ()

    @property
    def rights(self) -> str:
        """Who may do what."""
        if not self.pages:
            return ""
        return ("read, write" if self.pages[0].writable else "read") + (", ring 3 too" if self.pages[0].user else "")


@dataclass(frozen=True, slots=True)
class Places:
    """Where the builder put things, as ``start_info`` says.

    Attributes:
        base: linear address of pseudo-physical frame 0.
        list_at: linear address of the physical-to-machine list.
        names: what each pseudo-physical frame is for.
    """

    base: int
    list_at: int
    names: tuple[str, ...]


def pages(xen: Hypervisor, domain: Domain) -> list[Page]:
    """All pages in the address space that a domain's first vCPU is in, by address."""
    if not domain.vcpus:
        return []
    state = domain.vcpus[0].state
    return list(_leaves(xen.memory, state.mode, state.mode.root_address(state.cr3), 0, 0, RW | USER))


def _leaves(memory: Memory, mode: PagingMode, table: int, depth: int, base: int, rights: int) -> Iterator[Page]:
    level = mode.levels[depth]
    array = memory.words if mode.entry_size == 4 else memory.qwords
    first = table // mode.entry_size
    for index, entry in enumerate(array[first : first + level.entries].tolist()):
        if entry & PRESENT:
            address, mfn = base | index << level.shift, mode.frame_of(entry)
            left = rights if level.name == "l3" else rights & entry
            if level.name == "l1":
                yield Page(address, entry, mfn, bool(left & RW), bool(left & USER))
            else:
                yield from _leaves(memory, mode, mfn << PAGE_SHIFT, depth + 1, address, left)


def places(xen: Hypervisor, domain: Domain) -> Places | None:
    """What ``start_info`` says; None where a guest has none, or none that makes sense any more."""
    magic, size = START_INFO_MAGIC, ctypes.sizeof(StartInfo)
    for pfn, mfn in enumerate(domain.frames):
        at = mfn << PAGE_SHIFT
        if xen.memory.bytes[at : at + len(magic)] == magic:
            info = StartInfo.from_buffer_copy(xen.memory.bytes[at : at + size])
            return _places(domain, pfn, info)
    return None


def _places(domain: Domain, info_at: int, info: StartInfo) -> Places | None:
    total = len(domain.frames)
    first = info_at - (total * 4 + PAGE_SIZE - 1 >> PAGE_SHIFT)
    base = info.mfn_list - (first << PAGE_SHIFT)
    if first < 0 or base < 0 or base % PAGE_SIZE or info.nr_pt_frames > total:
        return None
    shared = [] if domain.privileged else ["store", "console"]
    names = [_IMAGE] * first + ["P2M list"] * (info_at - first) + ["start_info", *shared]
    names += ["page tables"] * info.nr_pt_frames + ["stack"]
    names += [_FREE_PAGES] * (total - len(names))
    return Places(base, info.mfn_list, tuple(names[:total]))


def read_p2m(xen: Hypervisor, domain: Domain, found: Places | None) -> list[int]:
    """The guest's own physical-to-machine list, from its memory; as it was built where it cannot be read."""
    count = len(domain.frames)
    data = b"".join(_read(xen, domain, found.list_at, 4 * count)) if found else b""
    return memoryview(data).cast("I").tolist() if len(data) == 4 * count else list(domain.frames)


def _read(xen: Hypervisor, domain: Domain, address: int, length: int) -> Iterator[bytes]:
    """The bytes at a linear address, piece by piece, as far as they are mapped."""
    state = domain.vcpus[0].state
    while length:
        size = min(length, PAGE_SIZE - address % PAGE_SIZE)
        place = walk(xen.memory, state.mode, state.cr3, address & _ENTIRE - 1, update=False)
        if not isinstance(place, Translation) or place.machine + size > xen.memory.size:
            return
        yield bytes(xen.memory.bytes[place.machine : place.machine + size])
        address, length = address + size, length - size


def areas(xen: Hypervisor, domain: Domain) -> list[Area]:
    """The whole address space, from 0 to 4 GiB, gaps included."""
    found: list[Area] = []
    end = 0
    for name, group in _grouped(xen, domain):
        if group[0].address > end:
            found.append(Area(end, group[0].address, ""))
        end = group[-1].address + PAGE_SIZE
        found.append(Area(group[0].address, end, name, tuple(group)))
    return [*found, Area(end, _ENTIRE, "")] if end < _ENTIRE else found


def _grouped(xen: Hypervisor, domain: Domain) -> Iterator[tuple[str, list[Page]]]:
    known, found = names_by_frame(xen, domain), places(xen, domain)
    named = [(name_of(xen, domain, page, known), page) for page in pages(xen, domain)]
    if found:
        named = [(name + _again(xen, domain, page, found), page) for name, page in named]
    # Neighbours have the same difference between their address and their place in the list.
    keyed = [
        ((name, page.writable, page.user, page.address - at * PAGE_SIZE), page) for at, (name, page) in enumerate(named)
    ]
    for key, group in groupby(keyed, key=lambda item: item[0]):
        yield key[0], [page for _key, page in group]


def _again(xen: Hypervisor, domain: Domain, page: Page, found: Places) -> str:
    """Marks a page of the guest's memory that stands somewhere else than where its number puts it."""
    if xen.frames.owner_of(page.mfn) != domain.domid or page.mfn == domain.shared_info_mfn:
        return ""
    pfn = xen.frames.m2p[page.mfn]
    return "" if page.address == found.base + (pfn << PAGE_SHIFT) else f", pfn {pfn_text(pfn)}"


def names_by_frame(xen: Hypervisor, domain: Domain) -> dict[int, str]:
    """What the frames that a domain was built with are for."""
    found = places(xen, domain)
    names = dict(zip(domain.frames, found.names, strict=True)) if found else {}
    for mfn, name in names.items():
        if name == _IMAGE and xen.memory.frame(mfn) == _hypercall_page():
            names[mfn] = _HYPERCALLS
    return names


@lru_cache(maxsize=1)
def _hypercall_page() -> bytes:
    return hypercall_page()


def name_of(xen: Hypervisor, domain: Domain, page: Page, known: dict[int, str]) -> str:
    """What a mapped page is for, in a word or two."""
    frames, mfn = xen.frames, page.mfn
    if page.address >= start_of(domain.mode):
        return _hypervisor_name(xen, page)
    if mfn == domain.shared_info_mfn:
        return "shared info"
    if frames.owner_of(mfn) != domain.domid:
        return f"a page of {owner_name(frames.owner_of(mfn))}"
    if frames.type[mfn] in TABLES:
        return "page tables"
    return known.get(mfn, "page added later")


def _hypervisor_name(xen: Hypervisor, page: Page) -> str:
    if page.mfn in xen.frames.m2p_frames:
        return "M2P list"
    address = GDT_BASE + (page.address - GDT_BASE) % WINDOW_BYTES  # as if it were the first vCPU's
    if address >= TSS_BASE:
        return "task state"
    if address >= LDT_BASE:
        return "local descriptors"
    own = address < RESERVED_GDT_BASE
    return "descriptors, guest's" if own else "descriptors, Xen's"


def owner_name(owner: int) -> str:
    """``domain 3``, or in words where the owner is no domain."""
    return {XEN: "the hypervisor", FREE: "nobody (free)", ORPHAN: "a domain that is gone"}.get(owner, f"domain {owner}")


def flag_text(entry: int) -> str:
    """The flags of an entry by their names in the manuals, and the bits that are left to software."""
    names = [name for bit, name in _FLAGS if entry & bit]
    software = entry >> 9 & 7
    return " ".join([*names, *([f"software {software}"] if software else [])]) or "absent"


def pfn_text(pfn: int) -> str:
    """A pseudo-physical frame number as the machine-to-physical list holds it."""
    return "none" if pfn == NO_PFN else f"{pfn:#05x}"
