"""Scenes of lesson 01: instructions in real rings, and a kernel that trap and emulate gets wrong (paper 1, 2.1.2).

The problem: that an instruction is sensitive and does not trap sounds like a detail.  So the
lesson runs one kernel three ways: in ring 0, where it is right; in ring 1 under a hypervisor
that emulates whatever traps, where it goes wrong without a sound; and ported, where it is
right again and never traps.

`observe` runs any few instructions in ring 0, 1 or 3 of the same machine, in the same memory.
Ring 0 is the hypervisor's own: only a lab puts a guest there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from xenlab.abi.structures import VcpuInfo
from xenlab.errors import XenlabError
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.emulate import Emulator, PrivilegedInstructions, Values, decode
from xenlab.hypervisor.trace import Event, Kind, Trace
from xenlab.machine.assembler import assemble
from xenlab.machine.disassembler import Instruction, disassemble
from xenlab.machine.machine import Machine
from xenlab.machine.memory import PAGE_SHIFT
from xenlab.machine.segments import flat_code, flat_data
from xenlab.machine.state import IF
from xenlab.toolstack import boot
from xenlab.toolstack.image import SOURCE_CODE, abi_symbols
from xenlab.views.matrix import InstructionMatrix
from xenlab.views.picture import table
from xenlab.views.story import short_vector

RINGS = (0, 1, 3)
GENERAL = ("eax", "ebx", "ecx", "edx", "esi", "edi", "eflags")
_MACHINE_MIB, _BUDGET, _LONGEST_INSTRUCTION = 8, 200, 15
_CLI, _STI = 0xFA, 0xFB
# Selectors of ring 0 that no descriptor table has; the CPU works with what was loaded.
_RING0_CS, _RING0_DS = 0x08, 0x10
_PROGRAM = """
{enter}
here:
{code}
behind: jmp behind
        .align 16
buffer: .fill 64, 1, 0
        .fill 256, 1, 0
stack:
        .align 4096
"""
_TO_RING_3 = """
        mov eax, FLAT_RING3_DS
        mov ds, eax
        mov es, eax
        push FLAT_RING3_SS
        push offset stack
        push 0x202
        push FLAT_RING3_CS
        push offset inside
        iretd
        .align 4096
user_start:
inside:
"""
_CLEAR = "\n".join(f"        mov {name}, 0" for name in GENERAL[:-1])


@dataclass(frozen=True, slots=True)
class Observation:
    """What a piece of code did in a ring.

    Attributes:
        ring: where it was executed.
        before, after: general registers and EFLAGS, by name; ``after`` is empty if it did not get to its end.
        traps: each trap on the way and what the hypervisor made of it.
        xen: the machine afterwards.
    """

    ring: int
    before: dict[str, int]
    after: dict[str, int]
    traps: tuple[str, ...]
    xen: Hypervisor

    @property
    def changed(self) -> dict[str, int]:
        """The registers that are not what they were, with their new values."""
        return {name: value for name, value in self.after.items() if value != self.before[name]}


def observe(code: str, ring: int, *, emulator: Emulator | None = None) -> Observation:
    """Execute ``code`` in ``ring`` 0, 1 or 3, with all general registers 0 and interrupts on.

    ``buffer`` names 64 bytes that the code may write to.

    Raises:
        XenlabError: another ring.
        AssemblyError: a mistake in ``code``.
    """
    if ring not in RINGS:
        raise XenlabError(f"ring {ring}: expected one of {', '.join(map(str, RINGS))}")
    enter = (_TO_RING_3 if ring == 3 else "        mov esp, offset stack\n") + _CLEAR
    source = _PROGRAM.format(enter=enter, code=code.replace(";", "\n")) + ("user_end:" if ring == 3 else "")
    xen = kernel(source, ring=min(ring, 1), emulator=emulator)
    domain = xen.domains[0]
    _run_to(xen, domain, "here")
    begin, before = xen.now, _registers(domain)
    _run_to(xen, domain, "behind")
    arrived = domain.vcpus[0].state.eip == domain.symbols["behind"]
    return Observation(ring, before, _registers(domain) if arrived else {}, tuple(_traps(xen, begin)), xen)


def kernel(source: str, *, ring: int = 1, emulator: Emulator | None = None) -> Hypervisor:
    """A machine with ``source`` as its only guest, in ``ring`` 1, or 0 as if it had the machine for itself.

    It takes upcalls already, as a kernel does once it has set itself up.
    """
    xen = Hypervisor(Machine(_MACHINE_MIB), trace=Trace(), emulator=emulator)
    domain = boot(xen, source, name=f"kernel in ring {ring}")
    xen.traps.set_event_mask(domain.vcpus[0], 0)
    if ring == 0:
        state = domain.vcpus[0].state
        state.load_segment("ss", _RING0_DS, flat_data(0))
        state.load_segment("cs", _RING0_CS, flat_code(0))
    return xen


def _run_to(xen: Hypervisor, domain: Domain, label: str) -> None:
    for _ in range(_BUDGET):
        if domain.ended or domain.vcpus[0].state.eip == domain.symbols[label]:
            return
        xen.run(1)


def _registers(domain: Domain) -> dict[str, int]:
    state = domain.vcpus[0].state
    return {name: getattr(state, name) for name in GENERAL}


def _traps(xen: Hypervisor, begin: int) -> Iterator[str]:
    """The traps after time ``begin``, each with what became of it."""
    assert xen.trace is not None
    events = [event for event in xen.trace.events() if event.time > begin]
    for place, event in enumerate(events):
        if event.kind is Kind.TRAP:
            yield f"{short_vector(event.vector)}, {_answer(events[place + 1 :])}"
        elif event.kind is Kind.HYPERCALL:
            yield f"hypercall {event.number}"


def _answer(later: Sequence[Event]) -> str:
    kind = next((event.kind for event in later if event.kind in (Kind.EMULATE, Kind.DELIVER, Kind.CRASH)), None)
    answers = {Kind.EMULATE: "emulated", Kind.DELIVER: "handed to the guest", Kind.CRASH: "guest ended"}
    return answers[kind] if kind is not None else "nothing"


def compare(code: str, rings: Iterable[int] = RINGS) -> str:
    """`observe` in several rings, as a table: traps, interrupt flag, and what changed."""
    rows = []
    for found in (observe(code, ring) for ring in rings):
        changed = ", ".join(f"{name} {value:#x}" for name, value in found.changed.items())
        if not found.after:
            changed = "(did not get to its end)"
        rows.append((f"ring {found.ring}", "; ".join(found.traps) or "none", changed or "nothing"))
    return table(("where", "traps", "what changed"), rows)


class TrapAndEmulate(PrivilegedInstructions):
    """Classic trap and emulate: also CLI and STI of an unported kernel act, on a virtual interrupt flag.

    Attributes:
        interrupts: the virtual flag: whether the kernel wants to be interrupted, as far as this one was told.
    """

    def __init__(self) -> None:
        self.interrupts = True

    def emulate(self, code: bytes, registers: Values, system: Values) -> Values | None:
        length, opcode = decode(code)
        if opcode not in (_CLI, _STI) or system["ring"] != 1:
            return super().emulate(code, registers, system)
        self.interrupts = opcode == _STI
        return {"eip": registers["eip"] + length}

    def state(self) -> bool:
        return self.interrupts

    def load(self, state: bool) -> None:
        self.interrupts = state


def follow(xen: Hypervisor, instructions: int) -> str:
    """Run the only guest instruction by instruction, and say after each what the three interrupt flags are.

    They are the CPU's own, the virtual one of `TrapAndEmulate` if it is at work, and, inverted, the mask
    in the shared page, by which a ported kernel tells Xen.
    """
    domain = xen.domains[0]
    rows: list[tuple[str, ...]] = []
    while len(rows) < instructions and not domain.ended:
        rows.append(_one_step(xen, domain))
    heads = ("instruction", "trap", "CPU: IF", "hypervisor: virtual IF", "shared page: events")
    return table(heads, rows)


def _one_step(xen: Hypervisor, domain: Domain) -> tuple[str, ...]:
    state, before = domain.vcpus[0].state, xen.now
    code = xen.guest_memory.read_code(domain.vcpus[0], _LONGEST_INSTRUCTION)
    text = disassemble(code, state.eip, count=1)[0].text
    xen.run(1)
    believed = xen.emulator.interrupts if isinstance(xen.emulator, TrapAndEmulate) else None
    flags = (_on(bool(state.eflags & IF)), _on(believed), _on(not event_mask(xen, domain)))
    return text, "; ".join(_traps(xen, before)), *flags


def _on(flag: bool | None) -> str:
    return "–" if flag is None else "on" if flag else "OFF"


def event_mask(xen: Hypervisor, domain: Domain) -> int:
    """``evtchn_upcall_mask`` of the domain's first vCPU: not zero while it wants no upcalls."""
    return xen.memory.bytes[(domain.shared_info_mfn << PAGE_SHIFT) + VcpuInfo.evtchn_upcall_mask.offset]


def entries(xen: Hypervisor) -> int:
    """How often the hypervisor was entered by traps and hypercalls."""
    assert xen.trace is not None
    return len(xen.trace.events(Kind.TRAP)) + len(xen.trace.events(Kind.HYPERCALL))


def marked(source: str, matrix: InstructionMatrix) -> str:
    """The instructions of the guest ``source`` up to its label ``end``, each with what ``matrix`` found about it.

    This is what a binary translator has to know.  Instructions are compared by their mnemonic, and MOV and
    PUSH by their last operand too.
    """
    silent = {_form(row.instruction) for row in matrix.rows if row.is_hole}
    trapping = {_form(row.instruction) for row in matrix.rows if any(cell.vector for cell in row.cells if cell.ring)}
    rows = []
    for at in _instructions(source):
        form = _form(at.text)
        verdict = "! must be replaced" if form in silent else "traps by itself" if form in trapping else "runs as it is"
        rows.append((f"{at.address:08x}", at.raw.hex(" "), at.text, verdict))
    return table(("address", "bytes", "instruction", "a translator finds"), rows)


def _form(text: str) -> str:
    """MOV and PUSH with their last operand, all else by mnemonic; Capstone says PUSHFD for PUSHF."""
    name, _space, operands = text.partition(" ")
    name = {"pushfd": "pushf", "popfd": "popf"}.get(name, name)
    return f"{name} {operands.split()[-1]}" if name in ("mov", "push") and operands else name


def _instructions(source: str) -> list[Instruction]:
    program = assemble(source, SOURCE_CODE, symbols=abi_symbols())
    if "end" not in program.symbols:
        raise XenlabError("marked: expected the label `end` behind the last instruction, found none")
    return disassemble(program.code[: program.symbols["end"] - program.base], program.base)
