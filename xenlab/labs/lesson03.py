"""Scenes of lesson 03: hypercalls asked one at a time, in batches, and to give up the CPU (paper 3.1).

`ask` makes one call with arguments of your choice and compares the whole machine before and after.
`batching` counts and times the same calls made one by one and as one batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from xenlab import guests
from xenlab.abi.numbers import Errno
from xenlab.errors import XenlabError
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.frames import TSS_FRAME
from xenlab.hypervisor.schedulers import RoundRobin
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.machine.disassembler import disassemble
from xenlab.machine.machine import Machine
from xenlab.machine.memory import PAGE_SHIFT, PAGE_SIZE
from xenlab.machine.paging import PRESENT, RW, mapped_pages
from xenlab.timeline import Timeline
from xenlab.toolstack import boot
from xenlab.toolstack.image import SOURCE_BASE, SOURCE_HYPERCALL_PAGE
from xenlab.views.picture import table
from xenlab.views.story import hypercall_name, who

Operand = int | str
REGISTERS = ("ebx", "ecx", "edx", "esi", "edi", "ebp")
NOWHERE, HYPERVISOR, LAST_BYTES = 0x4000_0000, 0xFC00_0000, 0xFFFF_FFF0
_MACHINE_MIB = 8
_STUB_BYTES = 32

_ASK = """
{loads}
        mov eax, {number}
        int 0x82
stay:   jmp stay
        .align 4096
area:   {data}
        .fill 4096, 1, 0xEE
"""


def calls_timeline() -> Timeline:
    """The guest ``calls``, booted and at its first instruction, with a way forward and back."""
    xen = Hypervisor(Machine(_MACHINE_MIB), trace=Trace())
    boot(xen, guests.source("calls"), name="calls")
    return Timeline(xen)


def errno_name(result: int) -> str:
    """``-EFAULT`` for -14, the number itself for an answer that is no error."""
    known = result < 0 and -result in set(Errno)
    return f"-{Errno(-result).name}" if known else str(result)


def conversation(xen: Hypervisor) -> str:
    """The hypercalls of a run as a table, with equal neighbours counted."""
    assert xen.trace is not None
    calls = [event for event in xen.trace.events() if event.kind in (Kind.HYPERCALL, Kind.RETURN)]
    lines = [_spoken(call, answer) for call, answer in pairwise(calls) if call.kind is Kind.HYPERCALL]
    rows = [(f"{len(list(same))} ×", *line) for line, same in groupby(lines)]
    return table(("", "hypercall", "EBX", "ECX", "EDX", "answer"), rows)


def _spoken(call: Any, answer: Any) -> tuple[str, ...]:
    _eax, ecx, edx, ebx, *_rest = call.registers
    result = answer.result
    shown = f"{result} = {errno_name(result)}" if result < 0 else f"{result:#x}"
    return hypercall_name(call.number), f"{ebx:#x}", f"{ecx:#x}", f"{edx:#x}", shown


def stubs(xen: Hypervisor, domain: Domain, numbers: Iterable[int]) -> str:
    """The entries for some hypercalls, disassembled from the page in the guest's memory."""
    lines = []
    for number in numbers:
        address = SOURCE_HYPERCALL_PAGE + _STUB_BYTES * number
        code = xen.guest_memory.read(domain.vcpus[0], address, _STUB_BYTES)
        lines.append(f"{hypercall_name(number)} = {number}, at hypercall_page + 32 * {number}")
        used = [item for item in disassemble(code, address) if item.mnemonic != "int3"]
        lines += [f"    {item.address:#x}  {item.raw.hex(' '):<16} {item.text}" for item in used]
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Answer:
    """What one hypercall did.

    Attributes:
        result: EAX as a signed number.
        changed: what is different in the machine, but for EAX and EIP; empty if nothing is.
        xen: the machine right after the call.
    """

    result: int
    changed: tuple[str, ...]
    xen: Hypervisor

    def __str__(self) -> str:
        return f"{errno_name(self.result)}; changed: {', '.join(self.changed) or 'nothing'}"


def ask(number: Operand, *arguments: Operand, data: bytes = b"") -> Answer:
    """Make one hypercall in a fresh guest and compare the machine before with the machine after.

    Args:
        number: the hypercall, as a number or a name (``"console_io"``).
        arguments: EBX, ECX, EDX, ESI, EDI and EBP, numbers or operands of the assembler; the label
            ``area`` is a page of the guest that holds ``data`` and then bytes of 0xEE.
    """
    if len(arguments) > len(REGISTERS):
        raise XenlabError(f"{len(arguments)} arguments: a hypercall takes at most {len(REGISTERS)}")
    xen = Hypervisor(Machine(_MACHINE_MIB))
    domain = boot(xen, _ask_source(number, arguments, data), name="asking")
    xen.run(len(arguments) + 1)
    before, memory = _virtual(domain), bytes(xen.memory.bytes)
    xen.run(1)
    changed = (*_changed_memory(xen, domain, memory), *_differences(before, _virtual(domain)))
    return Answer(_signed(domain.vcpus[0].state.eax), changed, xen)


def _ask_source(number: Operand, arguments: Sequence[Operand], data: bytes) -> str:
    # Symbols are addresses here; a plain name as an operand would be read as a load.
    loads = "\n".join(f" mov {name}, {_immediate(value)}" for name, value in zip(REGISTERS, arguments, strict=False))
    named = f"__HYPERVISOR_{number}" if isinstance(number, str) else number
    return _ASK.format(loads=loads, number=named, data="\n".join(f" .byte {byte}" for byte in data))


def _immediate(value: Operand) -> str:
    if isinstance(value, int):
        return f"{value & 0xFFFF_FFFF:#x}"
    return value if value[0].isupper() else f"offset {value}"


def _signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value


def _virtual(domain: Domain) -> dict[str, Any]:
    """What the hypervisor knows of the guest, but for its registers."""
    vcpu = domain.vcpus[0].snapshot()
    return {
        "trap table": vcpu["traps"],
        "kernel stack": vcpu["kernel_stack"],
        "control registers": vcpu["control"],
        "run state": vcpu["run_state"],
        "console": domain.console,
        "shutdown": domain.shutdown,
    }


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [name for name, value in after.items() if value != before[name]]


def _changed_memory(xen: Hypervisor, domain: Domain, before: bytes) -> list[str]:
    """Runs of changed bytes, the guest's by linear address, others by machine address; not the machine's task state."""
    after = bytes(xen.memory.bytes)
    if after == before:
        return []
    linear = {mfn: SOURCE_BASE + (pfn << PAGE_SHIFT) for pfn, mfn in enumerate(domain.frames)}
    found = []
    for mfn in sorted(set(range(len(after) >> PAGE_SHIFT)) - {TSS_FRAME}):
        start = mfn << PAGE_SHIFT
        old, new = before[start : start + PAGE_SIZE], after[start : start + PAGE_SIZE]
        places = [at for at in range(PAGE_SIZE) if old[at] != new[at]] if old != new else []
        if places:
            place = f"{linear[mfn] + places[0]:#x}" if mfn in linear else f"machine {start + places[0]:#x}"
            found.append(f"{len(places)} bytes of memory from {place}")
    return found


def read_only_page() -> int:
    """The address of a page that a guest of `ask` may read but not write: one of its page tables."""
    xen = Hypervisor(Machine(_MACHINE_MIB))
    domain = boot(xen, _ask_source(0, (), b""), name="asking")
    state = domain.vcpus[0].state
    pages = mapped_pages(xen.memory, state.mode, state.cr3)
    return next(address for address, entry in pages if entry & PRESENT and not entry & RW)


def wild_pointers() -> str:
    """Calls with pointers to where the guest has nothing: answers, and what they changed."""
    half_there = SOURCE_BASE + (1 << 20) - 8
    cases: list[tuple[str, Operand, tuple[Operand, ...]]] = [
        ("print 16 bytes from nowhere", "console_io", ("CONSOLEIO_write", 16, NOWHERE)),
        ("print 16 bytes, half of them there", "console_io", ("CONSOLEIO_write", 16, half_there)),
        ("print the hypervisor's memory", "console_io", ("CONSOLEIO_write", 16, HYPERVISOR)),
        ("print past the end of addresses", "console_io", ("CONSOLEIO_write", 64, LAST_BYTES)),
        ("write into the hypervisor", "xen_version", ("XENVER_capabilities", HYPERVISOR)),
        ("write 1024 bytes where 8 fit", "xen_version", ("XENVER_capabilities", half_there)),
        ("write into a page table", "xen_version", ("XENVER_capabilities", read_only_page())),
        ("handlers from nowhere", "set_trap_table", (NOWHERE,)),
        ("a batch that runs off the end", "multicall", (half_there, 4)),
        ("a shutdown reason from nowhere", "sched_op", ("SCHEDOP_shutdown", NOWHERE)),
    ]
    rows = []
    for what, number, arguments in cases:
        answer = ask(number, *arguments)
        rows.append((what, str(number), errno_name(answer.result), ", ".join(answer.changed) or "nothing"))
    return table(("the guest asks to", "hypercall", "answer", "what changed"), rows)


def walk_by_hand(xen: Hypervisor, domain: Domain, address: int) -> str:
    """The page-table entries that lead from a guest's address to machine memory, level by level."""
    state = domain.vcpus[0].state
    at, rows = state.mode.root_address(state.cr3), []
    for level in state.mode.levels:
        index = level.index(address)
        entry = state.mode.read(xen.memory, at, index)
        rows.append((level.name, f"{at:#x}", str(index), f"{entry:#x}", "present" if entry & PRESENT else "absent"))
        if not entry & PRESENT:
            break
        at = state.mode.frame_of(entry) << PAGE_SHIFT
    else:
        rows.append(
            ("byte", f"{at:#x}", str(address % PAGE_SIZE), f"{xen.memory.bytes[at + address % PAGE_SIZE]:#x}", "")
        )
    return table(("level", "table at machine", "index", "entry", ""), rows)


_ONE_BY_ONE = """
again:  mov edi, {count}
one:    xor ebx, ebx
        mov eax, __HYPERVISOR_xen_version
        int 0x82
        dec edi
        jnz one
        jmp again
"""
_AS_A_BATCH = """
again:  mov ebx, offset batch
        mov ecx, {count}
        mov eax, __HYPERVISOR_multicall
        int 0x82
        jmp again
        .align 8
batch:  .rept {count}
        .long __HYPERVISOR_xen_version, 0
        .fill 6, 4, 0
        .endr
"""


@dataclass(frozen=True, slots=True)
class BatchCost:
    """The same calls made twice.

    Attributes:
        calls: how many.
        traps: into the hypervisor, one by one and as a batch.
        call_ns: time a call, one by one and as a batch; of this host, at this moment.
    """

    calls: int
    traps: tuple[int, int]
    call_ns: tuple[float, float]


def batching(counts: Sequence[int] = (1, 8, 64, 512), *, work: int = 1024, repeat: int = 5) -> list[BatchCost]:
    """Make each number of calls one by one and as a batch: traps counted, time measured.

    Args:
        work: calls in one measurement.
        repeat: measurements in turns, of which the quickest counts.
    """
    return [_batch_cost(count, work, repeat) for count in counts]


def _batch_cost(count: int, work: int, repeat: int) -> BatchCost:
    single, batch = _ONE_BY_ONE.format(count=count), _AS_A_BATCH.format(count=count)
    # A round of the first loop: 5 instructions a call, and two around them; of the second: 5.
    lengths = (5 * count + 2, 5)
    traps = _count_traps(single, lengths[0]), _count_traps(batch, lengths[1])
    rounds = max(work // count, 1)
    machines = [_warm(single, lengths[0]), _warm(batch, lengths[1])]
    samples: list[list[float]] = [[], []]
    for _ in range(repeat):
        for xen, length, taken in zip(machines, lengths, samples, strict=True):
            begin = time.perf_counter_ns()
            xen.run(rounds * length)
            taken.append((time.perf_counter_ns() - begin) / (rounds * count))
    return BatchCost(count, traps, (min(samples[0]), min(samples[1])))


def _count_traps(source: str, instructions: int) -> int:
    xen = Hypervisor(Machine(_MACHINE_MIB), trace=Trace())
    boot(xen, source, name="calls")
    xen.run(instructions)
    assert xen.trace is not None
    return len(xen.trace.events(Kind.HYPERCALL))


def _warm(source: str, instructions: int) -> Hypervisor:
    """A machine that has been through its loop once, so that the loop is translated."""
    xen = Hypervisor(Machine(_MACHINE_MIB))
    boot(xen, source, name="calls")
    xen.run(instructions)
    return xen


_TALKER = """
start:  mov ebp, {lines}
again:  mov esi, {work}                      # some work of its own
work:   dec esi
        jnz work
        mov ebx, CONSOLEIO_write
        mov ecx, 1
        mov edx, offset letter
        mov eax, __HYPERVISOR_console_io
        int 0x82
{between}
        dec ebp
        jnz again
        mov ebx, SCHEDOP_shutdown
        mov ecx, offset reason
        mov eax, __HYPERVISOR_sched_op
        int 0x82
reason: .long SHUTDOWN_poweroff
letter: .ascii "{letter}"
"""
_YIELD = """
        mov ebx, SCHEDOP_yield
        xor ecx, ecx
        mov eax, __HYPERVISOR_sched_op
        int 0x82
"""
ECHO = """
start:  mov ebx, CONSOLEIO_read              # what was typed meanwhile?
        mov ecx, 64
        mov edx, offset buffer
        mov eax, __HYPERVISOR_console_io
        int 0x82
        test eax, eax
        jz sleep
        mov ebx, CONSOLEIO_write             # print it
        mov ecx, eax
        mov eax, __HYPERVISOR_console_io
        int 0x82
        jmp start
sleep:  mov ebx, SCHEDOP_block               # nothing: sleep until something happens
        xor ecx, ecx
        mov eax, __HYPERVISOR_sched_op
        int 0x82
        jmp start
buffer: .fill 64, 1, 0
"""


def talkers(
    *, polite: bool, lines: int = 4, work: int = 300, slice_instructions: int = 2_000, instructions: int = 1_000_000
) -> Hypervisor:
    """Two guests that work, print a letter and, if ``polite``, yield; they have run for so many instructions."""
    xen = Hypervisor(Machine(_MACHINE_MIB), scheduler=RoundRobin(slice_instructions), trace=Trace())
    for letter in "ab":
        source = _TALKER.format(lines=lines, work=work, between=_YIELD if polite else "", letter=letter)
        boot(xen, source, name=f"talker {letter}")
    xen.run(instructions)
    return xen


def turns(xen: Hypervisor) -> str:
    """Who ran from when to when, and what it printed meanwhile."""
    assert xen.trace is not None
    events = xen.trace.events()
    switches = [event for event in events if event.kind is Kind.SWITCH]
    ends = [event.time for event in switches[1:]] + [xen.now]
    rows = []
    for event, end in zip(switches, ends, strict=True):
        said = [item for item in events if item.kind is Kind.CONSOLE and event.time < item.time <= end]
        text = b"".join(item.data for item in said).decode()
        rows.append((f"{event.time:,}", who(xen, event.to_vcpu), f"{end - event.time:,}", text))
    return table(("from", "runs", "instructions", "prints"), rows)
