"""Events in the order of time: sends, upcalls, returns, sleep, and the guests' own stores to the bits (lesson 08).

The trace tells of all but the stores; these come from a `BitLog`, where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from xenlab.abi.numbers import EvtchnOp, EvtchnStatus, Hypercall, SchedOp, Virq
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import Domain, Port
from xenlab.hypervisor.event_bits import Bits
from xenlab.hypervisor.events import AT_MASK, AT_PENDING, AT_SELECTOR, AT_UPCALL, THROUGH
from xenlab.hypervisor.trace import NO_DOMAIN, Event, Kind
from xenlab.timeline.bit_log import BitChange, BitLog
from xenlab.views.story import newest_first, symbol

SEND, UPCALL, RETURN, SLEEP, POLL, UNMASK, STORE, END = (
    "send", "upcall", "return", "block", "poll", "unmask", "store", "end"
)  # fmt: skip
STOPPED = {
    THROUGH: "an upcall is pending",
    AT_PENDING: "its bit was 1 already",
    AT_MASK: "the port is masked",
    AT_SELECTOR: "its selector bit was 1 already",
    AT_UPCALL: "an upcall was pending already",
}
_CALLS = {
    (Hypercall.sched_op, SchedOp.BLOCK): (SLEEP, "block: unmask upcalls, and sleep unless one is due"),
    (Hypercall.sched_op, SchedOp.POLL): (POLL, "poll: sleep until one of some ports has an event"),
    (Hypercall.event_channel_op, EvtchnOp.UNMASK): (UNMASK, "unmask a port"),
}


@dataclass(frozen=True, slots=True)
class Mark:
    """One thing that happened.

    Attributes:
        key: for choosing it.
        time, domid: when, and at whose end.
        kind: one of the names above.
        text: the same in words.
        sender: of a send, -1 for the hypervisor.
        stopped: of a send, where it stopped.
        code: the domain, address, and whether the instruction ends there, of what did it; None if nobody's did.
    """

    key: str
    time: int
    domid: int
    kind: str
    text: str
    sender: int = NO_DOMAIN
    stopped: str = ""
    code: tuple[int, int, bool] | None = None


def marks(xen: Hypervisor, log: BitLog | None, count: int, since: int = 0) -> list[Mark]:
    """The last ``count`` marks that are not before ``since``, oldest first."""
    found = _from_trace(xen, log, count, since)
    changes = [change for change in log.until(xen.now) if change.by_guest] if log is not None else []
    stores = [_store(xen, change) for change in changes[-count:] if change.time >= since]
    # A store is done before anything else of the time behind it.
    return sorted([*stores, *found], key=lambda mark: mark.time)[-count:]


def _from_trace(xen: Hypervisor, log: BitLog | None, count: int, since: int) -> list[Mark]:
    found: list[Mark] = []
    waiting: list[tuple[int, Event]] = []  # sends whose hypercall, which was before them, is still to come
    next_upcall: dict[int, int] = {}
    for key, event in newest_first(xen):
        if event.time < since or (len(found) > count and not waiting):
            break
        if event.kind is Kind.EVENT:
            waiting.append((len(found), event))
            found.append(_send(xen, log, key, event, next_upcall.get(event.domain)))
            continue
        if event.kind is Kind.UPCALL:
            next_upcall[event.domain] = event.time
        elif event.kind is Kind.HYPERCALL:
            for place, send in waiting:
                if (send.time, send.sender) == (event.time, event.domain):
                    found[place] = _with_code(found[place], (event.domain, event.eip, True))
            waiting = []
        made = _mark(xen, key, event)
        if made is not None:
            found.append(made)
    return found[::-1]


def _with_code(mark: Mark, code: tuple[int, int, bool]) -> Mark:
    return Mark(mark.key, mark.time, mark.domid, mark.kind, mark.text, mark.sender, mark.stopped, code)


def _send(xen: Hypervisor, log: BitLog | None, key: str, event: Event, upcall: int | None) -> Mark:
    sender = {NO_DOMAIN: "the hypervisor", event.domain: "itself"}.get(event.sender, f"domain {event.sender}")
    text = f"event at port {event.port} from {sender}: {STOPPED[event.stopped]}"
    served = log.served(event.domain, event.port, event.time, xen.now) if log is not None else None
    if served is not None:
        text += f"; taken at {served:,}"
    elif upcall is not None and event.stopped != AT_MASK and log is None:
        text += f"; upcall at {upcall:,}"
    elif log is not None:
        text += "; not taken yet"
    return Mark(key, event.time, event.domain, SEND, text, event.sender, event.stopped)


def _mark(xen: Hypervisor, key: str, event: Event) -> Mark | None:
    """What is shown of an event that is no send; None for nothing."""
    domain = xen.domains.get(event.domain)
    match event.kind:
        case Kind.UPCALL:
            place = symbol(domain, event.handler) or f"{event.handler:#x}"
            text = f"upcall: on to {place}, upcalls masked"
            return Mark(key, event.time, event.domain, UPCALL, text, code=(event.domain, event.handler, False))
        case Kind.IRET:
            text = f"iret: back to {symbol(domain, event.eip) or hex(event.eip)}, upcalls as they were"
            return Mark(key, event.time, event.domain, RETURN, text, code=(event.domain, event.eip, False))
        case Kind.DOMAIN if event.change.startswith("ended"):
            return Mark(key, event.time, event.domain, END, f"domain {event.domain} {event.change.replace(':', ': ')}")
        case Kind.HYPERCALL:
            known = _CALLS.get((event.number, event.registers[3]))
            if known is not None:
                return Mark(key, event.time, event.domain, *known, code=(event.domain, event.eip, True))
    return None


def _store(xen: Hypervisor, change: BitChange) -> Mark:
    text = "a store: " + ", ".join(differences(change.before, change.after))
    return Mark(
        f"s{change.time}.{change.domid}", change.time, change.domid, STORE, text, code=(change.domid, change.eip, True)
    )


def differences(before: Bits, after: Bits) -> list[str]:
    """What changed, in words: ``port 3 masked``, ``upcalls unmasked``."""
    said = []
    for word, old, new, on, off in (
        ("port", before.pending, after.pending, "pending", "taken"),
        ("port", before.mask, after.mask, "masked", "unmasked"),
        ("selector bit", before.selector, after.selector, "set", "cleared"),
    ):
        said += [f"{word} {bit} {on if new >> bit & 1 else off}" for bit in bits_in(old ^ new)]
    if bool(before.upcall) != bool(after.upcall):
        said.append("upcall pending" if after.upcall else "upcall flag cleared")
    if bool(before.closed) != bool(after.closed):
        said.append("upcalls masked" if after.closed else "upcalls unmasked")
    return said


def bits_in(number: int) -> Iterator[int]:
    """The numbers of the bits that are 1."""
    return (bit for bit in range(number.bit_length()) if number >> bit & 1)


def bound_to(port: Port) -> str:
    """What is at the other end of a port: ``dom 1 port 3``, ``VIRQ DOM_EXC``, ``nobody yet``."""
    match port.status:
        case EvtchnStatus.INTERDOMAIN:
            return f"dom {port.remote} port {port.remote_port}"
        case EvtchnStatus.VIRQ:
            known = {virq.value: virq.name for virq in Virq}
            return f"VIRQ {known.get(port.virq, port.virq)}"
        case EvtchnStatus.IPI:
            return "itself"
        case EvtchnStatus.UNBOUND:
            return f"for dom {port.remote}"
    return ""


def lost(domain: Domain, bits: Bits, asleep: bool) -> list[int]:
    """The ports with an event that nobody will tell a sleeping domain of."""
    if not asleep:
        return []
    return [port for port in bits_in(bits.pending & ~bits.mask) if port in domain.ports]
