"""Benchmarks of guest code: traps, faults, switches and computing under the hypervisor.

Each builds a hypervisor with guests that loop for ever, and a sample is the CPU time of one
``Hypervisor.run`` over a known number of rounds.  Nothing is subtracted: loop instructions,
the start of the run and preemptions at the end of a time slice are in the figure.
"""

from __future__ import annotations

from xenlab.cli.benchmarks import Sample
from xenlab.cli.benchmarks.floor import CODE, ROUND, ROUND_INSTRUCTIONS, bare_engine, clock_ns
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.trace import DEFAULT_CAPACITY, Trace
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

_BOUNCE = """
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
handler: {handler}
    iret
table: .byte {vector}, {flags}
    .short FLAT_RING1_CS
    .long handler, 0, 0
    .align 4096
user_start:
again: {fault}
    jmp again
    .space 256
user_stack:
    .align 4096
user_end:
"""
# Both faulting instructions are two bytes long.
FAULT = _BOUNCE.format(vector=6, flags=0, fault="ud2", handler="nop\n add dword ptr [esp], 2")
PAGE_FAULT = _BOUNCE.format(vector=14, flags=0, fault="mov eax, [ebx]", handler="add esp, 4\n add dword ptr [esp], 2")
FAULT_ROUND_INSTRUCTIONS = 5
# With 4 in its flags the gate masks events, which the CPU cannot do by itself.
SYSCALL_DIRECT = _BOUNCE.format(vector=0x80, flags=3, fault="int 0x80", handler="")
SYSCALL_BOUNCED = _BOUNCE.format(vector=0x80, flags=3 + 4, fault="int 0x80", handler="")
SYSCALL_ROUND_INSTRUCTIONS = 3

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
    """The same with a trace that records the call and its result.

    The trace is full, as it is after the first tenth of a second: an event takes the place of the oldest.
    """
    xen = hypervisor_with(ROUND, traced=True)
    xen.run(DEFAULT_CAPACITY // 2 * ROUND_INSTRUCTIONS)
    return _per_round(xen, ROUND_INSTRUCTIONS)


def fault_bounce() -> Sample:
    """An invalid opcode of an application in ring 3, bounced to its kernel's handler, and back by ``iret``.

    A round is five instructions: ``ud2``, which faults; in ring 1 ``nop``, ``add dword ptr
    [esp], 2``, which skips the ``ud2``, and ``iret``, which the CPU does alone; and ``jmp`` in
    ring 3.
    """
    return _per_round(hypervisor_with(FAULT), FAULT_ROUND_INSTRUCTIONS)


def page_fault_bounce() -> Sample:
    """The same for a load from an absent page, with its address and an error code to be passed on.

    The emulated CPU's own walk of the page tables, before it raises the fault, is in the figure.
    """
    return _per_round(hypervisor_with(PAGE_FAULT), FAULT_ROUND_INSTRUCTIONS)


def syscall_direct() -> Sample:
    """A system call by ``int 0x80`` through a gate that the CPU takes alone, and back by ``iret``."""
    return _per_round(hypervisor_with(SYSCALL_DIRECT), SYSCALL_ROUND_INSTRUCTIONS)


def syscall_bounced() -> Sample:
    """The same through the hypervisor, which has to mask events on the way."""
    return _per_round(hypervisor_with(SYSCALL_BOUNCED), SYSCALL_ROUND_INSTRUCTIONS)


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
