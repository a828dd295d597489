"""Scenes of lesson 13: memory that leaves a guest and comes back, and who gets it when it is short (paper 3.3.4).

All of them run the guest ``balloon``: a kernel with a page allocator, a workload whose needs stand on its command line,
and a balloon driver.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from xenlab import guests
from xenlab.abi.structures import StartInfo
from xenlab.errors import XenlabError
from xenlab.hypervisor.core import Hypervisor, Stop
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.frames import FREE, NO_PFN
from xenlab.hypervisor.trace import HAS, TARGET, Kind, Trace
from xenlab.machine.machine import Machine
from xenlab.machine.memory import PAGE_SHIFT, PAGE_SIZE
from xenlab.timeline import Timeline
from xenlab.toolstack import boot
from xenlab.toolstack.balloon import Balance, BalloonPolicy, SetMaximum, SetMinimum, SetTarget, read_store
from xenlab.toolstack.image import SOURCE_BASE
from xenlab.views.picture import table
from xenlab.views.story import hypercall_name

MACHINE_MIB = 4
AWAY = 0xFFFF_FFFF
# Three guests whose needs change, and hardly ever at the same time.
PLANS = {"web": "8: 30x60, 400x70", "mail": "8: 400x60, 30x90", "build": "8: 60x30, 350x60, 120x40"}
# Two that never have enough, beside one that was built with far more than it uses.
UNEVEN = {"web": "8: 400x9999", "mail": "8: 400x9999", "idle": "2: 20x9999"}
LEAST, MOST = 60, 440
_KIB_PER_PAGE = 4
_ENOUGH = 20_000_000


def machine(plans: Iterable[str] = ("",), *, names: Sequence[str] = (), most: int | None = None) -> Hypervisor:
    """Guests of 1 MiB each on a machine of 4 MiB, with their plans, at their first instruction.

    Args:
        plans: their command lines; an empty one is a guest without work.
        names: for people.
        most: how many pages each may have; what it was built with, if not given.
    """
    xen = Hypervisor(Machine(MACHINE_MIB), trace=Trace())
    for number, plan in enumerate(plans):
        name = names[number] if number < len(names) else f"guest {number}"
        domain = boot(xen, guests.source("balloon"), name=name, command_line=plan)
        if most is not None:
            xen.submit(SetMaximum(domain.domid, most))
            xen.submit(SetMinimum(domain.domid, LEAST))
    xen.run(1)
    return xen


def settle(xen: Hypervisor) -> None:
    """Run until all guests sleep.

    Raises:
        XenlabError: one of them goes on and on.
    """
    if xen.run(_ENOUGH).stop is not Stop.IDLE:
        raise XenlabError(f"expected all guests to sleep by now; after {xen.now:,} instructions one still runs")


def set_target(xen: Hypervisor, domid: int, pages: int) -> int:
    """Tell a guest without work its target, wait until it has done what it can, and see how many pages it has."""
    xen.submit(SetTarget(domid, pages))
    settle(xen)
    return xen.domains[domid].pages


def word(xen: Hypervisor, domain: Domain, label: str) -> int:
    """A word of the guest's own data, by its label in the source."""
    return xen.guest_memory.read_word(domain.vcpus[0], domain.symbols[label])


def p2m(xen: Hypervisor, domain: Domain, pfn: int) -> int:
    """The machine frame of one of the guest's pages by the guest's own list; `AWAY` for a page without one."""
    return xen.guest_memory.read_word(domain.vcpus[0], word(xen, domain, "p2m") + 4 * pfn)


def lists(xen: Hypervisor, domain: Domain, pfns: Iterable[int]) -> str:
    """For some of the guest's pages: its own list, what the hypervisor's list says of that frame, and whose it is."""
    rows = []
    for pfn in pfns:
        mfn = p2m(xen, domain, pfn)
        back = "" if mfn == AWAY else f"{xen.frames.m2p[mfn]:#x}"
        rows.append((f"{pfn:#x}", "away" if mfn == AWAY else f"{mfn:#x}", back, _owner(xen, mfn)))
    return table(("page (pfn)", "P2M: its frame", "M2P of that frame", "the frame's owner"), rows)


def frames(xen: Hypervisor, mfns: Iterable[int]) -> str:
    """For some frames: the hypervisor's list, the owner, and how many of its bytes are not zero."""
    rows = []
    for mfn in mfns:
        pfn = xen.frames.m2p[mfn]
        used = sum(byte != 0 for byte in xen.memory.frame(mfn))
        rows.append((f"{mfn:#x}", "no page" if pfn == NO_PFN else f"{pfn:#x}", _owner(xen, mfn), str(used)))
    return table(("frame (mfn)", "M2P: its page", "owner", "bytes that are not 0"), rows)


def _owner(xen: Hypervisor, mfn: int) -> str:
    owner = xen.frames.owner_of(mfn) if mfn != AWAY else None
    return "" if owner is None else "free" if owner == FREE else f"domain {owner}" if owner >= 0 else "hypervisor"


def calls_since(xen: Hypervisor, time: int) -> str:
    """How often each hypercall was made since ``time``."""
    assert xen.trace is not None
    events = [event for event in xen.trace.events(Kind.HYPERCALL) if event.time > time]
    counts = Counter(hypercall_name(event.number) for event in events)
    return table(("hypercall", "times"), [(name, str(count)) for name, count in counts.most_common()])


def listing(first: str, behind: str) -> str:
    """The guest's source from the label ``first`` up to the label ``behind``."""
    lines = guests.source("balloon").splitlines()
    start, end = (next(at for at, line in enumerate(lines) if line.startswith(f"{name}:")) for name in (first, behind))
    return "\n".join(lines[start:end]).rstrip()


def driver_timeline() -> Timeline:
    """A guest without work that has slept since its start, with a way forward and back."""
    xen = machine()
    settle(xen)
    return Timeline(xen)


@dataclass(frozen=True, slots=True)
class Lowest:
    """A guest that gave back all that it could.

    Attributes:
        pages: before and after.
        left: what the remaining pages are for, and how many.
        xen: the machine, with the guest asleep.
    """

    pages: tuple[int, int]
    left: tuple[tuple[str, int], ...]
    xen: Hypervisor

    @property
    def kib(self) -> tuple[int, int]:
        """The same in KiB."""
        return self.pages[0] * _KIB_PER_PAGE, self.pages[1] * _KIB_PER_PAGE

    def __str__(self) -> str:
        rows = [(what, str(pages), str(pages * _KIB_PER_PAGE)) for what, pages in self.left]
        rows.append(("together", str(self.pages[1]), str(self.kib[1])))
        return table(("what is left", "pages", "KiB"), rows)


def lowest(memory_mib: int) -> Lowest:
    """Ask a guest of so many MiB, without work, for everything."""
    xen = Hypervisor(Machine(memory_mib + 2))
    domain = boot(xen, guests.source("balloon"), name="balloon", memory_mib=memory_mib)
    at = domain.vcpus[0].state.esi
    info = StartInfo.from_buffer_copy(xen.guest_memory.read(domain.vcpus[0], at, ctypes.sizeof(StartInfo)))
    xen.submit(SetTarget(domain.domid, 1))
    settle(xen)
    return Lowest((info.nr_pages, domain.pages), tuple(_what_is_left(xen, domain, info).items()), xen)


def _what_is_left(xen: Hypervisor, domain: Domain, info: StartInfo) -> dict[str, int]:
    known = {
        "the kernel, with the hypercall page": info.mfn_list - SOURCE_BASE >> PAGE_SHIFT,
        "its list of frames": -(-4 * info.nr_pages // PAGE_SIZE),
        "page tables": info.nr_pt_frames,
        "stack": 1,
        "free, kept back by the driver": word(xen, domain, "free"),
    }
    return {**known, "start_info and pages shared with the tools": domain.pages - sum(known.values())}


def stubborn() -> str:
    """The source of the guest with a driver that looks at no target: it always asks for more."""
    return guests.source("balloon").replace("decide: ", "decide: mov eax, BATCH\n        ret\nobeys:  ", 1)


def short_of_memory(most: int = 100) -> tuple[Hypervisor, Domain]:
    """A guest that may not have as many pages as its workload wants; it has run into that."""
    xen = machine(["4: 20x10, 150x9999"])
    domain = xen.domains[0]
    for item in (SetMaximum(domain.domid, most), SetTarget(domain.domid, most)):
        xen.submit(item)
    xen.run(120_000)
    return xen, domain


def pressure_timeline(policy: BalloonPolicy | None = None, *, interval: int = 5_000) -> Timeline:
    """Three guests whose needs change, and a policy that looks after them."""
    xen = machine(PLANS.values(), names=tuple(PLANS), most=MOST)
    timeline = Timeline(xen)
    timeline.submit(Balance(policy, interval) if policy else Balance(interval=interval))
    return timeline


def uneven(policy: BalloonPolicy | None = None, *, instructions: int = 300_000) -> Hypervisor:
    """Two guests that want more than they were built with, and an idle one; they have run, with a policy or without."""
    xen = machine(UNEVEN.values(), names=tuple(UNEVEN), most=MOST)
    if policy is not None:
        xen.submit(Balance(policy, 5_000))
    xen.run(instructions)
    return xen


def shortages(xen: Hypervisor) -> str:
    """What each guest has now, and how often its allocator had nothing to give."""
    rows = [
        (domain.name, str(domain.pages), str(read_store(xen, domain).need), str(read_store(xen, domain).failed))
        for _domid, domain in sorted(xen.domains.items())
    ]
    rows.append(("nobody", str(xen.frames.free_frames), "", ""))
    return table(("guest", "pages", "needs", "failed allocations"), rows)


def delays(xen: Hypervisor, most: int = 8) -> str:
    """The largest changes that were asked for, and how long it took until the guest had what it was told."""
    assert xen.trace is not None
    events = xen.trace.events(Kind.MEMORY)
    rows: list[tuple[int, int, tuple[str, ...]]] = []
    has: dict[int, int] = {}
    for number, event in enumerate(events):
        if event.what == HAS:
            has[event.domain] = event.pages
        elif event.what == TARGET:
            later = [after for after in events[number + 1 :] if after.domain == event.domain]
            end = next((after for after in later if after.what == TARGET or after.pages == event.pages), None)
            took = f"{end.time - event.time:,}" if end is not None and end.what == HAS else "told otherwise before"
            before = has[event.domain]
            line = (f"{event.time:,}", xen.domains[event.domain].name, f"{before} → {event.pages}", took)
            rows.append((abs(event.pages - before), event.time, line))
    largest = sorted(sorted(rows, key=lambda row: -row[0])[:most], key=lambda row: row[1])
    return table(("told at", "guest", "pages", "instructions until it had them"), [line for *_key, line in largest])


def failed(xen: Hypervisor) -> int:
    """Failed allocations of all guests together."""
    return sum(read_store(xen, domain).failed for domain in xen.domains.values())
