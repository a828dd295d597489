"""Scenes of lesson 02: the CPU among its rings, and what each kind of trap costs (paper 2.1.1, 2.1.2).

`attempt` executes one piece of code in a chosen ring, under a kernel that has registered handlers,
and says what became of it.  `round_trip` lets the handler return and follows the CPU through
the rings, instruction by instruction.  Both run real guests; nothing is known beforehand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from xenlab import guests
from xenlab.errors import HypercallError, XenlabError
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.trace import Event, Kind, Trace
from xenlab.hypervisor.traps import SYSTEM_CALL
from xenlab.machine.disassembler import disassemble
from xenlab.machine.machine import Machine
from xenlab.machine.vectors import WITH_ERROR_CODE
from xenlab.timeline import Timeline
from xenlab.toolstack import boot
from xenlab.toolstack.image import SOURCE_SHARED_INFO
from xenlab.views.picture import table
from xenlab.views.story import short_vector, symbol

RETURN = "jmp hypercall_page + 32 * __HYPERVISOR_iret"
HANDLED = (0, 3, 6, 13, 14, SYSTEM_CALL)
KERNEL_STACK = "offset kernel_stack"
_MACHINE_MIB, _ENOUGH = 8, 1_000
_LONGEST_INSTRUCTION = 15
_INT, _CR2_OFFSET = 0xCD, 8
_MASKS_EVENTS = 4

_KERNEL = """
start:  mov ebx, offset trap_table
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
        mov ebx, FLAT_RING1_SS
        mov ecx, {stack}
        mov eax, __HYPERVISOR_stack_switch
        int 0x82
{kernel}
        mov eax, FLAT_RING3_DS               # a data segment that every ring may keep
        mov ds, eax
        mov es, eax
        push FLAT_RING3_SS                   # the frame that IRET takes down
        push offset user_stack
        push 0x202
        push FLAT_RING3_CS
        push offset application
        iretd

handler:
{handler}
finish: mov ebx, SCHEDOP_shutdown
        mov ecx, offset reason
        mov eax, __HYPERVISOR_sched_op
        int 0x82

        .align 8
trap_table:
{rows}
        .long 0, 0
reason: .long SHUTDOWN_poweroff
        .align 16
        .fill 256, 1, 0
kernel_stack:
        .align 4096
user_start:
application:
{application}
        .align 16
        .fill 256, 1, 0
user_stack:
        .align 4096
user_end:
"""


def rings_timeline() -> Timeline:
    """The guest ``rings``, booted and at its first instruction, with a way forward and back."""
    xen = Hypervisor(Machine(_MACHINE_MIB), trace=Trace())
    boot(xen, guests.source("rings"), name="rings")
    return Timeline(xen)


@dataclass(frozen=True, slots=True)
class Footstep:
    """One instruction as it was begun.

    Attributes:
        time: instructions begun, with this one.
        ring: where it was begun.
        after: the ring in which the guest went on.
        trapped: whether the hypervisor was entered.
        address: where it stands.
        text: its disassembly.
    """

    time: int
    ring: int
    after: int
    trapped: bool
    address: int
    text: str


def footsteps(xen: Hypervisor, domain: Domain, most: int = _ENOUGH) -> list[Footstep]:
    """Run a guest that has the machine for itself, one instruction at a time, until it ends."""
    steps: list[Footstep] = []
    while not domain.ended and len(steps) < most:
        steps.append(_one_step(xen, domain))
    return steps


def _one_step(xen: Hypervisor, domain: Domain) -> Footstep:
    assert xen.trace is not None
    vcpu = domain.vcpus[0]
    ring, eip, before = vcpu.state.cpl, vcpu.state.eip, xen.now
    code = disassemble(xen.guest_memory.read_code(vcpu, _LONGEST_INSTRUCTION), eip, count=1)
    xen.run(1)
    trapped = any(raw[0] == xen.now and raw[1] in (Kind.TRAP, Kind.HYPERCALL) for raw in xen.trace.newest(8))
    text = code[0].text if code else "(no code)"
    return Footstep(before + 1, ring, vcpu.state.cpl, trapped, eip, text)


def ring_path(steps: Iterable[Footstep]) -> tuple[int, ...]:
    """The rings that the CPU was in, one after the other, each crossing once."""
    path: list[int] = []
    for step in steps:
        for ring in (step.ring, *((0,) if step.trapped else ()), step.after):
            if not path or path[-1] != ring:
                path.append(ring)
    return tuple(path)


def strip(steps: Sequence[Footstep]) -> str:
    """A line for each ring and a column for each instruction, in the order of time."""
    rows = {ring: "".join(_mark(step, ring) for step in steps) for ring in (3, 1, 0)}
    names = {3: "ring 3 application", 1: "ring 1 kernel     ", 0: "ring 0 hypervisor "}
    return "\n".join(f"{names[ring]} {row}".rstrip() for ring, row in rows.items())


def _mark(step: Footstep, ring: int) -> str:
    if ring == 0:
        return "▲" if step.trapped else " "
    return "■" if step.ring == ring else " "


def gates(domain: Domain) -> str:
    """The trap table that the guest registered, as the hypervisor keeps it."""
    rows = [
        (short_vector(vector), f"{gate.cs:#06x}", f"ring {gate.cs & 3}", symbol(domain, gate.eip), f"ring {gate.dpl}")
        for vector, gate in enumerate(domain.vcpus[0].traps)
        if gate is not None
    ]
    return table(("vector", "selector", "runs in", "handler", "INT allowed up to"), rows)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of some code.

    Attributes:
        code: the instructions.
        ring: where they were executed.
        trap: the exception or software interrupt that the hypervisor saw, "none" without one.
        then: what it did with it.
        frame: the words that it put on the kernel's stack, lowest address first.
        xen: the machine afterwards, with its trace.
    """

    code: str
    ring: int
    trap: str
    then: str
    frame: tuple[int, ...]
    xen: Hypervisor

    @property
    def domain(self) -> Domain:
        """The guest."""
        return self.xen.domains[0]

    @property
    def fault_address(self) -> int:
        """What the hypervisor left in the shared-information page for the page-fault handler."""
        return self.xen.guest_memory.read_word(self.domain.vcpus[0], SOURCE_SHARED_INFO + _CR2_OFFSET)


def attempt(
    code: str,
    *,
    ring: int = 3,
    handlers: Sequence[int] = HANDLED,
    int_ring: int = 3,
    selector: str = "FLAT_RING1_CS",
    stack: str = KERNEL_STACK,
    stop_in_handler: bool = False,
) -> Outcome:
    """Execute ``code`` in ``ring`` 1 or 3 of a small guest, whose handlers only shut it down.

    Args:
        code: assembly; what does not trap goes on to the end of the guest.
        ring: 1 for its kernel, 3 for its application.
        handlers: the vectors for which a handler is registered.
        int_ring: the outermost ring that may use INT with them.
        selector: code segment of the handlers.
        stack: the stack that the kernel names for entries from ring 3, as an operand.
        stop_in_handler: leave the machine at the first instruction of the handler.
    """
    if ring not in (1, 3):
        raise XenlabError(f"ring {ring}: expected 1 for the guest's kernel or 3 for its application")
    xen = Hypervisor(Machine(_MACHINE_MIB), trace=Trace())
    source = _source(
        kernel=_begin(code) + "\n jmp finish" if ring == 1 else "",
        application=(_begin(code) if ring == 3 else "") + "\n int 0x80\nover:",
        rows=_rows(handlers, int_ring, selector),
        stack=stack,
    )
    domain = boot(xen, source, name="attempt")
    if stop_in_handler:
        _run_into_handler(xen, domain)
    else:
        xen.run(_ENOUGH)
    return _outcome(code, ring, xen, domain)


def _run_into_handler(xen: Hypervisor, domain: Domain) -> None:
    assert xen.trace is not None
    while not domain.ended and not xen.trace.events(Kind.DELIVER):
        xen.run(1)


def _source(*, application: str, rows: str, kernel: str = "", handler: str = "", stack: str = KERNEL_STACK) -> str:
    return _KERNEL.format(application=application, rows=rows, kernel=kernel, handler=handler, stack=stack)


def _begin(code: str) -> str:
    return "here:\n" + code.replace(";", "\n") + "\nbehind:"


def _rows(vectors: Sequence[int], int_ring: int, selector: str) -> str:
    # System calls mask events, so that they go through the hypervisor as well (lesson 07 has the short way).
    flags = {vector: int_ring | _MASKS_EVENTS if vector == SYSTEM_CALL else int_ring for vector in vectors}
    return "\n".join(f" .byte {vector}, {flags[vector]}\n .word {selector}\n .long handler" for vector in vectors)


def _outcome(code: str, ring: int, xen: Hypervisor, domain: Domain) -> Outcome:
    assert xen.trace is not None
    traps = [event for event in xen.trace.events(Kind.TRAP) if event.eip != domain.symbols["over"]]
    if not traps:
        return Outcome(code, ring, "none", "the CPU went on by itself", (), xen)
    # Only an emulated trap is followed by another, so the last one is what the code led to.
    last = [event for event in xen.trace.events() if event.time == traps[-1].time]
    end = next((event for event in last if event.kind in (Kind.DELIVER, Kind.CRASH, Kind.EMULATE)), None)
    frame = tuple(end.words) if end is not None and end.kind is Kind.DELIVER else ()
    return Outcome(code, ring, _trap_text(traps[-1], xen, domain), _then(end), frame, xen)


def _trap_text(trap: Event, xen: Hypervisor, domain: Domain) -> str:
    if _is_int(trap, xen, domain):
        return f"int {trap.vector:#x}"
    code = f"({trap.error})" if trap.vector in WITH_ERROR_CODE else ""
    return short_vector(trap.vector) + code + (f" at {trap.address:#x}" if trap.vector == 14 else "")


def _is_int(trap: Event, xen: Hypervisor, domain: Domain) -> bool:
    """Whether the instruction before EIP is INT with this vector: a fault leaves EIP at itself."""
    try:
        before = xen.guest_memory.read(domain.vcpus[0], trap.eip - 2, 2)
    except HypercallError:
        return False
    return before == bytes((_INT, trap.vector))


def _then(end: Event | None) -> str:
    if end is None:
        return "nothing"
    if end.kind is Kind.CRASH:
        return "domain ended"
    if end.kind is Kind.EMULATE:
        changes = ", ".join(f"{name} = {value:#x}" for name, value in end.changes if name != "eip")
        return f"emulated: {changes or 'no effect'}"
    error = f", error code {end.words[0]:#x}" if len(end.words) in (4, 6) else ""
    return f"handler for {short_vector(end.vector)} in ring {end.to_ring}{error}"


def outcomes(pairs: Iterable[tuple[int, str]]) -> str:
    """A table of `attempt`, one row for each ``(ring, code)``."""
    found = [attempt(code, ring=ring) for ring, code in pairs]
    rows = [(str(item.ring), item.code, item.trap, item.then) for item in found]
    return table(("ring", "instruction", "trap", "what the hypervisor did"), rows)


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """From an application's instruction to the one behind it, by way of the kernel's handler.

    Attributes:
        path: the rings passed through.
        instructions: begun in guest code, the trapping one too.
        entries: how often the hypervisor was entered.
    """

    path: tuple[int, ...]
    instructions: int
    entries: int

    @property
    def crossings(self) -> int:
        """How often the ring changed."""
        return len(self.path) - 1

    def __str__(self) -> str:
        rings = " → ".join(map(str, self.path))
        entries = f"hypervisor entered {self.entries} ×"
        return f"{rings}: {self.crossings} crossings, {entries}, {self.instructions} instructions"


def round_trip(instruction: str, vector: int, handler: str) -> RoundTrip:
    """Follow one trap of an application there and back.

    Args:
        instruction: what the application executes.
        vector: the trap that it is expected to raise.
        handler: the kernel's handler; it has to return behind the instruction.

    Raises:
        XenlabError: the guest never came back.
    """
    xen = Hypervisor(Machine(_MACHINE_MIB), trace=Trace())
    # A second vector ends the guest, so that the one under test can return.
    rows = _rows((vector,), 3, "FLAT_RING1_CS") + "\n .byte 0x81, 3\n .word FLAT_RING1_CS\n .long finish"
    source = _source(application=_begin(instruction) + "\n int 0x81", rows=rows, handler=handler.replace(";", "\n"))
    domain = boot(xen, source, name="round trip")
    steps = footsteps(xen, domain)
    places = [step.address if step.ring == 3 else None for step in steps]
    here, behind = domain.symbols["here"], domain.symbols["behind"]
    if behind not in places:
        raise XenlabError(f"the handler of {instruction!r} did not return behind it\n{domain.report}")
    trip = steps[places.index(here) : places.index(behind)]
    return RoundTrip(ring_path(trip), len(trip), sum(step.trapped for step in trip))


def crash_beside_a_neighbour(handlers: Sequence[int] = (), code: str = "ud2") -> Hypervisor:
    """A guest without the handler it needs, and ``counter``, which has nothing to do with it; both have run."""
    xen = Hypervisor(Machine(_MACHINE_MIB), trace=Trace())
    boot(xen, _source(application=code, rows=_rows(handlers, 3, "FLAT_RING1_CS")), name="careless")
    boot(xen, guests.source("counter"), name="counter")
    xen.run(400_000)
    return xen
