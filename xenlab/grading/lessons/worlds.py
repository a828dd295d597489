"""Two worlds for the same few instructions: a kernel in ring 0, and one in ring 1 on a hypervisor.

Popek and Goldberg's question, put to the CPU itself (paper 1 and 2.1.2): can a program tell?  Both worlds
have the same memory at the same addresses and the same registers at the start.  They differ
only in what a kernel has done to the machine before, for example loaded a descriptor table:

* native: the kernel executed LGDT, LIDT, LLDT, LTR and set CR0.TS, in ring 0, and the machine
  really is in that state.  Its code segment is `KERNEL_CS`.  ``interrupts_off`` is CLI.
* guest: the hypervisor did all that on virtual registers, the machine itself is as Xen set
  it up, and the code runs in ring 1.  ``interrupts_off`` sets the event mask in the shared page.

The invariant: nothing else differs, so a difference in the result is the instruction's doing.
"""

from __future__ import annotations

from dataclasses import dataclass

from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.machine.assembler import Program, assemble
from xenlab.machine.disassembler import disassemble
from xenlab.machine.machine import Machine
from xenlab.machine.memory import PAGE_SHIFT, PAGE_SIZE
from xenlab.machine.paging import ACCESSED, DIRTY, PRESENT, RW, TWO_LEVEL
from xenlab.machine.segments import Descriptor, flat_code, flat_data
from xenlab.machine.state import IF, CpuState
from xenlab.toolstack import Image, boot
from xenlab.toolstack.image import SOURCE_BASE, SOURCE_CODE, SOURCE_HYPERCALL_PAGE, SOURCE_SHARED_INFO, Section

# What a program may name.  The native kernel's own selectors are empty entries of the guest's table.
KERNEL_CS, KERNEL_DS, _LDT, _TSS = 0xE008, 0xE010, 0xE038, 0xE040
_STUB, BUFFER, _STACK, _TOP = (SOURCE_BASE + offset for offset in (0x5_0000, 0x5_1000, 0x5_7000, 0x5_7F00))
_GDT, _IDT, _PREAMBLE = (SOURCE_BASE + offset for offset in (0x6_0000, 0x7_0000, 0x7_1000))
SYMBOLS = {"interrupts_off": _STUB, "buffer": BUFFER, "kernel_cs": KERNEL_CS, "kernel_ds": KERNEL_DS}
BUDGET = 2_000
_GENERAL = ("eax", "ecx", "edx", "ebx", "ebp", "esi", "edi")
_PAGES, _L1_FRAME, _ROOT_FRAME = 256, 300, 301
_END = "program_end"
_BECOME_A_KERNEL = f"""
    lgdt [gdtr]
    lidt [idtr]
    mov eax, {_LDT}
    lldt ax
    mov eax, {_TSS}
    ltr ax
    mov eax, cr0
    or eax, 8
    mov cr0, eax
done: jmp done
gdtr: .word 0xffff
    .long {_GDT}
idtr: .word 0x7ff
    .long {_IDT}
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a program left behind in one world.

    Attributes:
        registers: general registers and ``eip`` by name.
        eflags: the flags.
        memory: the page of ``buffer`` and the page of the stack.
        trap: what stopped it, empty if it reached its end.
        trap_at: address of the instruction that trapped.
    """

    registers: dict[str, int]
    eflags: int
    memory: bytes
    trap: str = ""
    trap_at: int = 0


def program(source: str) -> Program:
    """Assemble a fragment that runs from its first line to its end.  Raises AssemblyError."""
    return assemble(f"{source}\n{_END}: jmp {_END}\n", SOURCE_CODE, symbols=SYMBOLS)


def without(built: Program, addresses: set[int]) -> Program:
    """The same program with the instructions at ``addresses`` replaced by as many NOPs."""
    code = bytearray(built.code)
    for instruction in disassemble(built.code, built.base):
        if instruction.address in addresses:
            at = instruction.address - built.base
            code[at : at + instruction.size] = b"\x90" * instruction.size
    return Program(bytes(code), built.base, built.symbols, built.lines)


def native(built: Program) -> Outcome:
    """Run a program in ring 0 of a bare machine whose kernel has set it up for itself."""
    machine = Machine(2)
    _fill_native_memory(machine, built)
    cpu = machine.cpu
    state = cpu.new_state(TWO_LEVEL, _ROOT_FRAME << PAGE_SHIFT)
    state.load_segment("ss", KERNEL_DS, flat_data(0))
    state.load_segment("cs", KERNEL_CS, flat_code(0))
    for name in ("ds", "es", "fs", "gs"):
        state.load_segment(name, KERNEL_DS, flat_data(0))
    traps: list[tuple[int, int]] = []

    def on_trap(vector: int, _error: int, _address: int) -> None:
        traps.append((vector, cpu.state.eip))
        cpu.stop()

    cpu.handler = on_trap
    cpu.deadline = 2 * BUDGET
    state.eip = _PREAMBLE
    cpu.load(state)
    cpu.run_until(100)
    _start(state)
    cpu.run_until(cpu.instructions + BUDGET)
    return _outcome(state, _window(machine), traps, built)


def guest(built: Program) -> Outcome:
    """Run a program in ring 1 as a guest's kernel."""
    trace = Trace()
    xen = Hypervisor(Machine(4), trace=trace)
    stub = assemble("mov byte ptr [shared_info + 1], 1\nret", _STUB, symbols={"shared_info": SOURCE_SHARED_INFO})
    pages = _TOP - BUFFER | PAGE_SIZE - 1
    sections = (
        Section(SOURCE_CODE, built.code, len(built.code)),
        Section(_STUB, stub.code, len(stub.code)),
        Section(BUFFER, b"", pages + 1),
    )
    image = Image("program", SOURCE_BASE, SOURCE_CODE, sections, TWO_LEVEL, SOURCE_HYPERCALL_PAGE, SOURCE_SHARED_INFO)
    domain = boot(xen, image)
    vcpu = domain.vcpus[0]
    _start(vcpu.state)
    xen.run(BUDGET)
    traps = [(event.vector, event.eip) for event in trace.events(Kind.TRAP)]
    traps += [(0x82, event.eip) for event in trace.events(Kind.HYPERCALL)]
    memory = xen.guest_memory.read(vcpu, BUFFER, PAGE_SIZE) + xen.guest_memory.read(vcpu, _STACK, PAGE_SIZE)
    return _outcome(vcpu.state, memory, traps, built)


def _start(state: CpuState) -> None:
    for number, name in enumerate(_GENERAL):
        setattr(state, name, BUFFER if name == "ebx" else 0x1111_0000 * (number + 1) | number)
    state.esp, state.eip, state.eflags = _TOP, SOURCE_CODE, IF | 2


def _outcome(state: CpuState, memory: bytes, traps: list[tuple[int, int]], built: Program) -> Outcome:
    registers = {name: getattr(state, name) for name in (*_GENERAL, "esp", "eip")}
    if traps:
        vector, at = traps[0]
        return Outcome(registers, state.eflags, memory, f"exception {vector}", at)
    if state.eip != built.symbols[_END]:
        return Outcome(registers, state.eflags, memory, f"not at its end after {BUDGET} instructions", state.eip)
    return Outcome(registers, state.eflags, memory)


def _fill_native_memory(machine: Machine, built: Program) -> None:
    memory = machine.memory
    for page in range(_PAGES):
        entry = TWO_LEVEL.entry(page, PRESENT | RW | ACCESSED | DIRTY)
        TWO_LEVEL.write(memory, _L1_FRAME << PAGE_SHIFT, page, entry)
    table = TWO_LEVEL.entry(_L1_FRAME, PRESENT | RW | ACCESSED)
    TWO_LEVEL.write(memory, _ROOT_FRAME << PAGE_SHIFT, SOURCE_BASE >> 22, table)
    for address, code in (
        (SOURCE_CODE, built.code),
        (_STUB, assemble("cli\nret", _STUB).code),
        (_PREAMBLE, assemble(_BECOME_A_KERNEL, _PREAMBLE).code),
    ):
        memory.write(address - SOURCE_BASE, code)
    system = {_LDT: Descriptor(BUFFER, 0xFF, 0x82, 0), _TSS: Descriptor(BUFFER, 0x67, 0x89, 0)}
    for selector, descriptor in {KERNEL_CS: flat_code(0), KERNEL_DS: flat_data(0), **system}.items():
        memory.write(_GDT + selector - SOURCE_BASE, descriptor.encode().to_bytes(8, "little"))


def _window(machine: Machine) -> bytes:
    at = [address - SOURCE_BASE for address in (BUFFER, _STACK)]
    return b"".join(machine.memory.read(address, PAGE_SIZE) for address in at)
