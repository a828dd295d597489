"""All addresses of a sparse guest, from both rings, and those beside them."""

from __future__ import annotations

from typing import Any

from xenlab.grading.lessons.base import Finding
from xenlab.grading.lessons.lesson_04 import Group, TablesForASparseGuest, allowed, entry_probes
from xenlab.grading.lessons.sparse_guest import TAG, SparseGuest, tag
from xenlab.grading.lessons.sparse_probes import Access, Probe
from xenlab.grading.lessons.sparse_tables import Built
from xenlab.hypervisor.layout import start_of
from xenlab.machine.memory import PAGE_SIZE
from xenlab.machine.paging import ACCESSED, DIRTY, Fault

_ABSENT = {Access.READ: 0, Access.USER_WRITE: int(Fault.WRITE | Fault.USER)}


def findings(lesson: TablesForASparseGuest, answer: dict[str, Any]) -> list[Finding]:
    """Every group of every guest."""
    return lesson.findings(answer, all_probes)


def all_probes(built: Built) -> dict[Group, list[Probe]]:
    """Each page by each access, the pages before and behind each region, each entry, each table."""
    guest, groups = built.guest, dict[Group, list[Probe]]()
    for region in guest.regions:
        for page, pfn in enumerate(region.pfns):
            for access in Access:
                probe = allowed(guest, region, page, access)
                groups.setdefault(_group(region.name, pfn, probe), []).append(probe)
    groups.setdefault(("04.3", "absent"), []).extend(_beside(guest))
    if guest.tables_at is not None:
        for region in guest.regions:
            for page, pfn in enumerate(region.pfns):
                about = "parked" if pfn is None else "marker"
                groups.setdefault(("04.4", about), []).extend(entry_probes(built, region, page))
        groups["04.4", "tables"] = _tables(built, guest.tables_at)
    return groups


def _group(region: str, pfn: int | None, probe: Probe) -> Group:
    if probe.error is None:
        return "04.2", region
    if pfn is None:
        return "04.3", "absent"
    return "04.3", "ring 3" if probe.error & Fault.USER else "read-only"


def _beside(guest: SparseGuest) -> list[Probe]:
    """Where nothing is: the pages before the regions and behind them, and page 0."""
    there = {region.address(page) for region in guest.regions for page in range(len(region.pfns))}
    if guest.tables_at is not None:
        there |= {guest.tables_at + number * PAGE_SIZE for number in range(len(guest.tables))}
    ends = {
        address for region in guest.regions for address in (region.start - PAGE_SIZE, region.address(len(region.pfns)))
    }
    return [
        Probe("nothing is there", address, access, error)
        for address in sorted(ends | {0} - there)
        if address not in there and address < start_of(guest.mode)
        for access, error in _ABSENT.items()
    ]


def _tables(built: Built, at: int) -> list[Probe]:
    """Each table page is the right one, neither ring writes the first, and ring 3 does not read it."""
    probes = [_telling(built, number, pfn, at + number * PAGE_SIZE) for number, pfn in enumerate(built.guest.tables)]
    about, user = "the first page of the tables", int(Fault.PROTECTION | Fault.USER)
    probes.append(Probe(about, at, Access.WRITE, int(Fault.PROTECTION | Fault.WRITE)))
    return [*probes, Probe(about, at, Access.USER_READ, user)]


def _telling(built: Built, number: int, pfn: int, at: int) -> Probe:
    """A read of a table page that tells it from the others: its first entry, or a word left in one that is not used."""
    memory, mfn, about = built.xen.memory, built.guest.p2m[pfn], f"page {number} of the tables"
    first = next((offset for offset in range(0, PAGE_SIZE, 4) if memory.words[(mfn * PAGE_SIZE + offset) >> 2]), None)
    if first is None:
        memory.words[(mfn * PAGE_SIZE + TAG) >> 2] = tag(pfn)
        return Probe(about, at + TAG, Access.READ, None, tag(pfn))
    value = memory.words[(mfn * PAGE_SIZE + first) >> 2]
    return Probe(about, at + first, Access.READ, None, value, ignore=ACCESSED | DIRTY)
