"""A guest that does what you tell it: hypercalls, stores and loads, one at a time (lessons 05 and later).

It is real machine code (`xenlab/guests/obedient.s`) that reads orders from its console.  So what it is told enters
the machine as an input, like any other, and what it does it does in ring 1, through the MMU.

The invariant: nothing here reaches past the hypervisor.  Frame numbers are what the guest could read
itself, in its list from pseudo-physical to machine frames.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from struct import pack

from xenlab import guests
from xenlab.abi.numbers import (
    DOMID_SELF,
    Hypercall,
    MmuextOp,
    UvmFlags,
    VmAssist,
    VmAssistType,
)
from xenlab.errors import XenlabError
from xenlab.hypervisor.core import Hypervisor, Stop
from xenlab.hypervisor.inputs import Typed
from xenlab.hypervisor.page_types import PageTypes
from xenlab.hypervisor.trace import Trace
from xenlab.machine.machine import Machine
from xenlab.machine.memory import PAGE_SHIFT, PAGE_SIZE
from xenlab.machine.paging import ACCESSED, DIRTY, PAE, PRESENT, RW, TWO_LEVEL, USER, PagingMode
from xenlab.toolstack import boot, build, image_from_source
from xenlab.toolstack.image import SOURCE_BASE
from xenlab.views.refusals import Refusal, last_refusal
from xenlab.views.story import answer_text

_MACHINE_MIB, _ENOUGH = 8, 100_000
_CALL, _STORE, _LOAD = 0, 1, 2
_FAULTED = 1 << 31
TABLE = PRESENT | RW | USER | ACCESSED
READ_ONLY = PRESENT | ACCESSED
WRITABLE = PRESENT | RW | ACCESSED | DIRTY


@dataclass(frozen=True, slots=True)
class Page:
    """A page of the guest's: its linear address and its machine frame."""

    address: int
    mfn: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of an order.

    Attributes:
        result: EAX as a signed number; for a load the word.
        fault: error code of the page fault that a store or load got, None without one.
        refusal: what was refused, and why; None if nothing was.
        done: for batches, how many elements were carried out.
    """

    result: int
    fault: int | None = None
    refusal: Refusal | None = None
    done: int | None = None

    def __str__(self) -> str:
        fault = f"page fault, error code {self.fault}"
        text = fault if self.fault is not None else answer_text(self.result)
        return f"{text}: {self.refusal.why}" if self.refusal else text


class Obedient:
    """The guest, booted and waiting.

    Args:
        mode: its page-table format.
        page_types: a validator of your own.
        neighbour: build a second domain, which never runs; `neighbour` is one of its frames.
        machine_mib: memory of the machine.

    Attributes:
        xen, domain: the machine and the guest.
        root: frame of its root table.
        tables: all frames of its page tables when it was built, the root first.
        neighbour: a frame of the second domain's.
    """

    def __init__(
        self,
        *,
        mode: PagingMode = TWO_LEVEL,
        page_types: PageTypes | None = None,
        neighbour: bool = True,
        machine_mib: int = _MACHINE_MIB,
    ) -> None:
        self.xen = Hypervisor(Machine(machine_mib), page_types=page_types, trace=Trace())
        image = image_from_source(guests.source("obedient"), "obedient", mode)
        self.domain = boot(self.xen, image)
        self.mode, self._vcpu = mode, self.domain.vcpus[0]
        self.root = self._vcpu.state.cr3 >> PAGE_SHIFT
        self._first_free = self._vcpu.state.esp - SOURCE_BASE >> PAGE_SHIFT
        pfn = self.domain.frames.index(self.root)
        self.tables = self.domain.frames[pfn : self._first_free - 1]
        self.neighbour = 0
        if neighbour:
            other = build(self.xen, image_from_source("stay: jmp stay", "neighbour", mode), memory_mib=1)
            self.neighbour = other.frames[100]
        self._run()

    # What the guest knows.

    def page(self, number: int) -> Page:
        """Page ``number`` of those that the guest has not used yet, from 0."""
        pfn = self._first_free + number
        return Page(SOURCE_BASE + (pfn << PAGE_SHIFT), self.domain.frames[pfn])

    def address_of(self, mfn: int) -> int:
        """Where the guest sees a frame of its own."""
        return SOURCE_BASE + (self.domain.frames.index(mfn) << PAGE_SHIFT)

    @property
    def leaf(self) -> int:
        """Frame of the l1 table that maps the guest's memory."""
        return self.leaf_of(SOURCE_BASE)[0]

    def leaf_of(self, address: int) -> tuple[int, int]:
        """Frame of the l1 table, and index, of the entry that maps a linear address."""
        return self.xen.mmu.leaf_of(self._vcpu, address)

    def entry_at(self, mfn: int, index: int) -> int:
        """Entry ``index`` of the table in frame ``mfn``, as it is now."""
        return self.mode.read(self.xen.memory, mfn << PAGE_SHIFT, index)

    def pointer(self, mfn: int, index: int) -> int:
        """Machine address of entry ``index`` of the table in frame ``mfn``."""
        return (mfn << PAGE_SHIFT) + index * self.mode.entry_size

    # What it can be told.

    def call(self, number: int, *arguments: int, data: bytes = b"") -> Answer:
        """Make a hypercall; what ``data`` holds stands at `data` then."""
        registers = [*arguments, *[0] * (6 - len(arguments))]
        return self._order(pack("<8I", _CALL, number, *(value & 0xFFFF_FFFF for value in registers)) + data)

    def store(self, address: int, value: int) -> Answer:
        """Store a word at a linear address, by a plain MOV."""
        return self._order(pack("<8I", _STORE, address, value & 0xFFFF_FFFF, 0, 0, 0, 0, 0))

    def load(self, address: int) -> Answer:
        """Load a word."""
        return self._order(pack("<8I", _LOAD, address, 0, 0, 0, 0, 0, 0))

    @property
    def data(self) -> int:
        """Linear address of the data behind an order."""
        return self.domain.symbols["data"]

    def mmu_update(self, *updates: tuple[int, int], tables: int = 0) -> Answer:
        """One call with all these ``(pointer, entry)``; ``tables`` is a domain's id plus 1 for tables of another."""
        packed = b"".join(pack("<QQ", pointer, entry) for pointer, entry in updates)
        done = self.data + len(packed)
        foreign = DOMID_SELF | tables << 16
        answer = self.call(Hypercall.mmu_update, self.data, len(updates), done, foreign, data=packed + bytes(4))
        return Answer(answer.result, None, answer.refusal, self._word(done))

    def update(self, mfn: int, index: int, entry: int) -> Answer:
        """`mmu_update` of one entry."""
        return self.mmu_update((self.pointer(mfn, index), entry))

    def update_va_mapping(self, address: int, entry: int, flags: int = UvmFlags.INVLPG) -> Answer:
        """Change the entry that maps a linear address, and flush what the TLB holds of it unless ``flags`` is 0."""
        return self.call(Hypercall.update_va_mapping, address, entry & 0xFFFF_FFFF, entry >> 32, flags)

    def extended(self, command: MmuextOp, mfn: int = 0, second: int = 0) -> Answer:
        """One command of ``mmuext_op``."""
        return self.call(Hypercall.mmuext_op, self.data, 1, 0, DOMID_SELF, data=pack("<4I", command, mfn, second, 0))

    def writable_tables(self, on: bool = True) -> Answer:
        """Ask for stores to page tables to be carried out (``vm_assist``)."""
        command = VmAssist.ENABLE if on else VmAssist.DISABLE
        return self.call(Hypercall.vm_assist, command, VmAssistType.WRITABLE_PAGETABLES)

    def fill(self, page: Page, entries: Iterable[tuple[int, int]]) -> None:
        """Store entries into a page that is no table yet."""
        for index, entry in entries:
            for half in range(self.mode.entry_size // 4):
                place = page.address + index * self.mode.entry_size + 4 * half
                self.store(place, entry >> 32 * half)

    def make_read_only(self, page: Page) -> Answer:
        """Take the guest's own write permission from a page."""
        return self.update_va_mapping(page.address, self.mode.entry(page.mfn, READ_ONLY))

    def _order(self, order: bytes) -> Answer:
        before = self.xen.now
        self.xen.submit(Typed(self.domain.domid, order))
        self._run()
        found = last_refusal(self.xen, self.domain.domid)
        refusal = found if found is not None and found.time > before else None
        fault = self._word(self.domain.symbols["fault"])
        result = self._word(self.domain.symbols["answer"])
        signed = result - (1 << 32) if result >= 0xFFFF_F000 else result
        return Answer(signed, fault & ~_FAULTED if fault else None, refusal)

    def _word(self, address: int) -> int:
        return self.xen.guest_memory.read_word(self._vcpu, address)

    def _run(self) -> None:
        if self.xen.run(_ENOUGH).stop is not Stop.IDLE or self.domain.ended:
            raise XenlabError(f"the guest did not come back from its order\n{self.domain.report}")


__all__ = ["PAE", "PAGE_SIZE", "READ_ONLY", "TABLE", "TWO_LEVEL", "WRITABLE", "Answer", "Obedient", "Page"]
