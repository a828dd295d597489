"""Scenes of lesson 09: the three clocks of a guest, and its two alarms (paper 3.3.2).

Most run the guest ``clocks``, which does what its command line says: alarms, ticks, work, sleep (see the head of
`xenlab/guests/clocks.s`).  Times are in instructions, of which one takes 10 ns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from xenlab import guests
from xenlab.errors import XenlabError
from xenlab.hypervisor.accounting import virtual_time
from xenlab.hypervisor.clocks import to_ns
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.schedulers import RoundRobin
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.labs.time_guests import listing, torn, two_processes
from xenlab.machine.machine import Machine
from xenlab.timeline import Timeline
from xenlab.toolstack import Image, boot, image_from_source
from xenlab.views.clocks import milliseconds
from xenlab.views.picture import table

MILLISECOND = 100_000  # instructions
_MACHINE_MIB = 8
_RDTSC = b"\x0f\x31"
_BUSY = "w 4000000000"
# What is watched: one that counts ticks, one with an alarm on virtual time, one that sleeps by an alarm on real time.
WATCHED = {
    "ticks": f"t {MILLISECOND} {_BUSY}",
    "works": f"t 0 ( v {3 * MILLISECOND // 2} w {3 * MILLISECOND // 2} )",
    "sleeps": f"t 0 ( r {5 * MILLISECOND // 2} s w 20000 )",
}


def machine(plans: Mapping[str, str] | Iterable[str], *, turn: int = 5 * MILLISECOND) -> Hypervisor:
    """Guests that follow their plans, each in turn for at most so many instructions; a plan may have a name."""
    xen = Hypervisor(Machine(_MACHINE_MIB), scheduler=RoundRobin(turn), trace=Trace())
    named = plans if isinstance(plans, Mapping) else {f"guest {number}": plan for number, plan in enumerate(plans)}
    source = guests.source("clocks")
    for name, plan in named.items():
        boot(xen, source, name=name, command_line=plan)
    return xen


def run(*plans: str, instructions: int = 60_000, turn: int = 5 * MILLISECOND) -> Hypervisor:
    """The same, after a run."""
    xen = machine(plans, turn=turn)
    xen.run(instructions)
    return xen


def word(xen: Hypervisor, domain: Domain, label: str) -> int:
    """A word of a guest's own data, by its label in the source."""
    return xen.guest_memory.read_word(domain.vcpus[0], domain.symbols[label])


def words(xen: Hypervisor, domain: Domain, label: str, count: int) -> list[int]:
    """Some words in a row."""
    vcpu, at = domain.vcpus[0], domain.symbols[label]
    return [xen.guest_memory.read_word(vcpu, at + 4 * number) for number in range(count)]


def notes(xen: Hypervisor, domid: int = 0) -> list[tuple[int, int]]:
    """What a guest noted (``n`` in its plan): real and virtual time in nanoseconds, as it read them."""
    domain = xen.domains[domid]
    count = word(xen, domain, "noted")
    found = words(xen, domain, "notes", 4 * count)
    pairs = [low | high << 32 for low, high in zip(found[::2], found[1::2], strict=True)]
    return list(zip(pairs[::2], pairs[1::2], strict=True))


def events(xen: Hypervisor, domid: int = 0) -> tuple[int, int]:
    """How many events a guest has served: of its alarm on real time and its ticks, and of that on virtual time."""
    domain = xen.domains[domid]
    return word(xen, domain, "timer"), word(xen, domain, "virtual")


def went_off(xen: Hypervisor, domid: int | None = None) -> list[tuple[int, int, str]]:
    """When which timer of which domain went off."""
    assert xen.trace is not None
    found = xen.trace.events(Kind.TIMER)
    return [(event.time, event.domain, event.timer) for event in found if domid in (None, event.domain)]


@dataclass(frozen=True, slots=True)
class Drift:
    """A guest that counts ticks of 1 ms: what it counted, and what its clocks said then, in nanoseconds."""

    counted: int
    real_ns: int
    virtual_ns: int


def drift(domains: int, *, work: int = 10 * MILLISECOND) -> list[Drift]:
    """Guests that work for 10 ms each, count their ticks meanwhile, and then read the clocks.

    Raises:
        XenlabError: one of them has not come to the end of its work.
    """
    xen = run(*[f"t {MILLISECOND} w {work} n {_BUSY}"] * domains, instructions=(domains + 2) * work)
    found = []
    for domid in xen.domains:
        if not notes(xen, domid):
            raise XenlabError(f"expected domain {domid} to have read the clocks by instruction {xen.now}; it has not")
        ticks = [
            time
            for time, _domid, name in went_off(xen, domid)
            if name == "tick" and to_ns(time) <= notes(xen, domid)[0][0]
        ]
        found.append(Drift(len(ticks), *notes(xen, domid)[0]))
    return found


def drift_table(counts: Iterable[int]) -> str:
    """`drift` with so many domains: the first guest's count beside its clocks."""
    rows = []
    for count in counts:
        first = drift(count)[0]
        slow = first.real_ns / 1_000_000 - first.counted
        numbers = (milliseconds(first.real_ns), milliseconds(first.virtual_ns), f"{slow:.1f}")
        rows.append((str(count), str(first.counted), *numbers))
    heads = ("domains", "ms counted by ticks", "real ms by its record", "virtual ms", "ms slow")
    return table(heads, rows)


def counter_reads(xen: Hypervisor) -> list[int]:
    """When each ``rdtsc`` of a guest was emulated."""
    assert xen.trace is not None
    return [event.time for event in xen.trace.events(Kind.EMULATE) if bytes(event.code)[:2] == _RDTSC]


def torn_read(*, careful: bool) -> tuple[int, int, Hypervisor]:
    """The time that a guest computes when it is interrupted in the middle of its record, and the true one.

    Both in nanoseconds, the second from when it last read the counter.
    """
    xen = Hypervisor(Machine(_MACHINE_MIB), trace=Trace())
    domain = boot(xen, torn(careful=careful), name="torn")
    boot(xen, "start: jmp start", name="neighbour")
    xen.run(40 * MILLISECOND)
    return word(xen, domain, "read"), to_ns(counter_reads(xen)[-1]), xen


def two_processes_beside(neighbours: int, *, turns: int = 4) -> tuple[Hypervisor, Domain]:
    """A kernel with two processes after so many turns of theirs, beside neighbours that never rest.

    Raises:
        XenlabError: it never came so far.
    """
    xen = Hypervisor(Machine(_MACHINE_MIB), scheduler=RoundRobin(5 * MILLISECOND), trace=Trace())
    domain = boot(xen, two_processes(), name="two processes")
    for number in range(neighbours):
        boot(xen, "start: jmp start", name=f"neighbour {number}")
    for _ in range(100 * (neighbours + 1)):
        if word(xen, domain, "turns") >= turns:
            return xen, domain
        xen.run(MILLISECOND)
    raise XenlabError(f"the kernel has not had {turns} turns by instruction {xen.now}\n{domain.report}")


def charges(xen: Hypervisor, domain: Domain) -> str:
    """What the kernel of `two_processes_beside` charged its processes, in milliseconds."""
    columns = [words(xen, domain, label, 2) for label in ("done", "by_real", "by_virtual")]
    rows = [
        ("AB"[number], f"{columns[0][number]:,}", milliseconds(columns[1][number]), milliseconds(columns[2][number]))
        for number in (0, 1)
    ]
    return table(("process", "its work (rounds)", "charged by real time, ms", "charged by virtual time, ms"), rows)


def watched_timeline() -> Timeline:
    """Three domains with their clocks, turns of 1 ms, and a way forward and back."""
    return Timeline(machine(WATCHED, turn=MILLISECOND))


def clocks_image(name: str = "clocks") -> Image:
    """The guest ``clocks``, for `timeline.inputs.Boot`."""
    return image_from_source(guests.source("clocks"), name)


def virtual_ns(xen: Hypervisor, domid: int) -> int:
    """A domain's virtual time by the hypervisor's own account."""
    return to_ns(virtual_time(xen, xen.domains[domid].vcpus[0]))


__all__: list[Any] = [
    "MILLISECOND",
    "WATCHED",
    "Drift",
    "charges",
    "counter_reads",
    "drift",
    "drift_table",
    "events",
    "listing",
    "machine",
    "notes",
    "run",
    "torn_read",
    "two_processes_beside",
    "virtual_ns",
    "watched_timeline",
    "went_off",
    "word",
    "words",
]
