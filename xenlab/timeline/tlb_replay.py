"""A recorded run through a TLB, with the hypervisor in one place or in another (paper 2.1.1).

The problem: Xen sits in the top 64 MB of every address space.  What that saves is what it would cost to have
it elsewhere, so the same run is replayed twice:

    top of every address space     nothing happens on the way into the hypervisor and out of it
    address space of its own       a new page-table base on the way in and another on the way out, each a flush;
                                   hypervisor and guest find nothing of their own in the TLB

xenlab's hypervisor is Python and has no pages in the machine for its code, its stack and its tables, so a replay
puts them in: each time the hypervisor is entered it touches ``hypervisor_pages``.  The number is an assumption; the
guest's accesses, and the copies to and from its memory, are those of the run.

The invariant: the state at a time is what the entries of the log up to that time make of an empty TLB, whatever
was shown before.  What breaks without it: a step back shows a TLB that never was.
"""

from __future__ import annotations

from typing import Any

from xenlab.errors import TimelineError
from xenlab.machine.accesses import UNKNOWN
from xenlab.machine.memory import PAGE_SHIFT
from xenlab.machine.paging import GLOBAL, PRESENT, RW
from xenlab.machine.tlb import Policy, Tlb
from xenlab.timeline.access_log import AccessLog, Enter, Entry, Flush, Leave, Touch

DEFAULT_HYPERVISOR_PAGES = 4
# Where they lie: behind the machine-to-physical list, where guests have nothing and see nothing.
HYPERVISOR_PAGE = 0xFC40_0000 >> PAGE_SHIFT
MAX_HYPERVISOR_PAGES = 1024
ENTRY, EXIT = "way in", "way out"
_CHECKPOINT = 4096


class TlbReplay:
    """Feeds a log to a TLB, up to any time.

    Args:
        log: what `recorded` gave.
        tlb: an empty one.
        own_space: whether the hypervisor has an address space of its own.
        hypervisor_pages: how many pages it touches each time that it is entered.
        hypervisor_global: whether these survive a new page-table base, which they can at the top only.

    Attributes:
        time: how far it has come.
        causes: for each page that is in the TLB, the access that brought it there; none for the hypervisor's own.

    Raises:
        TimelineError: ``hypervisor_pages`` is not from 0 to 1024.
    """

    def __init__(
        self,
        log: AccessLog,
        tlb: Tlb,
        *,
        own_space: bool = False,
        hypervisor_pages: int = DEFAULT_HYPERVISOR_PAGES,
        hypervisor_global: bool = False,
    ) -> None:
        if not 0 <= hypervisor_pages <= MAX_HYPERVISOR_PAGES:
            expected = f"expected 0 to {MAX_HYPERVISOR_PAGES} pages of the hypervisor's"
            raise TimelineError(f"replay: {expected}, found {hypervisor_pages}")
        self.log, self.tlb, self.own_space = log, tlb, own_space
        self._pages = range(HYPERVISOR_PAGE, HYPERVISOR_PAGE + hypervisor_pages)
        self._flags = PRESENT | RW | (GLOBAL if hypervisor_global and not own_space else 0)
        self.time = log.start
        self.causes: dict[int, Touch] = {}
        self._done, self._because = 0, EXIT
        self._checkpoints: list[tuple[int, dict[str, Any], dict[int, Touch]]] = [(0, tlb.state(), {})]

    def to(self, time: int) -> Tlb:
        """Be at ``time``, earlier or later; the TLB as it was then."""
        if time < self.time:
            self._back(time)
        entries = self.log.entries
        while self._done < len(entries) and entries[self._done].time <= time:
            self._feed(entries[self._done])
            self._done += 1
            # Not inside the hypervisor, where there is more to remember.
            if self._done - self._checkpoints[-1][0] >= _CHECKPOINT and type(entries[self._done - 1]) is Leave:
                self._checkpoints.append((self._done, self.tlb.state(), dict(self.causes)))
        self.time = time
        return self.tlb

    def to_end(self) -> Tlb:
        """Feed all that was recorded."""
        return self.to(max(self.time, self.log.end))

    def _back(self, time: int) -> None:
        entries = self.log.entries
        good = [point for point in self._checkpoints if not point[0] or entries[point[0] - 1].time <= time]
        self._done, state, causes = good[-1]
        self.tlb.load(state)
        self.causes = dict(causes)

    def _feed(self, entry: Entry) -> None:
        match entry:
            case Touch():
                if not self.tlb.access(entry.page, entry.frame, entry.flags):
                    self.causes[entry.page] = entry
            case Enter():
                self._enter()
            case Flush():
                self._flush(entry)
            case Leave():
                if self.own_space:
                    self.tlb.flush(self._because, global_too=True)
                    self._because = EXIT

    def _enter(self) -> None:
        if self.own_space:
            self.tlb.flush(ENTRY, global_too=True)
        for page in self._pages:
            self.tlb.access(page, UNKNOWN, self._flags)

    def _flush(self, entry: Flush) -> None:
        if self.own_space:
            # The way out empties the TLB anyhow.
            self._because = entry.reason
        elif entry.address:
            self.tlb.flush_page(entry.address >> PAGE_SHIFT, entry.reason)
        else:
            self.tlb.flush(entry.reason)


def both_spaces(
    log: AccessLog,
    *,
    entries: int = 64,
    ways: int | None = 4,
    policy: Policy = Policy.LRU,
    hypervisor_pages: int = DEFAULT_HYPERVISOR_PAGES,
) -> tuple[Tlb, Tlb]:
    """The whole run through two equal TLBs: the hypervisor at the top of every address space, and in one of its own."""
    top, own = (
        TlbReplay(log, Tlb(entries, ways, policy), own_space=own_space, hypervisor_pages=hypervisor_pages).to_end()
        for own_space in (False, True)
    )
    return top, own


__all__ = ["DEFAULT_HYPERVISOR_PAGES", "ENTRY", "EXIT", "HYPERVISOR_PAGE", "TlbReplay", "both_spaces"]
