"""Benchmarks of guest code: traps, faults, switches and computing under the hypervisor.

Each builds a hypervisor with guests that loop for ever, and a sample is the CPU time of one
``Hypervisor.run`` over a known number of rounds.  Nothing is subtracted: loop instructions,
the start of the run and preemptions at the end of a time slice are in the figure.
"""

from __future__ import annotations

from xenlab.cli.benchmarks import Sample
from xenlab.cli.benchmarks.floor import CODE, ROUND, ROUND_INSTRUCTIONS, bare_engine, clock_ns
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.trace import Trace
from xenlab.machine.machine import Machine
from xenlab.toolstack import boot

ROUNDS = 2000
COMPUTE_INSTRUCTIONS = 2_000_000
WARM_UP = 2000

YIELD = """
again: mov ebx, SCHEDOP_yield
    xor ecx, ecx
    mov eax, __HYPERVISOR_sched_op
    int 0x82
    jmp again
"""
YIELD_INSTRUCTIONS = 5

FAULT = """
start: mov ebx, offset table
    mov eax, __HYPERVISOR_set_trap_table
    int 0x82
    mov ebx, FLAT_RING1_SS
    mov ecx, esp
    mov eax, __HYPERVISOR_stack_switch
    int 0x82
    push FLAT_RING3_SS
    push offset user_stack
    push 0x202
    push FLAT_RING3_CS
    push offset again
    iret
handler: add esp, 4
    add dword ptr [esp], 2
    iret
table: .byte 14, 0
    .short FLAT_RING1_CS
    .long handler, 0, 0
    .align 4096
user_start:
again: mov eax, [ebx]
    jmp again
    .space 256
user_stack:
    .align 4096
user_end:
"""
FAULT_ROUND_INSTRUCTIONS = 5

COMPUTE = """
start: mov edi, offset buffer
again: mov eax, [edi]
    add eax, ecx
    imul edx, eax, 17
    xor edx, ecx
    mov [edi], edx
    inc ecx
    test ecx, 1023
    jnz again
    ror edx, 3
    jmp again
    .align 64
buffer: .long 0
"""


def hypervisor_with(*sources: str, traced: bool = False) -> Hypervisor:
    """A small machine with a guest from each source, run far enough to have translated its loop."""
    xen = Hypervisor(Machine(8), trace=Trace() if traced else None)
    for number, source in enumerate(sources):
        boot(xen, source, name=f"guest{number}")
    xen.run(WARM_UP)
    return xen


def _per_round(xen: Hypervisor, instructions: int) -> Sample:
    def sample() -> float:
        begin = clock_ns()
        xen.run(ROUNDS * instructions)
        return (clock_ns() - begin) / ROUNDS

    return sample


def hypercall() -> Sample:
    """A null hypercall, ``xen_version`` of VERSION, tracing off; the floor's own loop of five instructions."""
    return _per_round(hypervisor_with(ROUND), ROUND_INSTRUCTIONS)


def hypercall_traced() -> Sample:
    """The same with a trace that records the call and its result."""
    return _per_round(hypervisor_with(ROUND, traced=True), ROUND_INSTRUCTIONS)


def fault_bounce() -> Sample:
    """A page fault of an application in ring 3, bounced to its kernel's handler in ring 1, and back by ``iret``.

    A round is five instructions: the load from an absent page, which faults; ``add esp, 4``
    (drop the error code), ``add [esp], 2`` (step over the load), ``iret``; and ``jmp`` back.
    The MMU's walk to the missing page and the ``iret`` across rings, which the CPU does by
    itself, are in the figure.
    """
    return _per_round(hypervisor_with(FAULT), FAULT_ROUND_INSTRUCTIONS)


def domain_switch() -> Sample:
    """From one domain to another: two domains, each of which does nothing but ``sched_op`` yield.

    A round is five instructions and one switch: hypercall, the scheduler's choice, the other
    domain's registers and page tables, and the TLB misses of its first instructions.
    """
    return _per_round(hypervisor_with(YIELD, YIELD), YIELD_INSTRUCTIONS)


def compute() -> Sample:
    """Speed of computing under the hypervisor as a part of bare Unicorn's, both counting instructions.

    The loop loads, adds, multiplies, stores and branches.  Bare runs it with one
    ``uc_emu_start``; the guest with paging, time slices and the hypervisor's run loop.
    """
    xen = hypervisor_with(COMPUTE)
    bare = bare_engine(COMPUTE)
    bare.start(CODE, WARM_UP)

    def sample() -> float:
        begin = clock_ns()
        bare.start(CODE, COMPUTE_INSTRUCTIONS)
        middle = clock_ns()
        xen.run(COMPUTE_INSTRUCTIONS)
        return (middle - begin) / (clock_ns() - middle)

    return sample
