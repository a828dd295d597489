"""Scenes of lesson 07: the trap table, frames, system calls on both ways, and handlers that fail (paper 2.1.2, 3.1).

`frame_builder` is a guest for each choice, stopped in its handler.  `pager` gives its application memory on demand.
`round_trip`, `entries` and `call_ns` follow system calls with and without the hypervisor.  All are runs of real guests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from time import process_time_ns

from xenlab import guests
from xenlab.errors import XenlabError
from xenlab.hypervisor.bounce import Bounce
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.trace import Event, Kind, Trace
from xenlab.labs.lesson02 import RETURN, RoundTrip, footsteps, ring_path
from xenlab.labs.trap_guests import (
    ANYONE,
    APPLICATION,
    CALL_GATE,
    CALLED,
    CAUSES,
    GUARDED,
    KERNEL,
    MASKS_EVENTS,
    NOWHERE,
    PREPARED,
    SLOW_CALL,
    SYSTEM_CALL,
    Row,
    rows_for,
    skipping,
    trapping,
)
from xenlab.machine.disassembler import disassemble
from xenlab.machine.machine import Machine
from xenlab.machine.vectors import PAGE_FAULT
from xenlab.timeline import Timeline
from xenlab.toolstack import boot
from xenlab.views.frames import Choice, FrameBuilder
from xenlab.views.picture import table
from xenlab.views.story import frame_words, short_vector, symbol

PAGER = guests.source("pager")
_MACHINE_MIB, _ENOUGH = 8, 2_000
_DEBUG, _INVALID, _NO_DEVICE = 1, 6, 7
# No round of `entries` and `call_ns` has as many instructions.
_ROUND_OF_ALL = 12


def frame_builder(
    vector: int = PAGE_FAULT, ring: int = APPLICATION, *, masked: bool = False, gate_masks: bool = False
) -> FrameBuilder:
    """The frame builder, with this exception in this ring to begin with.

    Raises:
        XenlabError: not one of `CAUSES`, or another ring than 1 and 3.
    """
    if vector not in CAUSES or ring not in (KERNEL, APPLICATION):
        known = ", ".join(f"{each:#x}" for each in CAUSES)
        raise XenlabError(f"vector {vector:#x} in ring {ring}: expected one of {known} in ring 1 or 3")
    vectors = [each for each in CAUSES if each != SLOW_CALL]
    return FrameBuilder(_chosen, vectors, Choice(vector, ring, masked, gate_masks))


def _chosen(choice: Choice) -> Timeline:
    table_rows = rows_for((choice.vector,), ANYONE | (MASKS_EVENTS if choice.gate_masks else 0))
    prepare = PREPARED.get(choice.vector, "")
    text = trapping(CAUSES[choice.vector], table_rows, ring=choice.ring, masked=choice.masked, prepare=prepare)
    return Timeline(_booted(text, "frame"))


def _booted(text: str, name: str, bounce: Bounce | None = None) -> Hypervisor:
    xen = Hypervisor(Machine(_MACHINE_MIB), trace=Trace(), bounce=bounce)
    boot(xen, text, name=name)
    return xen


def frames(choices: Sequence[tuple[int, int]]) -> str:
    """A table of frames, one row for each ``(vector, ring)``: the names of the words from the lowest address up."""
    rows = []
    for vector, ring in choices:
        words = frame_builder(vector, ring).frame()[::-1]
        rows.append((short_vector(vector), str(ring), str(len(words)), "  ".join(word.name for word in words)))
    return table(("exception", "ring", "words", "from the lowest address up"), rows)


def pager_timeline(bounce: Bounce | None = None) -> Timeline:
    """The guest ``pager`` at its first instruction, with a way forward and back."""
    return Timeline(_booted(PAGER, "pager", bounce))


def faults(xen: Hypervisor) -> str:
    """The page faults of a run: who touched what, and which hypercall its handler made before it returned."""
    assert xen.trace is not None
    rows, events = [], xen.trace.events()
    for place, event in enumerate(events):
        if event.kind is not Kind.TRAP or event.vector != PAGE_FAULT:
            continue
        calls = [later for later in _until_next_trap(events[place + 1 :]) if later.kind is Kind.HYPERCALL]
        made = f"maps {calls[0].registers[3]:#x}" if calls else "no page put there"
        where = symbol(xen.domains[0], event.eip)
        rows.append((f"{event.time}", f"{event.ring}", where, f"{event.address:#x}", f"{event.error:#x}", made))
    return table(("at", "ring", "instruction", "address", "error", "its handler"), rows)


def _until_next_trap(events: Sequence[Event]) -> Sequence[Event]:
    kinds = (Kind.TRAP, Kind.GATE)
    end = next((place for place, event in enumerate(events) if event.kind in kinds), len(events))
    return events[:end]


def round_trip(instruction: str, rows: Mapping[int, Row], prepare: str = "") -> RoundTrip:
    """Follow one trap of an application through its kernel's handler and back, instruction by instruction.

    Args:
        instruction: what the application executes.
        rows: its kernel's trap table.
        prepare: what the kernel executes before.

    Raises:
        XenlabError: the guest never came back.
    """
    xen = _booted(trapping(instruction, rows, prepare=prepare), "round trip")
    domain = xen.domains[0]
    steps = footsteps(xen, domain)
    places = [step.address if step.ring == APPLICATION else None for step in steps]
    here, behind = domain.symbols["here"], domain.symbols["behind"]
    if behind not in places:
        raise XenlabError(f"the handler of {instruction!r} did not return behind it\n{domain.report}")
    trip = steps[places.index(here) : places.index(behind)]
    return RoundTrip(ring_path(trip), len(trip), sum(step.trapped for step in trip))


def calls(flags: int = ANYONE, vector: int = SYSTEM_CALL, back: str = "iretd") -> dict[int, Row]:
    """A trap table with a system call whose kernel does nothing and returns."""
    return {vector: Row(back, flags)}


def call_gate() -> RoundTrip:
    """Follow a far call through a call gate in the guest's own descriptor table, and back."""
    return round_trip("lcall 0x13, 0x12345678", {CALLED: Row("retf")}, CALL_GATE)


def _repeated() -> dict[str, tuple[str, Mapping[int, Row]]]:
    """The traps that are counted and timed: an application's instruction, and its kernel's trap table."""
    slow = ANYONE | MASKS_EVENTS
    return {
        "system call, direct": ("int 0x80", calls()),
        "system call, bounced": ("int 0x80", calls(slow)),
        "... and back by hypercall": ("int 0x80", calls(slow, back=RETURN)),
        "invalid opcode": ("ud2", {_INVALID: Row(skipping(_INVALID, 2))}),
        "page fault": (f"mov eax, [{NOWHERE:#x}]", {PAGE_FAULT: Row(skipping(PAGE_FAULT, 5))}),
    }


def entries(rounds: int = 100) -> dict[str, float]:
    """How often the hypervisor is entered for each trap and its return, by name."""
    found = {}
    for name, (instruction, rows) in _repeated().items():
        with_it, without = (_entries(_loop(each, rounds), rows, rounds) for each in (instruction, "nop"))
        found[name] = (with_it - without) / rounds
    return found


def _entries(code: str, rows: Mapping[int, Row], rounds: int) -> int:
    xen = _booted(trapping(code, rows), "entries")
    xen.run(_ROUND_OF_ALL * rounds)
    assert xen.trace is not None
    return sum(raw[1] in (Kind.TRAP, Kind.HYPERCALL) for raw in xen.trace.raw())


def _loop(instruction: str, rounds: int) -> str:
    return f"mov esi, {rounds}; again: {instruction}; dec esi; jnz again"


def call_ns(rounds: int = 2_000, tries: int = 3) -> dict[str, float]:
    """CPU time of this computer for each trap and its return, in ns, by name: the best of a few tries."""
    found = {}
    for name, (instruction, rows) in _repeated().items():
        found[name] = min(_time(_loop(instruction, rounds), rows, rounds) for _try in range(tries)) / rounds
    return found


def _time(code: str, rows: Mapping[int, Row], rounds: int) -> int:
    xen = _booted(trapping(code, rows), "time")
    xen.trace = None
    start = process_time_ns()
    xen.run(_ROUND_OF_ALL * rounds)
    return process_time_ns() - start


def gate_of(flags: int = ANYONE, selector: str = "FLAT_RING1_CS") -> str:
    """What becomes of a handler for ``int 0x80`` with these flags and this selector: direct or bounced."""
    rows = {SYSTEM_CALL: Row("iretd", flags, selector)}
    xen = _booted(trapping("nop", rows), "gate")
    xen.run(_ENOUGH)
    return "direct" if xen.domains[0].vcpus[0].state.gate is not None else "bounced"


def lost_address(*, read_first: bool) -> tuple[int, int]:
    """A page-fault handler that faults itself; where the fault was, and which address it found.

    Args:
        read_first: whether it reads the address before it faults.
    """
    read, fault = "mov ebx, [shared_info + 8]", f"mov ecx, [{2 * NOWHERE:#x}]"
    first, second = (read, fault) if read_first else (fault, read)
    inner = "add esp, 4; add dword ptr [esp], 6; iretd"
    outer = f"mov dword ptr [seen + 4], 1; {first}; {second}; mov [seen + 8], ebx; jmp finish"
    handler = f"cmp dword ptr [seen + 4], 1; je inner; {outer}; inner: {inner}"
    text = trapping(f"mov eax, [{NOWHERE:#x}]", {PAGE_FAULT: Row(handler)})
    xen = _booted(text, "lost address")
    xen.run(_ENOUGH)
    assert xen.trace is not None
    domain = xen.domains[0]
    found = xen.guest_memory.read_word(domain.vcpus[0], domain.symbols["seen"] + 8)
    return xen.trace.events(Kind.TRAP)[0].address, found


def with_neighbour(
    code: str, rows: Mapping[int, Row], *, stack: str = "offset kernel_stack", stack_bytes: int = 1024
) -> Hypervisor:
    """A guest that executes ``code`` as its application, and ``counter`` beside it; both have run.

    Args:
        code: instructions.
        rows: its trap table.
        stack: the stack that it names for entries from ring 3.
        stack_bytes: how much room that has; below it there is no page.
    """
    xen = _booted(trapping(code, rows, stack=stack, stack_bytes=stack_bytes, prepare=GUARDED), "careless")
    boot(xen, guests.source("counter"), name="counter")
    xen.run(400_000)
    return xen


def nesting(xen: Hypervisor) -> str:
    """The frames that a guest was given, in order: exception, rings, where it was, where the frame stands."""
    assert xen.trace is not None
    rows = []
    for event in xen.trace.events(Kind.DELIVER):
        words = {word.name: word.meaning for word in frame_words(xen, event)}
        rings = f"{event.from_ring} → {event.to_ring}"
        rows.append((short_vector(event.vector), rings, words["EIP"], f"{event.frame:#x}", str(len(event.words))))
    return table(("exception", "rings", "at", "frame", "words"), rows)


def single_steps(code: str) -> list[str]:
    """Where a kernel finds its application when it steps it through ``code``: each time the next instruction."""
    note = "mov ebx, [seen]; mov eax, [esp + 32]; mov [seen + 4 + 4 * ebx], eax; inc dword ptr [seen]"
    collect = f"pushad; {note}; popad; iretd"
    step = f"pushfd; or dword ptr [esp], 0x100; popfd; {code}"
    xen = _booted(trapping(step, {_DEBUG: Row(collect)}), "steps")
    xen.run(_ENOUGH)
    domain = xen.domains[0]
    seen = domain.symbols["seen"]
    count = xen.guest_memory.read_word(domain.vcpus[0], seen)
    places = [xen.guest_memory.read_word(domain.vcpus[0], seen + 4 + 4 * place) for place in range(count)]
    return [_instruction(xen, domain, place) for place in places]


def fpu_use(slices: Sequence[str]) -> str:
    """An application's kernel switches to it once for each of ``slices``; which of them cost a #NM.

    With each switch the kernel asks for #NM at the next floating-point instruction, instead of loading registers.
    """
    code = "; ".join(f"int {SYSTEM_CALL:#x}; slice{place}: {each}" for place, each in enumerate(slices))
    xen = _booted(trapping(code, calls(back=f"{PREPARED[_NO_DEVICE]}; iretd") | {_NO_DEVICE: Row("iretd")}), "fpu")
    xen.run(_ENOUGH)
    assert xen.trace is not None
    traps = [event.eip for event in xen.trace.events(Kind.TRAP) if event.vector == _NO_DEVICE]
    starts = [xen.domains[0].symbols[f"slice{place}"] for place in range(len(slices))]
    raised = [sum(at <= trap < end for trap in traps) for at, end in pairwise([*starts, starts[-1] + 0x1000])]
    return table(
        ("after a switch, it executes", "#NM"), [(code, str(n)) for code, n in zip(slices, raised, strict=True)]
    )


def _instruction(xen: Hypervisor, domain: Domain, address: int) -> str:
    code = xen.guest_memory.read(domain.vcpus[0], address, 15)
    return f"{symbol(domain, address)}: {disassemble(code, address, count=1)[0].text}"


__all__ = [
    "ANYONE",
    "CAUSES",
    "MASKS_EVENTS",
    "PAGER",
    "RETURN",
    "SLOW_CALL",
    "Row",
    "call_gate",
    "call_ns",
    "calls",
    "entries",
    "faults",
    "fpu_use",
    "frame_builder",
    "frames",
    "gate_of",
    "lost_address",
    "nesting",
    "pager_timeline",
    "round_trip",
    "rows_for",
    "single_steps",
    "skipping",
    "with_neighbour",
]
