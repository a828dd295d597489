"""Building a guest with a student's page tables (paper 2.1.1, 3.4).

The judge is the domain builder here, but for one thing: the page tables are those that a student's function made.
The hypervisor checks them as it checks any.

The invariant: what a student handed in can change the contents of this guest's table pages and nothing else, and none
of it is executed.  What breaks without it: the tables are code that writes down the results that are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xenlab.abi.numbers import FLAT_RING1_CS, FLAT_RING1_SS, FLAT_RING3_DS, Errno
from xenlab.errors import ImageError
from xenlab.grading.lessons.sparse_guest import TAG, SparseGuest, empty_domain, tag
from xenlab.grading.lessons.sparse_probes import (
    APPLICATION,
    CODE_PAGE,
    PROBER,
    PROBES_PAGE,
    STACK_PAGE,
    STACK_TOP,
    USER_WORD,
    Probe,
    Prober,
)
from xenlab.hypervisor.auditor import audit, describe_entry
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import Domain, Vcpu
from xenlab.hypervisor.layout import flat_descriptors
from xenlab.hypervisor.lifecycle import add_vcpu
from xenlab.hypervisor.trace import Kind
from xenlab.machine.assembler import assemble
from xenlab.machine.memory import PAGE_SHIFT, PAGE_SIZE
from xenlab.machine.paging import PRESENT, Translation, walk
from xenlab.machine.state import IF
from xenlab.toolstack.image import abi_symbols


@dataclass(slots=True)
class Built:
    """A guest with a student's tables.

    Attributes:
        guest, xen, domain: what was built.
        refused: why it could not be, empty if it could.
    """

    guest: SparseGuest
    xen: Hypervisor
    domain: Domain
    refused: str = ""

    def frame(self, region: str, page: int = 0) -> int:
        """Machine address of a page of a region."""
        pfn = self.guest.region(region).pfns[page]
        assert pfn is not None
        return self.guest.p2m[pfn] << PAGE_SHIFT

    def run(self, probes: list[Probe]) -> list[str]:
        """Let the guest try ``probes``; see `Prober`.  It is not started on tables that lead past its own code."""
        problem = self._misplaced()
        if problem:
            return [f"{problem}, so the guest was not started"] * len(probes)
        return Prober(self.xen, self.domain, self.frame("kernel", PROBES_PAGE)).run(probes)

    def _misplaced(self) -> str:
        """Which page of the code that tries the probes is not where it should be.

        A student's tables hold bytes of the student's choice.  Executed, they could write any result.
        """
        mode, cr3 = self.guest.mode, self.domain.vcpus[0].state.cr3
        for name in ("kernel", "program"):
            region = self.guest.region(name)
            for page in range(len(region.pfns)):
                found = walk(self.xen.memory, mode, cr3, region.address(page), update=False)
                if not isinstance(found, Translation) or found.machine != self.frame(name, page):
                    leads = f"machine address {found.machine:#x}" if isinstance(found, Translation) else "nowhere"
                    place = f"{region.address(page):#010x} ({name})"
                    return f"{place} leads to {leads}, expected {self.frame(name, page):#x}"
        return ""

    def audit(self) -> str:
        """What the auditor complains about, empty if it is content."""
        found = audit(self.xen)
        return str(found[0]) if found else ""

    def entry_at(self, address: int) -> int | None:
        """Where the guest finds the l1 entry for ``address``; None if it has no table for it."""
        mode, table = self.guest.mode, self.domain.vcpus[0].state.cr3 >> PAGE_SHIFT
        for level in mode.levels[:-1]:
            entry = mode.read(self.xen.memory, table << PAGE_SHIFT, level.index(address))
            if not entry & PRESENT:
                return None
            table = mode.frame_of(entry)
        assert self.guest.tables_at is not None
        place = [self.guest.p2m[pfn] for pfn in self.guest.tables].index(table)
        return self.guest.tables_at + place * PAGE_SIZE + mode.levels[-1].index(address) * mode.entry_size


def construct(guest: SparseGuest, answer: Any) -> Built:
    """Build the guest with the tables of an answer; ``refused`` says why that was impossible."""
    xen, domain = empty_domain(guest.name, guest.mode, guest.noise)
    assert tuple(domain.frames) == guest.p2m, "the machine deals out other frames than the task says"
    built = Built(guest, xen, domain)
    _fill_pages(built)
    try:
        root = _write_tables(built, answer)
        add_vcpu(xen, _first_vcpu(built, root))
    except ValueError as problem:
        built.refused = str(problem)
    except ImageError:
        built.refused = _refusal(built, root)
    return built


def _fill_pages(built: Built) -> None:
    """The words to be found, the code of the kernel and that of the application."""
    guest, memory = built.guest, built.xen.memory
    for pfn, mfn in enumerate(guest.p2m):
        if pfn not in guest.tables:
            memory.words[(mfn << PAGE_SHIFT) + TAG >> 2] = tag(pfn)
    kernel, program = guest.region("kernel"), guest.region("program").start
    places = {"PROBES": kernel.address(PROBES_PAGE), "STACK": kernel.address(STACK_PAGE) + STACK_TOP}
    prober = assemble(PROBER, kernel.start, symbols=abi_symbols() | places | {"PROGRAM": program})
    assert len(prober.code) <= USER_WORD
    memory.write(built.frame("kernel", CODE_PAGE), prober.code)
    memory.write(built.frame("program"), assemble(APPLICATION, program).code)


def _first_vcpu(built: Built, root: int) -> Vcpu:
    mode = built.guest.mode
    state, descriptors = built.xen.cpu.new_state(mode, root << PAGE_SHIFT), flat_descriptors(mode)
    state.load_segment("ss", FLAT_RING1_SS, descriptors[FLAT_RING1_SS])
    state.load_segment("cs", FLAT_RING1_CS, descriptors[FLAT_RING1_CS])
    for name in ("ds", "es", "fs", "gs"):
        state.load_segment(name, FLAT_RING3_DS, descriptors[FLAT_RING3_DS])
    state.eip, state.eflags = built.guest.region("kernel").start, IF
    return Vcpu(0, built.domain, state)


def _refusal(built: Built, root: int) -> str:
    assert built.xen.trace is not None
    events = built.xen.trace.events(Kind.REFUSED)
    if not events:
        return f"the hypervisor refused the root table in frame {root:#x}: something it needs there is missing"
    first, frames, mode = events[0], built.xen.frames, built.guest.mode
    mfn = mode.frame_of(first.entry)
    whose = frames.describe(mfn) if mfn < frames.count else f"there is no frame {mfn:#x}"
    return (
        f"the hypervisor refused entry {first.index} of the table in frame {first.table:#x} with "
        f"-{Errno(first.errno).name}: {describe_entry(mode, first.entry)} ({whose})"
    )


def _write_tables(built: Built, answer: Any) -> int:
    """Store the tables of an answer in the guest's table pages; the root's frame.  Raises ValueError: why not."""
    guest = built.guest
    if isinstance(answer, dict) and "unusable" in answer:
        raise ValueError(f"{answer['unusable']!s:.300}")
    if not isinstance(answer, dict) or set(answer) != {"root", "tables"} or not isinstance(answer["tables"], dict):
        raise ValueError(f"expected {{'root': frame, 'tables': {{frame: {{index: entry}}}}}}, found {answer!r:.80}")
    allowed = {guest.p2m[pfn] for pfn in guest.tables}
    for key, table in answer["tables"].items():
        mfn = _number(key, "the frame of a table")
        if mfn not in allowed:
            raise ValueError(f"a table in frame {mfn:#x}: expected frames of the pages in 'tables' only")
        _write_table(built, mfn, table)
    root = _number(answer["root"], "the root's frame")
    if root not in allowed:
        raise ValueError(f"the root in frame {root:#x}: expected the frame of one of the pages in 'tables'")
    return root


def _write_table(built: Built, mfn: int, table: Any) -> None:
    mode = built.guest.mode
    if not isinstance(table, dict):
        raise ValueError(f"table {mfn:#x}: expected a dict of entries by index, found {type(table).__name__}")
    most = PAGE_SIZE // mode.entry_size
    for key, value in table.items():
        index, entry = _number(key, f"an index in table {mfn:#x}"), _number(value, f"an entry of table {mfn:#x}")
        where = f"table {mfn:#x}, entry {index} = {entry:#x}"
        if index >= most:
            raise ValueError(f"{where}: in {mode.name} format expected an index below {most}")
        if entry >> 8 * mode.entry_size:
            raise ValueError(f"{where}: in {mode.name} format expected an entry of {mode.entry_size} bytes")
        mode.write(built.xen.memory, mfn << PAGE_SHIFT, index, entry)


def _number(value: Any, what: str) -> int:
    """A whole number from 0 up; JSON has made strings of those that were keys."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        value = int(value)
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise ValueError(f"{what}: expected a whole number from 0 up, found {value!r:.60}")
    return value


__all__ = ["Built", "construct"]
