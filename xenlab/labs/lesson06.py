"""Scenes of lesson 06: what the TLB holds, when it is emptied, and what more of that would cost (paper 2.1.1).

`record` runs guests and writes their accesses down; a `Run` can then be shown with a TLB of any size, and be replayed
with the hypervisor somewhere else.  `flushes_of` counts the flushes of one action.  All are runs of real guests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from xenlab.errors import XenlabError
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.tlb import FlushPolicy
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.labs.tlb_guests import ACTIONS, NEIGHBOUR, REMAP, action, caller, secret, thief, twins, walker
from xenlab.machine.machine import Machine
from xenlab.machine.memory import PAGE_SHIFT
from xenlab.machine.tlb import Tlb, TlbCost
from xenlab.timeline import Timeline
from xenlab.timeline.access_log import AccessLog, Flush, Touch, recorded
from xenlab.timeline.tlb_replay import DEFAULT_HYPERVISOR_PAGES, TlbReplay, both_spaces
from xenlab.toolstack import boot
from xenlab.views.picture import table
from xenlab.views.tlb import TlbView

_MACHINE_MIB, _ENOUGH = 8, 100_000


@dataclass(frozen=True, slots=True)
class Run:
    """Guests that have run, and every access that they made.

    Attributes:
        xen: the machine afterwards.
        log: the record.
    """

    xen: Hypervisor
    log: AccessLog

    def through(self, tlb: Tlb) -> Tlb:
        """``tlb`` after all of the run; the hypervisor at the top, without pages of its own."""
        return TlbReplay(self.log, tlb, hypervisor_pages=0).to_end()

    def view(self, tlb: Tlb | None = None, *, hypervisor_pages: int = 0, own_space: bool = False) -> TlbView:
        """The picture of a TLB, 64 entries in 4 ways if none is given, at the time at which the machine is."""
        replay = TlbReplay(self.log, tlb or Tlb(), hypervisor_pages=hypervisor_pages, own_space=own_space)
        return TlbView(self.xen, replay)


def record(*sources: str, instructions: int = _ENOUGH, before: int = 1, flush_policy: FlushPolicy | None = None) -> Run:
    """Run guests, each in a domain of its own, and record their accesses.

    Args:
        sources: assembly of each.
        instructions: for how long.
        before: how many instructions go by before recording begins; with the first of them the first guest is loaded.
        flush_policy: see `Hypervisor`.
    """
    xen = Hypervisor(Machine(_MACHINE_MIB), flush_policy=flush_policy, trace=Trace())
    for number, source in enumerate(sources):
        boot(xen, source, name=f"guest {number}")
    xen.run(before)
    with recorded(xen) as log:
        xen.run(instructions)
    return Run(xen, log)


def working_sets(counts: Iterable[int], make: Callable[[], Tlb], rounds: int = 10) -> str:
    """Hits and misses of `walker` with each number of pages, in a new TLB that ``make`` makes."""
    rows = []
    for pages in counts:
        tlb = record(walker(pages, rounds)).through(make())
        rows.append((str(pages), f"{tlb.hits:,}", f"{tlb.misses:,}", f"{tlb.misses / rounds:.1f}"))
    return table(("pages", "hits", "misses", "misses in each round"), rows)


def wrong_answers(run: Run, leave_out: Container[str], tlb: Tlb | None = None) -> list[Touch]:
    """The accesses that would have gone to another frame than the page tables say, had some flushes been left out.

    Args:
        run: what was recorded.
        leave_out: the reasons for which the TLB is not flushed.
        tlb: an empty one; 64 entries in 4 ways if not given.
    """
    tlb, wrong = tlb or Tlb(), []
    for entry in run.log.entries:
        if type(entry) is Touch:
            held = tlb.lookup(entry.page)
            if held is not None and held.frame != entry.frame:
                wrong.append(entry)
            tlb.access(entry.page, entry.frame, entry.flags)
        elif type(entry) is Flush and entry.reason not in leave_out:
            if entry.address:
                tlb.flush_page(entry.address >> PAGE_SHIFT, entry.reason)
            else:
                tlb.flush(entry.reason)
    return wrong


def remap_timeline() -> tuple[Timeline, Run]:
    """The guest `REMAP` at its first instruction, with a way forward and back, and the record of its run."""
    xen = Hypervisor(Machine(_MACHINE_MIB), trace=Trace())
    boot(xen, REMAP, name="remap")
    timeline = Timeline(xen)
    with recorded(xen) as log:
        timeline.run(200)
    timeline.seek(0)
    return timeline, Run(xen, log)


def run_to(timeline: Timeline, label: str) -> int:
    """Go from the start of ``timeline`` to where the first guest stands at ``label``; the time reached."""
    timeline.seek(timeline.start)
    _step_to(timeline.step, timeline.hypervisor.domains[0], label)
    return timeline.position


def _step_to(step: Callable[[], object], guest: Domain, label: str) -> None:
    state, address = guest.vcpus[0].state, guest.symbols[label]
    for _ in range(_ENOUGH):
        if state.eip == address:
            return
        if guest.ended:
            break
        step()
    raise XenlabError(f"the guest never came to {label!r}\n{guest.report}")


def cpu_keeps_stale_entries() -> bool:
    """Whether this machine's CPU has a TLB that outlives a trap: found by trying.

    The portable CPU, which is used where the faster one does not fit the emulator that is installed, has not.
    """
    xen = Hypervisor(Machine(_MACHINE_MIB))
    guest = boot(xen, REMAP, name="remap")
    xen.run(200)
    return guest.console == "aab"


@dataclass(frozen=True, slots=True)
class FlushCount:
    """What `flushes_of` counted, in all rounds together.

    Attributes:
        entered: how often the hypervisor was entered.
        reasons: flushes by reason.
    """

    entered: int
    reasons: Mapping[str, int]

    def __str__(self) -> str:
        flushes = ", ".join(f"{count} × {reason}" for reason, count in sorted(self.reasons.items()))
        return f"hypervisor entered {self.entered} ×, flushes: {flushes or 'none'}"


def flushes_of(body: str, *, rounds: int = 10, flush_policy: FlushPolicy | None = None) -> FlushCount:
    """Let a guest do ``body`` so often, beside another one that only yields, and count; see `action`."""
    xen = Hypervisor(Machine(_MACHINE_MIB), flush_policy=flush_policy, trace=Trace())
    guest = boot(xen, action(body, rounds), name="actor")
    boot(xen, NEIGHBOUR, name="neighbour")
    _step_to(lambda: xen.run(1), guest, "again")
    assert xen.trace is not None
    xen.trace.clear()
    _step_to(lambda: xen.run(1), guest, "done")
    events = xen.trace.events()
    entered = sum(event.kind in (Kind.TRAP, Kind.HYPERCALL) for event in events if event.domain == guest.domid)
    return FlushCount(entered, Counter(event.reason for event in events if event.kind is Kind.FLUSH))


def flush_table(actions: Mapping[str, str] | None = None, rounds: int = 10) -> str:
    """`flushes_of` for each action."""
    rows = []
    for name, body in (actions or ACTIONS).items():
        count = flushes_of(body, rounds=rounds)
        flushes = ", ".join(f"{number} × {reason}" for reason, number in sorted(count.reasons.items()))
        rows.append((name, str(count.entered), flushes or "none"))
    return table((f"the guest does this {rounds} times", "hypervisor entered", "TLB flushed"), rows)


def theft(flush_policy: FlushPolicy | None = None, text: str = "the plan") -> tuple[Hypervisor, Domain]:
    """The guest `thief` beside one with a secret, the page that it is after; both have run.

    Returns:
        The machine afterwards, and the thief; its console shows what it got.
    """
    xen = Hypervisor(Machine(_MACHINE_MIB), flush_policy=flush_policy, trace=Trace())
    victim = boot(xen, secret(text), name="victim")
    frame = victim.frames[(victim.symbols["secret"] - 0xC000_0000) >> PAGE_SHIFT]
    guest = boot(xen, thief(frame, len(text)), name="thief")
    xen.run(1_000)
    return xen, guest


def calls(pages: int, count: int = 100) -> Run:
    """Hypercalls, ``count`` of them, with so many pages used after each."""
    source, length = caller(pages, count)
    return record(source, instructions=length - 1)


def price_of_a_call(
    counts: Sequence[int], *, cost: TlbCost | None = None, hypervisor_pages: int = DEFAULT_HYPERVISOR_PAGES
) -> str:
    """What a hypercall of `calls` costs more with the hypervisor in a space of its own, for each number of pages."""
    cost, rows = cost or TlbCost(), []
    for pages in counts:
        log = calls(pages).log
        top, own = both_spaces(log, hypervisor_pages=hypervisor_pages)
        misses = [tlb.misses / log.traps() for tlb in (top, own)]
        more = (cost.total(own) - cost.total(top)) / log.traps()
        rows.append((str(pages), *(f"{number:.1f}" for number in misses), f"{more:,.0f}"))
    heads = ("pages in use", "misses a call: top 64 MB", "space of its own", "cycles more")
    return table(heads, rows)


__all__ = [
    "ACTIONS",
    "REMAP",
    "Run",
    "action",
    "calls",
    "cpu_keeps_stale_entries",
    "flush_table",
    "flushes_of",
    "price_of_a_call",
    "record",
    "remap_timeline",
    "run_to",
    "theft",
    "thief",
    "twins",
    "walker",
    "working_sets",
    "wrong_answers",
]
