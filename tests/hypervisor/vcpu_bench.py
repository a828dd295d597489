"""A domain with several vCPUs: the first is held still or spins, and starts the others with contexts from Python."""

from __future__ import annotations

import ctypes
from typing import Any

from memory_bench import BASE, FREE_PFN, REQUESTS, Guest

from xenlab import Hypervisor, Machine
from xenlab.abi.numbers import FLAT_RING1_CS, FLAT_RING1_DS, Hypercall, VcpuOp
from xenlab.abi.structures import VcpuGuestContext
from xenlab.hypervisor.domain import Vcpu
from xenlab.hypervisor.schedulers import RoundRobin
from xenlab.hypervisor.trace import Trace
from xenlab.machine.paging import TWO_LEVEL, PagingMode

# `counts` has a word for each vCPU, which it finds by EDI; exceptions leave their number in `seen`, as the failsafe
# callback and NMIs leave theirs.
SOURCE = """
start:  inc dword ptr [counts]
        jmp start
work:   inc dword ptr [counts + edi * 4]
        jmp work
sleep:  mov ebx, SCHEDOP_block
        mov eax, __HYPERVISOR_sched_op
        int 0x82
        inc dword ptr [counts + edi * 4]
        jmp sleep
leave:  mov ebx, SCHEDOP_shutdown
        mov ecx, offset reason
        mov eax, __HYPERVISOR_sched_op
        int 0x82
break:  ud2
handler: mov eax, ss:[esp]
        mov ss:[seen], eax
        mov dword ptr ss:[seen + 4], 13
stay:   jmp stay
failsafe: mov dword ptr ss:[seen + 4], 99
        jmp stay
nmi:    inc dword ptr [nmis + edi * 4]
        jmp hypercall_page + 32 * __HYPERVISOR_iret
through_fs: mov eax, fs:[0]
        mov [counts + edi * 4], eax
again:  jmp again
load:   mov fs, ecx
        jmp load
look:   mov eax, [ebx]
        mov [counts + edi * 4], eax
        jmp look
swap:   mov [ebx], ecx
        xchg ecx, edx
        jmp swap
system: mov eax, esp
        and eax, -4096
        inc dword ptr [eax]
        jmp hypercall_page + 32 * __HYPERVISOR_iret
        .align 4
reason: .long SHUTDOWN_reboot
seen:   .long 0, 0
nmis:   .skip 128
counts: .skip 128
        .align 4096
        .skip 0x8000
"""
# Short turns, so that short runs have many.
SLICE = 2_000
CONTEXT = BASE + (FREE_PFN + 8 << 12)


class Bench(Guest):
    """The domain."""

    def __init__(
        self, mode: PagingMode = TWO_LEVEL, vcpus: int = 2, *, portable: bool = False, xen: Hypervisor | None = None
    ) -> None:
        xen = xen or Hypervisor(Machine(8, portable=portable), trace=Trace(), scheduler=RoundRobin(SLICE))
        self.free_before = xen.frames.free_frames
        super().__init__(xen, mode, 1, False, SOURCE, vcpus)

    def op(self, command: int, number: int = 1, argument: int = 0) -> int:
        """One command of ``vcpu_op`` by the first vCPU."""
        return self.call(Hypercall.vcpu_op, command, number, argument)

    def context(self, entry: str = "work", number: int = 1, **fields: Any) -> VcpuGuestContext:
        """A context that works: the first one's page tables, flat segments, a stack in a page of its own."""
        made = VcpuGuestContext(flags=4, kernel_ss=FLAT_RING1_DS, event_callback_cs=FLAT_RING1_CS)
        registers = made.user_regs
        registers.eip, registers.edi, registers.eflags = self.domain.symbols[entry], number, 0x202
        registers.cs, registers.ss = FLAT_RING1_CS, FLAT_RING1_DS
        registers.ds = registers.es = FLAT_RING1_DS
        registers.esp = made.kernel_sp = self.address(FREE_PFN + 12 + number)
        made.ctrlreg[3] = self.cr3(self.root)
        for name, value in fields.items():
            setattr(registers if hasattr(registers, name) else made, name, value)
        return made

    def cr3(self, mfn: int) -> int:
        return (mfn << 12 | mfn >> 20) & 0xFFFF_FFFF

    def handlers(self, context: VcpuGuestContext) -> VcpuGuestContext:
        """``context`` with a handler for each exception, and a failsafe callback."""
        for vector in (6, 10, 11, 12, 13, 14):
            context.trap_ctxt[vector].cs, context.trap_ctxt[vector].address = FLAT_RING1_CS, self.label("handler")
        context.trap_ctxt[2].cs, context.trap_ctxt[2].address = FLAT_RING1_CS, self.label("nmi")
        context.failsafe_callback_cs, context.failsafe_callback_eip = FLAT_RING1_CS, self.label("failsafe")
        return context

    def initialise(self, context: VcpuGuestContext, number: int = 1) -> int:
        self.run_me()
        self.write(CONTEXT, bytes(context))
        return self.op(VcpuOp.INITIALISE, number, CONTEXT)

    def start(self, entry: str = "work", number: int = 1, **fields: Any) -> Vcpu:
        """Start a vCPU, with a handler for each exception."""
        assert self.initialise(self.handlers(self.context(entry, number, **fields)), number) == 0
        assert self.op(VcpuOp.UP, number) == 0
        return self.domain.vcpus[number]

    def label(self, name: str) -> int:
        return self.domain.symbols[name]

    def at(self, name: str, number: int = 0) -> int:
        return self.word(self.label(name) + 4 * number)

    def end(self) -> None:
        """Destroy the domain; nothing of it is left."""
        made = 0 if self.xen.shared_pages.are_made(self.mode) is False else 2
        self.xen.destroy(self.domain)
        assert self.xen.frames.free_frames == self.free_before - made


SIZE = ctypes.sizeof(VcpuGuestContext)
assert REQUESTS < CONTEXT

__all__ = ["CONTEXT", "SIZE", "SLICE", "Bench"]
