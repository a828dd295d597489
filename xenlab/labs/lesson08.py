"""Scenes of lesson 08: bits that domains set in each other's pages, and how an event is lost (paper 2.1, 3.1).

Each runs real guests (`event_guests`).  `every_moment` runs one again and again, with an event from outside before each
of its instructions, and says for which of them it was lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from xenlab.errors import XenlabError
from xenlab.hypervisor.core import Hypervisor, Stop
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.event_bits import EventBits, bits_of
from xenlab.hypervisor.schedulers import RoundRobin
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.labs.event_guests import (
    CALLBACK,
    CALLBACK_THAT_TIDIES_UP,
    LOOKS_WITH_UPCALLS_CLOSED,
    LOOKS_WITH_UPCALLS_OPEN,
    OPEN_AND_COMPUTE,
    OPEN_AND_SLEEP,
    POLLS,
    TO_BE_LEFT_ALONE,
    TOOLS,
    WAYS_TO_OPEN,
    WAYS_TO_OPEN_ALL,
    alone,
    closes_a_port,
    closes_all,
    left_alone,
    mortal,
    receiver,
    sender,
)
from xenlab.machine.disassembler import disassemble
from xenlab.machine.machine import Machine
from xenlab.timeline import Timeline
from xenlab.timeline.bit_log import BitLog, record_bits
from xenlab.toolstack import Image, boot, image_from_source
from xenlab.views.event_story import STOPPED, bits_in, differences
from xenlab.views.events import EventsView
from xenlab.views.picture import table
from xenlab.views.story import symbol

_MACHINE_MIB, _ENOUGH = 8, 100_000
_LONGEST = 15
HEARD, OVER_ITS_BIT, OVER_ITS_WORK = "heard", "asleep, the bit still set", "asleep, the work not done"


@dataclass(frozen=True, slots=True)
class Outside:
    """An event from outside the machine for a port of a domain, as of a device."""

    domid: int
    port: int = 1

    def apply(self, hypervisor: Hypervisor) -> None:
        """Let it happen."""
        hypervisor.events.set_pending(hypervisor.domains[self.domid], self.port)


def machine(
    *guests: str | Image,
    turn: int = 60,
    privileged: bool = False,
    event_bits: EventBits | None = None,
    names: Sequence[str] = (),
) -> Hypervisor:
    """Guests at their first instruction, each in a domain of its own.

    Args:
        guests: sources or images.
        turn: how many instructions each gets before the next one's turn.
        privileged: whether domain 0 is the control domain.
        event_bits: see `Hypervisor`.
        names: for people.
    """
    xen = Hypervisor(Machine(_MACHINE_MIB), scheduler=RoundRobin(turn), event_bits=event_bits, trace=Trace())
    for number, guest in enumerate(guests):
        name = names[number] if number < len(names) else f"guest {number}"
        boot(xen, guest, name=name, privileged=privileged and not number)
    return xen


@dataclass(frozen=True, slots=True)
class Scene:
    """A run with a way forward and back, and every change of the bits in it.

    Attributes:
        timeline: the run, at its first instruction or where it was taken to.
        log: the record.
        sources: of the guests, by domain id.
    """

    timeline: Timeline
    log: BitLog
    sources: dict[int, str]

    @property
    def xen(self) -> Hypervisor:
        """The machine."""
        return self.timeline.hypervisor

    def view(self, span: int = 300) -> EventsView:
        """The picture of its events."""
        return EventsView(self.xen, self.log, span=span, sources=self.sources)

    def at(self, what: str, domid: int = 0) -> int:
        """Go to where one of a domain's bits first changed in this way, like ``"port 1 pending"``; the time reached."""
        for change in self.log.changes:
            if change.domid == domid and what in differences(change.before, change.after):
                return self.timeline.seek(change.time)
        raise XenlabError(
            f"{what!r} did not happen in domain {domid}; expected one of the changes in\n{self.changes(domid)}"
        )

    def changes(self, domid: int) -> str:
        """What happened to the bits of a domain, step by step."""
        rows = []
        for change in self.log.changes:
            if change.domid == domid:
                by = f"the guest, before {symbol(self.xen.domains[domid], change.eip)}" if change.by_guest else "Xen"
                rows.append((f"{change.time:,}", by, ", ".join(differences(change.before, change.after))))
        return table(("time", "by", "what changed"), rows)


def scene(*sources: str, turn: int = 60, instructions: int = 600, outside: Iterable[int] = ()) -> Scene:
    """Guests that can be watched, and an event from outside for domain 0 at each of some times."""
    timeline = Timeline(machine(*sources, turn=turn, names=("receiver", "sender")))
    for time in sorted(outside):
        timeline.seek(time)
        timeline.submit(Outside(0))
    timeline.seek(0)
    return Scene(timeline, record_bits(timeline, instructions), dict(enumerate(sources)))


def word(xen: Hypervisor, label: str, place: int = 0, domid: int = 0) -> int:
    """A word of a guest's own data by its label, or the one so many words behind it."""
    domain = xen.domains[domid]
    return xen.guest_memory.read_word(domain.vcpus[0], domain.symbols[label] + 4 * place)


def upcalls(xen: Hypervisor) -> int:
    """How often domain 0 was made to enter its callback."""
    assert xen.trace is not None
    return sum(event.domain == 0 for event in xen.trace.events(Kind.UPCALL))


def events_by_end(xen: Hypervisor) -> dict[str, int]:
    """The events for domain 0 by where they stopped, in the words of the picture."""
    assert xen.trace is not None
    found = Counter(event.stopped for event in xen.trace.events(Kind.EVENT) if event.domain == 0)
    return {STOPPED[stopped]: count for stopped, count in found.items()}


def price_of_silence(rounds: int = 100) -> str:
    """What it takes to be left alone for a moment, so often: entries of the hypervisor."""
    rows = []
    for way in TO_BE_LEFT_ALONE:
        xen = machine(left_alone(way, rounds))
        xen.run(_ENOUGH)
        assert xen.trace is not None
        guest = xen.domains[0]
        done = "none, it ended" if guest.ended else str(rounds - guest.vcpus[0].state.ebp)
        rows.append((way, done, str(len(xen.trace.events(Kind.TRAP)))))
    return table(("the kernel's way", f"of {rounds} rounds", "hypervisor entered"), rows)


def many_sends(count: int, turn: int) -> Hypervisor:
    """A receiver that computes, and a sender that sends so often; the machine afterwards."""
    xen = machine(receiver(OPEN_AND_COMPUTE), sender(count), turn=turn)
    while not xen.domains[1].ended:
        xen.run(_ENOUGH)
    xen.run(4 * turn)
    return xen


def storm(turns: Iterable[int], count: int = 1_000) -> str:
    """The same number of sends with turns of different length: how many upcalls came of them."""
    rows = []
    for turn in turns:
        xen = many_sends(count, turn)
        entered = upcalls(xen)
        rows.append((f"{turn:,}", f"{count:,}", str(entered), f"{count / entered:.1f}"))
    return table(("instructions a turn", "sends", "upcalls", "sends an upcall"), rows)


def opened_by(way: str, event_bits: EventBits | None = None) -> Hypervisor:
    """A guest that had a port closed when an event came, opened it in one of `WAYS_TO_OPEN`, and slept since."""
    xen = machine(closes_a_port(way), event_bits=event_bits)
    xen.inputs.submit(60, Outside(0))
    return _asleep(xen)


def delay(way: str, turn: int = 10_000) -> int:
    """Instructions from the opening of all upcalls, in one of `WAYS_TO_OPEN_ALL`, to the upcall for what waits."""
    xen = machine(closes_all(way), "start: jmp start", turn=turn)
    xen.inputs.submit(60, Outside(0))
    state, opened = xen.domains[0].vcpus[0].state, xen.domains[0].symbols["open"]
    for _ in range(_ENOUGH):
        if state.eip == opened:
            break
        xen.run(1)
    began = xen.now
    xen.run(3 * turn)
    assert xen.trace is not None
    return xen.trace.events(Kind.UPCALL)[0].time - began


def _asleep(xen: Hypervisor) -> Hypervisor:
    """Run a machine until nobody can run."""
    if xen.run(_ENOUGH).stop is not Stop.IDLE:
        raise XenlabError(f"expected the guest to sleep by now; it still runs after {xen.now:,} instructions")
    return xen


@dataclass(frozen=True, slots=True)
class Moment:
    """An event from outside before one instruction of a guest.

    Attributes:
        time: when.
        instruction: the one before which it came, with its place.
        outcome: `HEARD`, `OVER_ITS_BIT` or `OVER_ITS_WORK`.
    """

    time: int
    instruction: str
    outcome: str


@dataclass(frozen=True, slots=True)
class Moments:
    """What became of the event at each moment."""

    all: tuple[Moment, ...]

    @property
    def lost(self) -> tuple[Moment, ...]:
        """Those at which it was lost."""
        return tuple(moment for moment in self.all if moment.outcome != HEARD)

    def __str__(self) -> str:
        said = f"{len(self.all)} moments: heard at {len(self.all) - len(self.lost)}, lost at {len(self.lost)}"
        rows = [(str(moment.time), moment.instruction, moment.outcome) for moment in self.lost]
        heads = ("time", "the event came before", "afterwards the guest is")
        return f"{said}\n\n{table(heads, rows)}" if rows else said


def every_moment(source: str, *, woken: bool = False, begin: str = "again") -> Moments:
    """Run a guest once for each of its instructions, with an event from outside before that one.

    Args:
        source: the guest; left alone, it goes to sleep.
        woken: whether it sleeps first and is woken by an event; the moments are those from then on.
        begin: the label from which on the moments are tried otherwise.
    """
    image = image_from_source(source, "guest 0")
    places = _places(image, woken)
    start = 1 if woken else next(time for time, (_text, at) in enumerate(places.values()) if at == begin)
    times = sorted(places)
    return Moments(tuple(_try(image, woken, time, places[time]) for time in times[start:]))


def _places(image: Image, woken: bool) -> dict[int, tuple[str, str]]:
    """The instruction before which the guest stands at each time until it sleeps, and its place by name."""
    xen = _begun(image, woken)
    places: dict[int, tuple[str, str]] = {}
    domain = xen.domains[0]
    while True:
        now, place = xen.now, (_instruction(xen, domain), symbol(domain, domain.vcpus[0].state.eip))
        if xen.run(1).stop is Stop.IDLE:
            return places
        places[now] = place


def _begun(image: Image, woken: bool) -> Hypervisor:
    """A guest at its first instruction, or asleep with an event that wakes it."""
    if not woken:
        return machine(image)
    xen = _asleep(machine(image))
    xen.submit(Outside(0))
    return xen


def _instruction(xen: Hypervisor, domain: Domain) -> str:
    eip = domain.vcpus[0].state.eip
    return disassemble(xen.guest_memory.read(domain.vcpus[0], eip, _LONGEST), eip, count=1)[0].text


def _try(image: Image, woken: bool, time: int, place: tuple[str, str]) -> Moment:
    xen = _begun(image, woken)
    xen.inputs.submit(time, Outside(0))
    _asleep(xen)
    domain, bits = xen.domains[0], bits_of(xen, xen.domains[0])
    outcome = HEARD
    if bits.pending & ~bits.mask & 2:
        outcome = OVER_ITS_BIT
    elif "serve" in domain.symbols and word(xen, "work") != word(xen, "served", 1):
        outcome = OVER_ITS_WORK
    return Moment(time, "{}  ({})".format(*place), outcome)


def deaf() -> Scene:
    """The guest that tidies up too late: woken, with an event at a moment at which that loses it, and three more."""
    source = alone(OPEN_AND_SLEEP, callback=CALLBACK_THAT_TIDIES_UP)
    lost = every_moment(source, woken=True).lost[0].time
    timeline = Timeline(machine(source))
    timeline.seek(_ENOUGH)
    timeline.submit(Outside(0))
    for _ in range(4):
        timeline.seek(lost)
        timeline.submit(Outside(0))
        lost = timeline.seek(_ENOUGH)
    timeline.seek(0)
    made = Scene(timeline, record_bits(timeline, _ENOUGH), {0: source})
    timeline.seek(_ENOUGH)
    return made


def heard(callback: str = CALLBACK, count: int = 5) -> Hypervisor:
    """A receiver that sleeps, and a sender that gives it time between two events; afterwards."""
    xen = machine(receiver(callback=callback), sender(count, pause=100))
    xen.run(_ENOUGH)
    return xen


def polled(count: int = 5) -> Hypervisor:
    """A guest that keeps its upcalls closed and polls, with a sender beside it; afterwards."""
    xen = machine(receiver(POLLS), sender(count, pause=100))
    xen.run(_ENOUGH)
    return xen


def deaths(lifetimes: Iterable[int], turn: int = 60) -> Hypervisor:
    """A control domain that is told when a domain ends, and domains that live for so long; afterwards."""
    xen = machine(TOOLS, *map(mortal, lifetimes), turn=turn, privileged=True)
    xen.run(_ENOUGH)
    return xen


def waiting(xen: Hypervisor, domid: int = 0) -> list[int]:
    """The ports of a domain that have an event and are open."""
    bits = bits_of(xen, xen.domains[domid])
    return list(bits_in(bits.pending & ~bits.mask))


__all__ = [
    "CALLBACK",
    "CALLBACK_THAT_TIDIES_UP",
    "HEARD",
    "LOOKS_WITH_UPCALLS_CLOSED",
    "LOOKS_WITH_UPCALLS_OPEN",
    "OPEN_AND_COMPUTE",
    "OPEN_AND_SLEEP",
    "OVER_ITS_BIT",
    "OVER_ITS_WORK",
    "WAYS_TO_OPEN",
    "WAYS_TO_OPEN_ALL",
    "Moment",
    "Moments",
    "Outside",
    "Scene",
    "alone",
    "deaf",
    "deaths",
    "delay",
    "events_by_end",
    "every_moment",
    "heard",
    "machine",
    "many_sends",
    "opened_by",
    "polled",
    "price_of_silence",
    "receiver",
    "scene",
    "sender",
    "storm",
    "upcalls",
    "waiting",
    "word",
]
