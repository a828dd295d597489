"""Exercise 04: the translation tables for a sparse guest.

The answer is the contents of page tables, for four guests: two formats, each once plain and once with a rule of the
seed's about bits that the MMU ignores.  The hypervisor checks the tables, the MMU walks them, and a guest in
machine code says where it came out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from xenlab.grading.decisions import described
from xenlab.grading.guests import Run, Slot
from xenlab.grading.instances import Choices
from xenlab.grading.lessons.base import Finding, Guest, Plan
from xenlab.grading.lessons.sparse_guest import TAG, Region, SparseGuest, sparse_guest, tag
from xenlab.grading.lessons.sparse_probes import KERNEL_WORD, USER_WORD, Access, Probe
from xenlab.grading.lessons.sparse_tables import Built, construct
from xenlab.machine.memory import PAGE_SHIFT
from xenlab.machine.paging import ACCESSED, DIRTY, PAE, PRESENT, RW, TWO_LEVEL, USER, Fault

# Probes by the check that they count for and what they are about; each such group is one finding.
Group = tuple[str, str]
Probes = Callable[[Built], dict[Group, list[Probe]]]
_NOT_BUILT = "it could not be built, see 04.1"
_OFFSETS = {Access.READ: TAG, Access.USER_READ: TAG, Access.WRITE: KERNEL_WORD, Access.USER_WRITE: USER_WORD}


def solve(page_tables: Callable[[dict[str, Any]], Any], guests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What ``page_tables`` makes of each guest, by the guest's name; an exception costs only its own guest."""
    found = {}
    for guest in guests:
        try:
            found[guest["name"]] = page_tables(json.loads(json.dumps(guest)))
        except Exception as problem:
            found[guest["name"]] = {"unusable": f"the function raised {described(problem)}"}
    return found


class TablesForASparseGuest:
    """Page tables for four guests."""

    number = "04"
    title = "The translation tables for a sparse guest"
    slot = Slot("", ("answer",))
    plan = (
        Plan("04.1", 2, "the hypervisor accepts the tables: they name frames of the guest's own, and none is writable"),
        Plan("04.2", 4, "each page is at its address, with the rights it should have", needs="04.1"),
        Plan("04.3", 2, "what should not be allowed raises the page fault that it should", needs="04.2"),
        Plan("04.4", 2, "the guest finds its tables, and in their entries what the task says", needs="04.2"),
    )

    def __init__(self, seed: int) -> None:
        choices = Choices(seed, self.number)
        self.guests_to_build = [
            sparse_guest(choices, mode, marked=marked) for marked in (False, True) for mode in (TWO_LEVEL, PAE)
        ]
        self.parameters: dict[str, Any] = {"guests": [guest.plain() for guest in self.guests_to_build]}
        self.parameters |= self._rules()

    def _rules(self) -> dict[str, Any]:
        marked = self.guests_to_build[-1]
        return {"marker": marked.marker, "marked": marked.marked, "parked_shift": marked.shift}

    def task(self) -> str:
        listed = "\n".join(_described(guest) for guest in self.guests_to_build)
        rules = self._rules()
        kind = {"user": "open to ring 3", "kernel": "not open to ring 3"}.get(rules["marked"], rules["marked"])
        return (
            f"Your four guests, as `exercise.parameters['guests']`:\n\n{listed}\n\n"
            "For the two marked ones there are three more rules:\n\n"
            f"1. Entries that map a page of a region that is **{kind}** carry the number **{rules['marker']}** in bits "
            "9 to 11. All other entries that map a page have 0 there.\n"
            "2. A page that is not present and has a number in `parked` has in its entry that number "
            f"**shifted left by {rules['parked_shift']}**, and nothing else.\n"
            "3. All pages in `tables` are mapped at `tables_at`, in the order of the list, whether you use them or "
            "not, so that the kernel can read them, and ring 3 cannot."
        )

    def guests(self) -> list[Guest]:
        return []

    def judge(self, guest: Guest, run: Run, decisions: Sequence[Any]) -> Finding:
        raise NotImplementedError("exercise 04 has no part to run guests with")

    def examine(self, answer: dict[str, Any]) -> list[Finding]:
        """A few addresses of each guest."""
        return self.findings(answer, self_check_probes)

    def findings(self, answer: dict[str, Any], probes: Probes) -> list[Finding]:
        """Build each guest, let it try the probes, and judge each group of them."""
        given = answer.get("answer")
        made = given if isinstance(given, dict) else {}
        if given is not None and not isinstance(given, dict):
            made = dict.fromkeys((guest.name for guest in self.guests_to_build), given)
        return [
            finding
            for guest in self.guests_to_build
            for finding in _judge(guest, made.get(guest.name, {"unusable": "`answer` has nothing for it"}), probes)
        ]


def _described(guest: SparseGuest) -> str:
    kernel = next(region for region in guest.regions if region.name == "kernel")
    pages = sum(pfn is not None for region in guest.regions for pfn in region.pfns)
    at = f", tables at {guest.tables_at:#x}" if guest.tables_at else ""
    return (
        f"* **{guest.name}**: {pages} pages in {len(guest.regions)} regions, its kernel at {kernel.start:#x}, "
        f"{len(guest.tables)} pages for tables{at}"
    )


def _judge(guest: SparseGuest, answer: Any, probes: Probes) -> Iterable[Finding]:
    built = construct(guest, answer)
    if built.refused:
        yield Finding("04.1", False, f"guest {guest.name!r}: {built.refused}")
        # As many findings as there would have been, whatever the tables were.
        for check, about in group_names(guest):
            yield Finding(check, False, f"guest {guest.name!r}, {about}: {_NOT_BUILT}")
        return
    groups = probes(built)
    problems = iter(built.run([probe for group in groups.values() for probe in group]))
    found = {name: [next(problems) for _ in group] for name, group in groups.items()}
    complaint = built.audit()
    yield Finding("04.1", not complaint, f"guest {guest.name!r}: {complaint}")
    for check, about in group_names(guest):
        wrong = [problem for problem in found.get((check, about), []) if problem]
        yield Finding(check, not wrong, f"guest {guest.name!r}: {wrong[0]}" if wrong else "")


def group_names(guest: SparseGuest) -> list[Group]:
    """What is judged of a guest, by check."""
    names = [("04.2", region.name) for region in guest.regions]
    names += [("04.3", about) for about in ("read-only", "ring 3", "absent")]
    if guest.tables_at is not None:
        names += [("04.4", about) for about in ("marker", "parked", "tables")]
    return names


def allowed(guest: SparseGuest, region: Region, page: int, access: Access) -> Probe:
    """The probe of one access to a page of a region, with what must become of it."""
    address, pfn = region.address(page) + _OFFSETS[access], region.pfns[page]
    error = _error(region, pfn, access)
    if error is not None or pfn is None:
        return Probe(region.name, address, access, error)
    return Probe(region.name, address, access, None, tag(pfn), guest.p2m[pfn])


def _error(region: Region, pfn: int | None, access: Access) -> int | None:
    """The page fault's error code, None where the access is allowed."""
    write, user = bool(access & Access.WRITE), bool(access & Access.USER_READ)
    code = (Fault.WRITE if write else 0) | (Fault.USER if user else 0)
    if pfn is None:
        return int(code)
    denied = (write and not region.writable) or (user and not region.user)
    return int(code | Fault.PROTECTION) if denied else None


def entry_probes(built: Built, region: Region, page: int) -> list[Probe]:
    """What the guest must find as the entry of a page, word by word, when it reads its own tables."""
    guest = built.guest
    at, pfn = built.entry_at(region.address(page)), region.pfns[page]
    entry = _wanted_entry(guest, region, page)
    about = f"the entry of {region.address(page):#010x}, {region.name}"
    if at is None:
        # There is no table for it: a read of the page itself shows that better than words.
        return [Probe(about, region.address(page) + TAG, Access.READ, None, entry & 0xFFFF_FFFF)]
    ignore = 0 if pfn is None else ACCESSED | DIRTY
    words = [Probe(about, at, Access.READ, None, entry & 0xFFFF_FFFF, ignore=ignore)]
    return words + ([Probe(about, at + 4, Access.READ, None, 0)] if guest.mode is PAE else [])


def _wanted_entry(guest: SparseGuest, region: Region, page: int) -> int:
    pfn, parked = region.pfns[page], region.parked[page]
    if pfn is None:
        return (parked or 0) << guest.shift
    rights = PRESENT | (RW if region.writable else 0) | (USER if region.user else 0)
    marker = guest.marker << 9 if guest.is_marked(region) else 0
    return guest.p2m[pfn] << PAGE_SHIFT | marker | rights


def self_check_probes(built: Built) -> dict[Group, list[Probe]]:
    """The first page of each region, one hole, and one entry: enough to see that something is wrong."""
    guest, groups = built.guest, dict[Group, list[Probe]]()
    for region in guest.regions:
        accesses = [Access.READ, *([Access.USER_READ] if region.user else [])]
        groups["04.2", region.name] = [allowed(guest, region, 0, access) for access in accesses]
    program, constants = guest.region("program"), guest.region("constants")
    groups["04.3", "read-only"] = [allowed(guest, program, 0, Access.WRITE)]
    groups["04.3", "ring 3"] = [allowed(guest, constants, 0, Access.USER_READ)]
    groups["04.3", "absent"] = [allowed(guest, constants, constants.pfns.index(None), Access.READ)]
    if guest.tables_at is not None:
        groups["04.4", "marker"] = entry_probes(built, program, 0)
        groups["04.4", "parked"] = entry_probes(built, constants, constants.pfns.index(None))
        groups["04.4", "tables"] = [Probe("the first table", guest.tables_at, Access.READ)]
    return groups


def lesson(seed: int) -> TablesForASparseGuest:
    """The exercise for a seed."""
    return TablesForASparseGuest(seed)
