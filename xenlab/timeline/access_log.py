"""The accesses of a run, recorded once and replayed through any number of TLBs (paper 2.1.1).

The problem: would another TLB, or a hypervisor somewhere else, have cost more?  Two runs are hard to
compare; one run whose accesses are written down is not.

What is recorded: each access of guest code; each copy that the hypervisor makes from or to a guest's memory;
when it was entered and left; and each flush of the TLB with its reason.  With an access stands what the page
tables said at that moment, since a TLB asks them only when it has to.

The invariant: recording changes nothing; trace and machine are those of the run without it.  What breaks
without it: the figures are those of another run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import Vcpu
from xenlab.hypervisor.tlb import SWITCH
from xenlab.machine.accesses import UNKNOWN, AccessKind, AccessWatch, accesses
from xenlab.machine.memory import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from xenlab.machine.paging import ACCESSED, DIRTY, READ, PageFault, walk

# In place of the address of an instruction: the hypervisor did it.
BY_HYPERVISOR = -1
# In place of a vector: no instruction trapped; a slice has ended, or a single step.
NO_TRAP = -1
# A flush for which the hypervisor gave no reason.
UNNAMED = "other"


class Touch(NamedTuple):
    """An access to one page.

    Attributes:
        time: instructions begun.
        page: linear page number.
        frame, flags: what the page tables said.
        kind: read, write or fetch.
        eip: the instruction, or `BY_HYPERVISOR`.
        stale: whether the CPU itself went to another frame, by a translation that was no longer in the tables.
    """

    time: int
    page: int
    frame: int
    flags: int
    kind: AccessKind
    eip: int
    stale: bool


class Enter(NamedTuple):
    """The hypervisor was entered, by a trap with this vector or for another reason (`NO_TRAP`)."""

    time: int
    vector: int


class Leave(NamedTuple):
    """Guest code goes on."""

    time: int


class Flush(NamedTuple):
    """The TLB was emptied, or of one page if ``address`` is not 0."""

    time: int
    reason: str
    address: int


Entry = Touch | Enter | Leave | Flush


@dataclass(slots=True)
class AccessLog:
    """What `recorded` gives.

    Attributes:
        entries: in the order in which things happened.
        start, end: the times at which recording began and ended.
        unexplained: accesses that could not be traced back to a linear address, see `AccessWatch`.
    """

    start: int
    end: int = 0
    entries: list[Entry] = field(default_factory=list)
    unexplained: int = 0

    def traps(self) -> int:
        """How often the hypervisor was entered."""
        return sum(type(entry) is Enter for entry in self.entries)

    def stale(self) -> list[Touch]:
        """The accesses that the CPU made by a translation that was no longer in the page tables."""
        return [entry for entry in self.entries if type(entry) is Touch and entry.stale]


class _Recorder:
    """Stands between the CPU and the hypervisor while a run is recorded."""

    def __init__(self, xen: Hypervisor, log: AccessLog) -> None:
        self._xen, self._log, self._add = xen, log, log.entries.append
        self.watch: AccessWatch
        self._flushes = xen.cpu.flushes
        self._inside = self._copying = False
        self._flush, self._load = xen.tlb.flush, xen.cpu.load
        self._waiting: list[tuple[str, int]] = []
        self.handler = xen.cpu.handler
        # What pages lead to by the tables, which change in the hypervisor only.
        self._found: dict[int, tuple[int, int] | None] = {}

    def seen(self, kind: AccessKind, address: int, size: int, machine: int) -> None:
        """Guest code made an access."""
        time, eip = self.watch.time, self.watch.eip
        self._notice_flushes(time)
        for at in _pages(address, size):
            page, used = at >> PAGE_SHIFT, machine >> PAGE_SHIFT if machine != UNKNOWN and at == address else UNKNOWN
            found = self._find(page)
            # A page that is gone from the tables, and still used.
            frame, flags = found or (used, 0)
            if frame != UNKNOWN:
                self._add(Touch(time, page, frame, flags, kind, eip, used not in (UNKNOWN, frame) or found is None))

    def copy(self, name: str) -> Callable[..., Any]:
        """What stands in front of the method ``name`` of `GuestMemory`."""
        plain, access = getattr(self._xen.guest_memory, name), _COPIES[name]

        def method(vcpu: Vcpu, address: int, *what: Any) -> Any:
            # Outside a trap nothing is done for a guest, and some copies do their work by another.
            if not self._inside or self._copying:
                return plain(vcpu, address, *what)
            self._copying = True
            try:
                self._copied(address, *access(*what))
                return plain(vcpu, address, *what)
            finally:
                self._copying = False

        return method

    def _copied(self, address: int, kind: AccessKind, size: int) -> None:
        for at in _pages(address, size):
            found = self._find(at >> PAGE_SHIFT)
            if found is not None:
                self._add(Touch(self._xen.now, at >> PAGE_SHIFT, *found, kind, BY_HYPERVISOR, False))

    def trap(self, vector: int, error: int, address: int) -> None:
        """In place of the hypervisor's own handler."""
        self._notice_flushes(self._xen.now)
        self._add(Enter(self._xen.now, vector))
        self._inside = True
        try:
            self.handler(vector, error, address)
        finally:
            self._inside = False
            self._add_flushes(self._xen.now)
            self._add(Leave(self._xen.now))

    def flush(self, reason: str, address: int = 0) -> None:
        """In front of the hypervisor's `Tlb.flush`."""
        self._flush(reason, address)
        self._flushed(reason, address)

    def load(self, state: Any) -> None:
        """In front of the CPU's `load`, by which another vCPU is made to run."""
        self._load(state)
        self._flushed(SWITCH, 0)

    def _flushed(self, reason: str, address: int) -> None:
        self._waiting.append((reason, address))
        if self._inside:
            self._add_flushes(self._xen.now)

    def _notice_flushes(self, time: int) -> None:
        """Flushes between two traps.  They are seen when the run goes on."""
        if self._flushes != self._xen.cpu.flushes:
            self._add(Enter(time, NO_TRAP))
            self._add_flushes(time)
            self._add(Leave(time))

    def _add_flushes(self, time: int) -> None:
        unnamed = self._xen.cpu.flushes - self._flushes - len(self._waiting)
        self._flushes = self._xen.cpu.flushes
        for reason, address in [*self._waiting, *[(UNNAMED, 0)] * unnamed]:
            self._add(Flush(time, reason, address))
        self._waiting.clear()
        self._found.clear()

    def _find(self, page: int) -> tuple[int, int] | None:
        if page not in self._found:
            state = self._xen.cpu.state
            found = walk(self._xen.memory, state.mode, state.cr3, page << PAGE_SHIFT, READ, update=False)
            if isinstance(found, PageFault):
                self._found[page] = None
            else:
                flags = found.entry & ~(state.mode.frame_mask | ACCESSED | DIRTY)
                self._found[page] = found.machine >> PAGE_SHIFT, flags
        return self._found[page]


@contextmanager
def recorded(xen: Hypervisor) -> Iterator[AccessLog]:
    """Record what ``xen`` does within this context, which must begin and end between runs.

    A run is many times slower meanwhile, and does the same.
    """
    log = AccessLog(xen.now)
    recorder = _Recorder(xen, log)
    xen.cpu.handler = recorder.trap
    try:
        with (
            in_front_of(xen.guest_memory, {name: recorder.copy(name) for name in _COPIES}),
            in_front_of(xen.tlb, {"flush": recorder.flush}),
            in_front_of(xen.cpu, {"load": recorder.load}),
            accesses(xen.cpu, xen.memory, recorder.seen) as recorder.watch,
        ):
            yield log
    finally:
        xen.cpu.handler = recorder.handler
        log.end, log.unexplained = xen.now, recorder.watch.unexplained


@contextmanager
def in_front_of(part: object, methods: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Let ``methods`` stand in front of those of this one object, so that a run that is not recorded pays nothing."""
    for name, method in methods.items():
        setattr(part, name, method)
    try:
        yield
    finally:
        for name in methods:
            delattr(part, name)


# The copies of `GuestMemory`: what they do to how many bytes, by what follows the address.
_COPIES: dict[str, Callable[..., tuple[AccessKind, int]]] = {
    "read": lambda length, *_: (AccessKind.READ, length),
    "read_words": lambda count: (AccessKind.READ, 4 * count),
    "write": lambda data: (AccessKind.WRITE, len(data)),
    "write_words": lambda words: (AccessKind.WRITE, 4 * len(words)),
    "machine_address": lambda length, write: (AccessKind.WRITE if write else AccessKind.READ, length),
}


def _pages(address: int, size: int) -> Iterator[int]:
    """``address``, and the start of each further page up to ``size`` bytes on."""
    end = address + max(size, 1)
    yield address
    yield from (at & 0xFFFF_FFFF for at in range((address & PAGE_MASK) + PAGE_SIZE, end, PAGE_SIZE))


__all__ = [
    "BY_HYPERVISOR",
    "NO_TRAP",
    "UNNAMED",
    "AccessLog",
    "Enter",
    "Entry",
    "Flush",
    "Leave",
    "Touch",
    "in_front_of",
    "recorded",
]
