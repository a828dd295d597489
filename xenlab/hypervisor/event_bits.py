"""The slot for what becomes of an event's bits: a part in plain numbers in place of `events` (lesson 08; paper 3.1).

The problem: which bits a send sets, what an unmask lets through and when a guest may sleep are a dozen lines, and
every one of them has lost somebody an event.  To understand them one writes them.

A part is told the words that matter, and answers with those that change.  Where a word stands, whose it is
and who is woken stays with the hypervisor; so does what a port is bound to.  Ours works on the shared page itself
(`EventChannels`) and is what runs where no part was passed in; `XenBits` says the same in the terms of the slot.

The invariant: what the hypervisor does with an answer depends on nothing but the answer.  A part that loses an
event makes a guest sleep for ever, but breaks nobody else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

from xenlab.abi.structures import SharedInfo, VcpuInfo
from xenlab.errors import XenlabError
from xenlab.hypervisor.domain import Domain, Vcpu
from xenlab.hypervisor.events import AT_MASK, AT_PENDING, AT_UPCALL, MASK_BEHIND, THROUGH, EventChannels
from xenlab.hypervisor.parts import wrong
from xenlab.hypervisor.trace import NO_DOMAIN, Kind

if TYPE_CHECKING:
    from xenlab.hypervisor.core import Hypervisor

Answer = Mapping[str, int]
WORD = 32
# What each question may change; the last of them is a truth value.
CHANGES = {
    "send": ("pending", "selector", "upcall", "wake"),
    "unmask": ("mask", "selector", "upcall"),
    "block": ("upcall", "sleep"),
}
_TRUTHS = frozenset(("wake", "sleep"))
_BITS = 128


class EventBits(Protocol):
    """The slot.  ``pending`` and ``mask`` are the words of 32 ports in which ``port`` has its bit.

    ``selector`` is the word ``evtchn_pending_sel`` and ``upcall`` the byte ``evtchn_upcall_pending``, any number above
    0 of which makes the guest enter its callback.  An answer names what changes, by those names.
    """

    def send(self, port: int, pending: int, mask: int, selector: int, upcall: int, asleep: bool) -> Answer:
        """An event for ``port``.  May change ``pending``, ``selector``, ``upcall``; ``wake``: True wakes the guest."""
        ...

    def unmask(self, port: int, pending: int, mask: int, selector: int, upcall: int) -> Answer:
        """The guest asks to have ``port`` unmasked.  May change ``mask``, ``selector``, ``upcall``."""
        ...

    def block(self, selector: int, upcall: int) -> Answer:
        """The guest wants to sleep, and takes upcalls from now on.  May change ``upcall``; ``sleep``: it may."""
        ...


class XenBits:
    """Xen's rules in the terms of the slot."""

    def send(self, port: int, pending: int, mask: int, selector: int, upcall: int, asleep: bool) -> Answer:
        bit = 1 << port % WORD
        if pending & bit:
            return {}
        if mask & bit:
            return {"pending": pending | bit}
        changes = self._select(port, selector, upcall)
        return changes | {"pending": pending | bit, "wake": asleep and "upcall" in changes}

    def unmask(self, port: int, pending: int, mask: int, selector: int, upcall: int) -> Answer:
        bit = 1 << port % WORD
        goes_on = mask & bit and pending & bit
        return {"mask": mask & ~bit} | (self._select(port, selector, upcall) if goes_on else {})

    def block(self, selector: int, upcall: int) -> Answer:
        return {"sleep": not upcall}

    def _select(self, port: int, selector: int, upcall: int) -> dict[str, int]:
        bit = 1 << port // WORD
        if selector & bit:
            return {}
        return {"selector": selector | bit} | ({} if upcall & 1 else {"upcall": upcall | 1})


class Bits(NamedTuple):
    """What stands in a domain's shared page about events.

    Attributes:
        pending, mask: a bit for each port.
        selector: a bit for each word of these with something new.
        upcall: whether an upcall is pending.
        closed: whether upcalls are masked.
    """

    pending: int
    mask: int
    selector: int
    upcall: int
    closed: int


def bits_of(xen: Hypervisor, domain: Domain) -> Bits:
    """The bits of a domain as they are now, those of its first vCPU."""
    page = xen.memory.frame(domain.shared_info_mfn)
    pending, mask = (
        int.from_bytes(page[field.offset : field.offset + _BITS], "little")
        for field in (SharedInfo.evtchn_pending, SharedInfo.evtchn_mask)
    )
    selector = VcpuInfo.evtchn_pending_sel.offset
    word = int.from_bytes(page[selector : selector + 4], "little")
    return Bits(pending, mask, word, page[0], page[VcpuInfo.evtchn_upcall_mask.offset])


class SlottedEvents(EventChannels):
    """Event channels whose bits a part decides about.

    Args:
        part: what answers.
    """

    def __init__(self, xen: Hypervisor, part: EventBits) -> None:
        super().__init__(xen)
        self.part: EventBits = part

    def set_pending(self, domain: Domain, port: int, sender: int = NO_DOMAIN) -> None:
        vcpu = domain.vcpus[domain.ports[port].vcpu]
        words = self.words(domain, port)
        answer = self._ask(domain, "send", port, *words, vcpu.asleep)
        self._store(domain, port, vcpu, answer)
        if answer.get("wake"):
            self.unblock(vcpu)
        stopped = _stopped(words, answer)
        if stopped != AT_PENDING:
            self._wake_pollers(domain, port)
        self._xen.record(Kind.EVENT, domain.domid, port, sender, stopped)

    def clear_mask(self, domain: Domain, port: int) -> None:
        vcpu = domain.vcpus[domain.ports[port].vcpu]
        self._store(domain, port, vcpu, self._ask(domain, "unmask", port, *self.words(domain, port)))

    def may_sleep(self, vcpu: Vcpu) -> bool:
        answer = self._ask(vcpu.domain, "block", self._word(vcpu), self._bytes[vcpu.info])
        self._store(vcpu.domain, 0, vcpu, answer)
        return bool(answer.get("sleep", False))

    def words(self, domain: Domain, port: int) -> tuple[int, int, int, int]:
        """Pending and mask word of a port, selector and upcall of its vCPU."""
        at, _bit = self._place(domain, port)
        vcpu = domain.vcpus[domain.ports[port].vcpu]
        return self._words[at], self._words[at + MASK_BEHIND], self._word(vcpu), self._bytes[vcpu.info]

    def _word(self, vcpu: Vcpu) -> int:
        return self._words[vcpu.info + VcpuInfo.evtchn_pending_sel.offset >> 2]

    def _ask(self, domain: Domain, question: str, *told: int) -> Answer:
        asked = f"{question}{told} for domain {domain.domid}"
        try:
            answer = getattr(self.part, question)(*told)
        except XenlabError:
            raise
        except Exception as problem:
            raise wrong(self.part, asked, expected(question), problem) from problem
        if not is_answer(question, answer):
            raise wrong(self.part, asked, expected(question), answer)
        changes: Answer = answer
        return changes

    def _store(self, domain: Domain, port: int, vcpu: Vcpu, answer: Answer) -> None:
        at, _bit = self._place(domain, port)
        places = {
            "pending": at,
            "mask": at + MASK_BEHIND,
            "selector": vcpu.info + VcpuInfo.evtchn_pending_sel.offset >> 2,
        }
        for name, place in places.items():
            if name in answer:
                self._words[place] = answer[name]
        if "upcall" in answer:
            self._bytes[vcpu.info] = answer["upcall"]


def event_channels(xen: Hypervisor, part: EventBits | None) -> EventChannels:
    """Event channels with ``part`` in the slot, or with ours on the page itself."""
    return EventChannels(xen) if part is None else SlottedEvents(xen, part)


def expected(question: str) -> str:
    """What an answer to a question has to look like, in words."""
    *words, last = CHANGES[question]
    truth = f" and {last!r}: True or False" if last in _TRUTHS else ""
    names = [repr(name) for name in (words if truth else CHANGES[question])]
    return f"a dict of what changes: {', '.join(names)} as numbers of 32 bits ('upcall' of 8){truth}"


def is_answer(question: str, answer: object) -> bool:
    """Whether something is an answer to a question."""
    return isinstance(answer, Mapping) and all(
        isinstance(name, str) and name in CHANGES[question] and _fits(name, value) for name, value in answer.items()
    )


def _fits(name: str, value: object) -> bool:
    if name in _TRUTHS:
        return value is True or value is False
    return type(value) is int and 0 <= value < 1 << (8 if name == "upcall" else WORD)


def _stopped(words: tuple[int, int, int, int], answer: Answer) -> str:
    """How far an event came, by what its answer changes; ``mask`` if no further than its own bit."""
    pending, _mask, selector, upcall = words
    if answer.get("upcall", upcall) != upcall:
        return THROUGH
    if answer.get("selector", selector) != selector:
        return AT_UPCALL
    return AT_PENDING if answer.get("pending", pending) == pending else AT_MASK
