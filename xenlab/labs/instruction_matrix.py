"""Executing instructions in rings 0, 1 and 3 of a bare CPU (lesson 01; paper 2.1.1).

The problem: whether an instruction traps, and whether its result gives away that the kernel is
not in ring 0, is a claim about a CPU, and a CPU is there to be asked.

How a cell is found out: a small program in ring 0 loads the system registers and returns into
the ring with IRET; there ``int 0x80`` marks the start, the instruction runs, ``int 0x81`` marks
the end.  What changed between the marks is the effect.  Each cell is executed on two machines
that differ in system state only (descriptor tables, task register, CR0.MP, the interrupt flag),
both times with the same general registers, stack and data.  So:

* a fault between the marks: it traps;
* an effect unlike that of ring 0: it acts differently and nobody is told;
* an effect that the two machines do not share: it shows the machine's state.

What this leaves out: IN, OUT and SYSCALL, which the emulator cannot run natively, and RDTSC,
which would read the host's clock in ring 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xenlab.machine.assembler import assemble
from xenlab.machine.machine import Machine
from xenlab.machine.memory import PAGE_SHIFT
from xenlab.machine.paging import PRESENT, RW, TWO_LEVEL, USER
from xenlab.machine.segments import Descriptor, flat_code, flat_data
from xenlab.views.matrix import Cell, InstructionMatrix, InstructionRow, Outcome

RINGS = (0, 1, 3)
INSTRUCTIONS = (
    "add eax, ecx",
    "cpuid",
    "hlt",
    "cli",
    "sti",
    "mov eax, cr0",
    "mov eax, cr3",
    "mov cr0, edx",
    "lgdt [ebx]",
    "lidt [ebx]",
    "invlpg [ebx]",
    "wbinvd",
    "pushf",
    "popf",
    "sgdt [ebx]",
    "sidt [ebx]",
    "sldt eax",
    "str eax",
    "smsw eax",
    "lar eax, ecx",
    "lsl eax, ecx",
    "verr cx",
    "verw si",
    "mov eax, cs",
    "push cs",
)

_BEGIN, _END = 0x80, 0x81
_DIRECTORY, _TABLE, _CODE, _PROBE, _STACK, _DATA = 0x1000, 0x2000, 0x1_0000, 0x1_8000, 0x2_0000, 0x3_0000
_POINTERS, _TASK = 0x3_1000, 0x3_2000
_KERNEL_CS, _KERNEL_DS, _LDT, _TSS, _OTHER_LDT, _OTHER_TSS = 0x08, 0x10, 0x38, 0x40, 0x48, 0x50
_SELECTORS = {0: (_KERNEL_CS, _KERNEL_DS), 1: (0x19, 0x21), 3: (0x2B, 0x33)}
_ENTER = """
        lgdt [{gdt_pointer}]
        lidt [{idt_pointer}]
        mov eax, {ldt}
        lldt ax
        mov eax, {tss}
        ltr ax
        mov eax, {cr0}
        mov cr0, eax
        mov eax, {data_selector}
        mov ds, eax
        mov es, eax
        {way}
"""
_INSIDE = """
        mov eax, 0
        mov ebx, {data}
        mov ecx, {kernel_cs}
        mov edx, {some_cr0}
        mov esi, {kernel_ds}
        mov edi, {data}
        int {begin}
        {instruction}
        int {end}
"""
_STAY = "push {flags}\n popf\n mov esp, {stack}\n push {inside}\n ret"
_LEAVE = "push {data_selector}\n push {stack}\n push {flags}\n push {code_selector}\n push {inside}\n iret"
_BUDGET, _ROOM = 200, 0x800
_LDT_ACCESS, _TSS_ACCESS, _TABLE_LIMIT, _FLAGS_ON_STACK = 0x82, 0x89, 0xFF, 0x2
_DATA_BYTES = 16


@dataclass(frozen=True, slots=True)
class _System:
    """System state in which the two machines differ."""

    gdt: int
    idt: int
    ldt: int
    tss: int
    cr0: int
    flags: int


# With paging, write protection and protected mode; they differ in CR0.MP.  Flags: interrupts on, off.
_FIRST = _System(0x4_0000, 0x5_0000, _LDT, _TSS, 0x8001_0033, 0x202)
_SECOND = _System(0x4_1000, 0x5_1000, _OTHER_LDT, _OTHER_TSS, 0x8001_0031, 0x002)


@dataclass(frozen=True, slots=True)
class Execution:
    """What one execution did: the vector that it raised, or what it changed, by name."""

    vector: int | None
    effect: tuple[tuple[str, int], ...]


def run_matrix(instructions: Sequence[str] = INSTRUCTIONS, *, rings: Sequence[int] = RINGS) -> InstructionMatrix:
    """Execute each of ``instructions`` in each of ``rings`` (of 0, 1, 3) and compare.

    An instruction finds 0 in EAX, the address of 16 bytes of data in EBX (a descriptor table's
    limit and base), the selectors of the kernel's code and data segments in ECX and ESI, a valid
    value for CR0 in EDX, and on the stack a flags word with interrupts off.

    Raises:
        AssemblyError: an instruction cannot be assembled.
    """
    return InstructionMatrix([_row(instruction, rings) for instruction in instructions])


def _row(instruction: str, rings: Sequence[int]) -> InstructionRow:
    native = execute(instruction, 0, _FIRST)
    return InstructionRow(instruction, tuple(_cell(instruction, ring, native) for ring in rings))


def _cell(instruction: str, ring: int, native: Execution) -> Cell:
    found = execute(instruction, ring, _FIRST) if ring else native
    if found.vector is not None:
        return Cell(ring, Outcome.TRAPS, found.vector)
    effect = ", ".join(f"{name} {value:#x}" for name, value in found.effect) or "no visible effect"
    if ring == 0:
        return Cell(ring, Outcome.EXECUTES, effect=effect)
    if found.effect != native.effect:
        return Cell(ring, Outcome.DIFFERS, effect=effect)
    reveals = execute(instruction, ring, _SECOND) != found
    return Cell(ring, Outcome.REVEALS if reveals else Outcome.EXECUTES, effect=effect)


def execute(instruction: str, ring: int, system: _System = _FIRST) -> Execution:
    """Run one instruction on a bare machine; see `run_matrix` for what it finds there."""
    machine = Machine(memory_mib=1)
    _build(machine, system)
    machine.memory.write(_CODE, assemble(_enter_source(ring, system), _CODE).code)
    machine.memory.write(_PROBE, assemble(_inside_source(instruction), _PROBE).code)
    watch = _Watch(machine)
    state = machine.cpu.new_state(TWO_LEVEL, _DIRECTORY)
    state.load_segment("ss", _KERNEL_DS, flat_data(0))
    state.load_segment("cs", _KERNEL_CS, flat_code(0))
    state.load_segment("ds", _KERNEL_DS, flat_data(0))
    state.esp, state.eip = _STACK + _ROOM, _CODE
    machine.cpu.handler = watch.trap
    machine.cpu.load(state)
    machine.cpu.deadline = _BUDGET
    machine.cpu.run_until(_BUDGET)
    return watch.result()


class _Watch:
    """The trap handler: notes the state at both marks, and stops at anything else."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._before: dict[str, int] | None = None
        self._after: dict[str, int] | None = None
        self._vector: int | None = None

    def trap(self, vector: int, _error: int, _address: int) -> None:
        if vector == _BEGIN and self._before is None:
            self._before = self._observe()
            return
        if vector == _END:
            self._after = self._observe()
        else:
            self._vector = vector
        self._machine.cpu.stop()

    def result(self) -> Execution:
        if self._before is None or (self._after is None and self._vector is None):
            raise AssertionError(f"the program did not reach its marks (vector {self._vector})")
        if self._after is None:
            return Execution(self._vector, ())
        before, after = self._before, self._after
        return Execution(None, tuple((name, value) for name, value in after.items() if value != before[name]))

    def _observe(self) -> dict[str, int]:
        state, memory = self._machine.cpu.state, self._machine.memory
        values = dict(state.architectural())
        seen = {name: values[name] for name in ("eax", "ecx", "edx", "ebx", "esi", "edi", "eflags")}
        seen["pushed"] = memory.words[_STACK - 8 >> 2]
        seen["memory"] = int.from_bytes(memory.read(_DATA, _DATA_BYTES), "little")
        return seen


def _enter_source(ring: int, system: _System) -> str:
    """Code for ring 0 that loads ``system`` and goes to `_PROBE` in ``ring``."""
    code, data = _SELECTORS[ring]
    place = {"stack": _STACK - 4, "flags": system.flags, "inside": _PROBE}
    way = (_LEAVE if ring else _STAY).format(code_selector=code, data_selector=data, **place)
    return _ENTER.format(
        gdt_pointer=_POINTERS,
        idt_pointer=_POINTERS + 8,
        ldt=system.ldt,
        tss=system.tss,
        cr0=system.cr0,
        data_selector=data,
        way=way,
    )


def _inside_source(instruction: str) -> str:
    """The instruction between its marks, with its operands prepared: the same in every ring."""
    return _INSIDE.format(
        data=_DATA,
        kernel_cs=_KERNEL_CS,
        kernel_ds=_KERNEL_DS,
        some_cr0=_FIRST.cr0,
        begin=_BEGIN,
        instruction=instruction,
        end=_END,
    )


def _build(machine: Machine, system: _System) -> None:
    """Identity-mapped memory open to all rings, the system's tables, and the data that instructions find."""
    memory = machine.memory
    everyone = PRESENT | RW | USER
    memory.words[_DIRECTORY >> 2] = _TABLE | everyone
    for frame in range(memory.frames):
        memory.words[(_TABLE >> 2) + frame] = frame << PAGE_SHIFT | everyone
    for selector, descriptor in _descriptors().items():
        memory.write(system.gdt + selector, descriptor.encode().to_bytes(8, "little"))
    memory.write(_POINTERS, _pointer(system.gdt))
    memory.write(_POINTERS + 8, _pointer(system.idt))
    memory.write(_DATA, _pointer(_FIRST.gdt, _TABLE_LIMIT >> 1))
    memory.words[_STACK - 4 >> 2] = _FLAGS_ON_STACK


def _descriptors() -> dict[int, Descriptor]:
    found: dict[int, Descriptor] = {}
    for ring, (code, data) in _SELECTORS.items():
        found |= {code & ~7: flat_code(ring), data & ~7: flat_data(ring)}
    # Task segments stay of type 9: with a busy one in TR, a far call through a gate ends the process.
    system = {_LDT: _LDT_ACCESS, _OTHER_LDT: _LDT_ACCESS, _TSS: _TSS_ACCESS, _OTHER_TSS: _TSS_ACCESS}
    return found | {selector: Descriptor(_TASK, 0xFF, access, 0) for selector, access in system.items()}


def _pointer(base: int, limit: int = _TABLE_LIMIT) -> bytes:
    return limit.to_bytes(2, "little") + base.to_bytes(4, "little")
