"""Reading a run's trace as a story: who called what, which ring came next, which frame was built.

Views read the trace through these functions only.  They take the newest events first and stop
when they have enough, since a trace can hold a hundred thousand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from xenlab.abi.numbers import Errno, Hypercall
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.trace import NO_DOMAIN, Event, Kind, decode
from xenlab.machine.vectors import WITH_ERROR_CODE, vector_name

_HYPERCALLS = {call.value: call.name for call in Hypercall}
# Nobody reads further back in a picture, and copying a whole trace costs milliseconds.
_SCANNED = 4096
_ERRNOS = frozenset(errno.value for errno in Errno)
# How many arguments the calls with fewer than three take.
_ARGUMENTS: dict[int, int] = {
    Hypercall.set_trap_table: 1,
    Hypercall.stack_switch: 2,
    Hypercall.multicall: 2,
    Hypercall.xen_version: 2,
    Hypercall.sched_op: 2,
    Hypercall.iret: 0,
}


def hypercall_name(number: int) -> str:
    """``console_io`` for 18; the bare number where Xen has no such call."""
    return _HYPERCALLS.get(number, f"hypercall {number}")


def newest_first(xen: Hypervisor) -> Iterator[tuple[str, Event]]:
    """The last few thousand events up to now with a key for each, newest first.

    The key is time and place among the events of one instruction; a replay gives it again.
    """
    raw = xen.trace.newest(_SCANNED)[::-1] if xen.trace is not None else []
    end = len(raw)
    while end:
        start = end - 1
        time = raw[start][0]
        while start and raw[start - 1][0] == time:
            start -= 1
        if time <= xen.now:
            for place in range(end - 1, start - 1, -1):
                yield f"{time}.{place - start}", decode(raw[place])
        end = start


@dataclass(frozen=True, slots=True)
class Step:
    """One line of the story.

    Attributes:
        key: see `newest_first`.
        event: what happened.
        result: of a hypercall that returned, else None.
    """

    key: str
    event: Event
    result: int | None = None


def last_steps(xen: Hypervisor, count: int) -> list[Step]:
    """The last ``count`` steps, oldest first; a hypercall and its return are one."""
    steps: list[Step] = []
    returned: dict[int, int] = {}
    for key, event in newest_first(xen):
        if event.kind is Kind.RETURN:
            returned[event.domain] = event.result
            continue
        if _ends(event):
            returned.pop(event.domain, None)
        result = returned.pop(event.domain, None) if event.kind is Kind.HYPERCALL else None
        steps.append(Step(key, event, result))
        if len(steps) == count:
            break
    return steps[::-1]


@dataclass(frozen=True, slots=True)
class Move:
    """The CPU went from one ring to another; ``why`` in a word or two."""

    time: int
    domain: int
    from_ring: int
    to_ring: int
    why: str


def last_moves(xen: Hypervisor, count: int) -> list[Move]:
    """The last ``count`` changes of ring, oldest first."""
    found: list[Event] = []
    for _key, event in newest_first(xen):
        found.append(event)
        if len(found) > 4 * count:
            break
    ended = {(event.time, event.domain) for event in found if _ends(event)}
    moves: list[Move] = []
    ring = 1
    for event in reversed(found):
        if event.kind is Kind.RETURN and (event.time, event.domain) in ended:
            continue
        ring, new = _moves_of(event, ring)
        moves += new
    return moves[-count:]


def _ends(event: Event) -> bool:
    """A domain ended; from the call by which it did, it does not come back."""
    return event.kind is Kind.DOMAIN and event.change.startswith("ended")


def _moves_of(event: Event, ring: int) -> tuple[int, list[Move]]:
    """The ring to which the trap in progress will return, and the moves that ``event`` makes."""
    values = event.values

    def move(start: int, end: int, why: str) -> list[Move]:
        return [Move(event.time, event.domain, start, end, why)]

    match event.kind:
        case Kind.HYPERCALL:
            return 1, move(1, 0, hypercall_name(values["number"]))
        case Kind.TRAP:
            return values["ring"], move(values["ring"], 0, short_vector(values["vector"]))
        case Kind.IRET:
            return values["to_ring"], []
        case Kind.DELIVER:
            return values["to_ring"], move(0, values["to_ring"], f"{short_vector(values['vector'])} handler")
        case Kind.UPCALL:
            # As seen by the code that it interrupts; within a ring nothing moves.
            start, end = values["from_ring"], values["to_ring"]
            return end, move(start, end, "upcall") if start != end else []
        case Kind.GATE:
            return values["to_ring"], move(values["from_ring"], values["to_ring"], short_vector(values["vector"]))
        case Kind.RETURN:
            return ring, move(0, ring, "return")
        case Kind.EMULATE:
            return ring, move(0, ring, "emulated")
    return ring, []


def short_vector(vector: int) -> str:
    """``#GP`` for 13, ``int 0x80`` for 0x80."""
    name = vector_name(vector)
    return name.split()[0] if name[0] == "#" else name


@dataclass(frozen=True, slots=True)
class FrameWord:
    """One word of an exception frame: where, its name, its value, what it means."""

    address: int
    name: str
    value: int
    meaning: str


def frame_words(xen: Hypervisor, event: Event) -> list[FrameWord]:
    """The frame that a DELIVER event built, highest address first, as it was pushed."""
    names = ["EIP", "CS | mask", "EFLAGS", "ESP", "SS"]
    if event.vector in WITH_ERROR_CODE and len(event.words) in (4, 6):
        names.insert(0, "error")
    domain = xen.domains.get(event.domain)
    rows = [
        FrameWord(event.frame + 4 * place, name, value, _meaning(name, value, domain))
        for place, (name, value) in enumerate(zip(names, event.words, strict=False))
    ]
    return rows[::-1]


def _meaning(name: str, value: int, domain: Domain | None) -> str:
    if name == "EIP":
        return symbol(domain, value)
    if name == "CS | mask":
        return f"ring {value & 3}, event mask {value >> 16 & 0xFF}"
    if name == "EFLAGS":
        return flag_names(value)
    if name == "SS":
        return f"ring {value & 3}"
    return ""


_FLAGS = ((0x800, "OF"), (0x400, "DF"), (0x200, "IF"), (0x100, "TF"), (0x80, "SF"), (0x40, "ZF"), (4, "PF"), (1, "CF"))


def flag_names(value: int) -> str:
    """The flags that are set, by name."""
    return " ".join(name for bit, name in _FLAGS if value & bit) or "none set"


def symbol(domain: Domain | None, address: int) -> str:
    """``name+0x4`` for an address in a domain's program, or nothing where no name is near."""
    below = [(at, name) for name, at in domain.symbols.items() if 0 <= address - at < 0x10000] if domain else []
    if not below:
        return ""
    at, name = max(below)
    return name if at == address else f"{name}+{address - at:#x}"


def instructions_by_domain(xen: Hypervisor) -> dict[int, int]:
    """Instructions that each domain began, as far back as the trace reaches."""
    owner = {vcpu.key: domid for domid, domain in xen.domains.items() for vcpu in domain.vcpus}
    counts = dict.fromkeys(xen.domains, 0)
    until = xen.now
    switch = int(Kind.SWITCH)
    switches = [raw for raw in (xen.trace.raw() if xen.trace is not None else ()) if raw[1] == switch]
    for time, _kind, _domid, _from, key, _slice in reversed(switches):
        if key in owner:
            counts[owner[key]] += until - time
        until = time
    return counts


def describe(xen: Hypervisor, step: Step) -> str:
    """One line that says what happened, with its numbers."""
    event, values = step.event, step.event.values
    match event.kind:
        case Kind.HYPERCALL:
            return _call_text(values, step.result)
        case Kind.TRAP:
            return f"{vector_name(values['vector'])} in ring {values['ring']} at {_place(xen, event, values['eip'])}"
        case Kind.DELIVER:
            return f"frame for {short_vector(values['vector'])}, on to {_place(xen, event, values['handler'])}"
        case Kind.GATE:
            return f"{short_vector(values['vector'])} by its gate, on to {_place(xen, event, values['handler'])}"
        case Kind.UPCALL:
            return f"upcall for an event, on to {_place(xen, event, values['handler'])}"
        case Kind.EVENT:
            sender = {NO_DOMAIN: "the hypervisor", event.domain: "itself"}.get(
                values["sender"], f"domain {values['sender']}"
            )
            stopped = f", stopped at {values['stopped']}" if values["stopped"] else ""
            return f"event for port {values['port']} from {sender}{stopped}"
        case Kind.EMULATE:
            changes = ", ".join(f"{name}={value:#x}" for name, value in values["changes"] if name != "eip")
            return f"emulated: {changes or 'no register but EIP changed'}"
        case Kind.IRET:
            return f"iret to ring {values['to_ring']} at {_place(xen, event, values['eip'])}"
        case Kind.SWITCH:
            slice_text = f" for {values['slice']:,} instructions" if values["slice"] else ""
            return f"switch to {who(xen, values['to_vcpu'])}{slice_text}"
        case Kind.CONSOLE:
            return "console: " + bytes(values["data"]).decode("utf-8", "backslashreplace")
        case Kind.FLUSH:
            page = f" of {values['address']:#x}" if values["address"] else ""
            return f"TLB emptied: {values['reason']}{page}"
        case Kind.REFUSED:
            place = f"entry {values['index']} of the table in frame {values['table']:#x}"
            return f"refused: {place} = {values['entry']:#x}: {answer_text(-values['errno'])}"
        case Kind.TABLE_WRITE:
            stored = ", ".join(f"entry {index} = {new:#x}" for index, _old, new in values["changes"]) or "nothing new"
            return f"stored to table {values['table']:#x}: {stored}, {'kept' if values['kept'] else 'put back'}"
    return f"{event.kind.name.lower()}: " + " ".join(str(value) for value in values.values())


def _call_text(values: dict[str, Any], result: int | None) -> str:
    _eax, ecx, edx, ebx, *_rest = values["registers"]
    number = values["number"]
    arguments = ", ".join(f"{word:#x}" for word in (ebx, ecx, edx)[: _ARGUMENTS.get(number, 3)])
    answer = "" if result is None else f" = {answer_text(result)}"
    return f"{hypercall_name(number)}({arguments}){answer}"


def answer_text(result: int) -> str:
    """``-EFAULT`` for -14, ``0x40011`` for 262161: an answer as the lessons write it."""
    failed = -result if result < 0 else 0
    return f"-{Errno(failed).name}" if failed in _ERRNOS else str(result) if -10 < result < 10 else f"{result:#x}"


def _place(xen: Hypervisor, event: Event, address: int) -> str:
    name = symbol(xen.domains.get(event.domain), address)
    return f"{address:#010x}" + (f" ({name})" if name else "")


def who(xen: Hypervisor, key: int) -> str:
    """``domain 1`` for a vCPU's key, ``nobody`` for -1."""
    domain = owner_of(xen, key)
    return "nobody" if domain == NO_DOMAIN else f"domain {domain}"


def owner_of(xen: Hypervisor, key: int) -> int:
    """The domain of a vCPU's key, -1 where there is none."""
    for domid, domain in xen.domains.items():
        if any(vcpu.key == key for vcpu in domain.vcpus):
            return domid
    return NO_DOMAIN


def site(event: Event) -> tuple[int, bool] | None:
    """The code address of an event, and whether it lies behind the instruction that caused it."""
    if event.kind is Kind.HYPERCALL:
        return event.eip, True
    if event.kind is Kind.TRAP:
        software = event.vector >= 32 or event.vector in (3, 4)
        return event.eip, software
    if event.kind in (Kind.EMULATE, Kind.IRET):
        return event.eip, False
    return (event.handler, False) if event.kind in (Kind.DELIVER, Kind.GATE, Kind.UPCALL) else None
