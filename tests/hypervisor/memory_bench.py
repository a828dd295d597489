"""A guest that is held still while memory hypercalls are made with its registers."""

from __future__ import annotations

import struct

from xenlab import Hypervisor, Machine, boot
from xenlab.abi.numbers import DOMID_SELF, HYPERCALL_VECTOR, Hypercall, MmuextOp
from xenlab.errors import HypercallError
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.page_types import PageTypes
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.machine.paging import ACCESSED, DIRTY, PRESENT, RW, TWO_LEVEL, USER, PagingMode

BASE = 0xC000_0000
REQUESTS, DONE, LISTS = 0xC000_3000, 0xC000_A000, 0xC000_A100
# The pages from here on hold nothing.
FREE_PFN = 40
LEAF = PRESENT | RW | ACCESSED | DIRTY
READ_ONLY = PRESENT | ACCESSED | DIRTY
TABLE = PRESENT | RW | USER | ACCESSED
IDLE = "start: jmp start\n .align 4096\n .skip 0x8000"
REGISTERS = ("ebx", "ecx", "edx", "esi", "edi", "ebp")


class LostPageError(Exception):
    """The guest has unmapped the page that the bench passes arguments in."""


class Guest:
    """One domain, and the calls that it can make.

    Attributes:
        domain: it.
        continued: how often its last call had to be made again.
    """

    def __init__(
        self, xen: Hypervisor, mode: PagingMode, memory_mib: int, privileged: bool, source: str = IDLE, vcpus: int = 1
    ) -> None:
        self.xen, self.mode = xen, mode
        self.domain: Domain = boot(
            xen, source, mode=mode, memory_mib=memory_mib, privileged=privileged, max_vcpus=vcpus
        )
        self.vcpu = self.domain.vcpus[0]
        self.frames = self.domain.frames
        self.continued = 0

    def call(self, number: int, *arguments: int) -> int:
        """The result of one hypercall, made again as often as Xen asks for that."""
        self.run_me()
        state, xen = self.vcpu.state, self.xen
        for name, value in zip(REGISTERS, arguments, strict=False):
            setattr(state, name, value & 0xFFFF_FFFF)
        self.continued = -1
        before = eip = state.eip
        while eip != before or self.continued < 0:
            self.continued += 1
            state.eax, state.eip = number, before
            xen.trap(HYPERCALL_VECTOR, 0, 0)
            eip = state.eip
            if self.domain.ended:
                break
        state.eip = before
        return state.eax - (state.eax >> 31 << 32)

    def call_once(self, number: int, *arguments: int) -> bool:
        """Make a hypercall as far as it goes in one piece; whether it is done."""
        self.run_me()
        state = self.vcpu.state
        for name, value in zip(REGISTERS, arguments, strict=False):
            setattr(state, name, value & 0xFFFF_FFFF)
        state.eax, before = number, state.eip
        self.xen.trap(HYPERCALL_VECTOR, 0, 0)
        done, state.eip = state.eip == before, before
        return done

    def run_me(self) -> None:
        """Be the domain that is on the CPU."""
        if self.xen.current is not self.vcpu:
            self.xen.current = self.vcpu
            self.xen.cpu.load(self.vcpu.state)

    def write(self, address: int, data: bytes) -> None:
        try:
            self.xen.guest_memory.write(self.vcpu, address, data)
        except HypercallError:
            raise LostPageError from None

    def word(self, address: int) -> int:
        try:
            return self.xen.guest_memory.read_word(self.vcpu, address)
        except HypercallError:
            raise LostPageError from None

    def updates(self, *updates: tuple[int, int], foreign: int = DOMID_SELF) -> tuple[int, int]:
        """`mmu_update` with pairs of pointer and value: the result, and how many were done."""
        self.write(REQUESTS, b"".join(struct.pack("<QQ", *update) for update in updates))
        self.write(DONE, b"\xff" * 4)
        result = self.call(Hypercall.mmu_update, REQUESTS, len(updates), DONE, foreign)
        return result, self.word(DONE)

    def update(self, pointer: int, value: int, foreign: int = DOMID_SELF) -> int:
        """One update; the result."""
        return self.updates((pointer, value), foreign=foreign)[0]

    def extended(self, command: int, first: int = 0, second: int = 0, foreign: int = DOMID_SELF) -> int:
        """One command of `mmuext_op`; the result."""
        self.write(REQUESTS, struct.pack("<III", command, first, second))
        return self.call(Hypercall.mmuext_op, REQUESTS, 1, 0, foreign)

    def map(self, pfn: int, entry: int, flags: int = 0) -> int:
        """`update_va_mapping` of the address at which page ``pfn`` was mapped at first."""
        return self.call(Hypercall.update_va_mapping, self.address(pfn), entry, entry >> 32, flags)

    def address(self, pfn: int) -> int:
        return BASE + (pfn << 12)

    def entry(self, pfn: int, flags: int = LEAF) -> int:
        """An entry that names the frame of page ``pfn``."""
        return self.mode.entry(self.frames[pfn], flags)

    def place(self, pfn: int) -> int:
        """Machine address of the l1 entry at which page ``pfn`` was mapped at first."""
        table, index = self.xen.mmu.leaf_of(self.vcpu, self.address(pfn))
        return (table << 12) + index * self.mode.entry_size

    def now(self, pfn: int) -> int:
        """That entry."""
        at = self.place(pfn)
        return self.mode.read(self.xen.memory, at & ~0xFFF, (at & 0xFFF) // self.mode.entry_size)

    @property
    def root(self) -> int:
        return self.vcpu.state.cr3 >> 12

    @property
    def pin_root(self) -> int:
        return MmuextOp.PIN_L2_TABLE if self.mode is TWO_LEVEL else MmuextOp.PIN_L3_TABLE

    def table(self, pfn: int, entries: dict[int, int]) -> int:
        """Fill page ``pfn`` with entries by index, and unmap it, so that it can become a table; its frame."""
        page = bytearray(4096)
        size = self.mode.entry_size
        for index, entry in entries.items():
            page[index * size : (index + 1) * size] = entry.to_bytes(size, "little")
        self.write(self.address(pfn), bytes(page))
        assert self.map(pfn, 0) == 0
        return self.frames[pfn]

    def refusals(self) -> list[tuple[int, int, int, int]]:
        """Table, index, entry and errno of all entries refused so far."""
        assert self.xen.trace is not None
        return [(e.table, e.index, e.entry, e.errno) for e in self.xen.trace.events(Kind.REFUSED)]


def guests(
    mode: PagingMode = TWO_LEVEL,
    count: int = 1,
    memory_mib: int = 1,
    machine_mib: int = 8,
    page_types: PageTypes | None = None,
    privileged: bool = False,
) -> list[Guest]:
    """So many guests on one machine; the first one may be the control domain."""
    xen = Hypervisor(Machine(machine_mib), trace=Trace(), page_types=page_types)
    return [Guest(xen, mode, memory_mib, privileged and number == 0) for number in range(count)]
