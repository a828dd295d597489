"""Snapshots: the machine at some moments of its past, cheap enough to keep many.

The problem: to go back one instruction one goes back to an earlier moment and runs forward
again.  The more moments are kept, the shorter that run; but memory is large, and few of its
pages change.

The invariant: a snapshot holds the content of every frame that is not zero, and frames that
did not change since the snapshot before it are the same ``bytes`` object.  Frames that are
free are zero (`hypervisor.frames`), so they are neither read nor kept, and memory that no
domain owns never becomes resident on the host.  What breaks without it: either the past is
wrong, or a run of a minute fills the host's memory.

Which moments are kept decides only how long a step back takes, never where it leads: the
engine's TLB is emptied at fixed times whether a snapshot is taken or not (`Timeline`).
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.frames import FREE
from xenlab.machine.memory import PAGE_SHIFT, PAGE_SIZE

Pages = dict[int, bytes]
_ZERO = bytes(PAGE_SIZE)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One moment.

    Attributes:
        time: when, in instructions.
        machine: everything but memory, from `Hypervisor.snapshot`.
        pages: the content of every frame that was not zero.
        events: how many events the trace held.
    """

    time: int
    machine: dict[str, Any]
    pages: Pages
    events: int


def take(hypervisor: Hypervisor, events: int, before: Pages) -> Snapshot:
    """The machine as it is now; what equals ``before`` is shared with it."""
    pages: Pages = {}
    memory = hypervisor.memory.bytes
    for mfn, owner in enumerate(hypervisor.frames.owner):
        if owner != FREE:
            start = mfn << PAGE_SHIFT
            data, old = bytes(memory[start : start + PAGE_SIZE]), before.get(mfn, _ZERO)
            if data == old:
                data = old
            if data is not _ZERO:
                pages[mfn] = data
    return Snapshot(hypervisor.now, hypervisor.snapshot(), pages, events)


def put_back(hypervisor: Hypervisor, snapshot: Snapshot) -> None:
    """Make the machine what it was; only pages that differ are written."""
    memory, pages = hypervisor.memory.bytes, snapshot.pages
    owned = {mfn for mfn, owner in enumerate(hypervisor.frames.owner) if owner != FREE}
    for mfn in sorted(owned | pages.keys()):
        start, data = mfn << PAGE_SHIFT, pages.get(mfn, _ZERO)
        if bytes(memory[start : start + PAGE_SIZE]) != data:
            memory[start : start + PAGE_SIZE] = data
            hypervisor.cpu.forget_code(start, start + PAGE_SIZE)
    hypervisor.restore(snapshot.machine)
    hypervisor.forget_caches()


class Snapshots:
    """The moments that are kept, in order; the first one always.

    Args:
        first: where the timeline begins.
        limit: how many are kept.
        memory_mib: how much memory their pages may take.
    """

    def __init__(self, first: Snapshot, limit: int, memory_mib: int) -> None:
        self._kept = [first]
        self._limit, self._page_limit = limit, memory_mib << 20 >> PAGE_SHIFT

    def __len__(self) -> int:
        return len(self._kept)

    def latest(self, time: int) -> Snapshot:
        """The last one at or before ``time``."""
        return self._kept[bisect_right(self._kept, time, key=lambda kept: kept.time) - 1]

    def add(self, snapshot: Snapshot) -> None:
        """Keep ``snapshot``; too many are thinned, the further from it the more."""
        self._kept.insert(bisect_right(self._kept, snapshot.time, key=lambda kept: kept.time), snapshot)
        while len(self._kept) > self._limit or (len(self._kept) > 2 and self._too_large()):
            del self._kept[self._least_useful(snapshot.time)]

    def drop_after(self, time: int) -> None:
        """Forget those behind ``time``."""
        self._kept = [kept for kept in self._kept if kept.time <= time]

    def _least_useful(self, near: int) -> int:
        """The one whose absence costs least: its gap is small beside its distance from ``near``."""
        kept = self._kept

        def cost(number: int) -> float:
            after = kept[number + 1].time if number + 1 < len(kept) else kept[number].time
            return (after - kept[number - 1].time) / (1 + abs(kept[number].time - near))

        return min((number for number in range(1, len(kept)) if kept[number].time != near), key=cost, default=1)

    def _too_large(self) -> bool:
        """Whether all of them together take more of the host's memory than they may."""
        if sum(len(kept.pages) for kept in self._kept) <= self._page_limit:
            return False  # not even if they shared nothing
        return len({id(data) for kept in self._kept for data in kept.pages.values()}) > self._page_limit
