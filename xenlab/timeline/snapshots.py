"""Snapshots: the machine at some moments of its past, cheap enough to keep many.

The problem: to go back one instruction one goes back to an earlier moment and runs forward
again.  The more moments are kept, the shorter that run; but memory is large, and few of its
pages change.

The idea: a snapshot holds the pages that differ from the snapshot before it.  They are found by
comparison, on arrays over the machine's memory, since nothing tells who wrote where.  What memory held at a
moment is what the snapshots up to there say, the later one counting.  When a snapshot is dropped the next one takes
over its pages; when one comes between two others, the later one keeps saying what it has said.

The invariant: for each frame, the last snapshot that names it, up to any moment that is kept, holds what the frame
held then, and a frame that none names was zero.  Frames that are free are zero (`hypervisor.frames`), so they are
neither read nor kept, and memory that no domain owns never becomes resident on the host.  What breaks without it:
either the past is wrong, or a run of a minute fills the host's memory.

Which moments are kept decides only how long a step back takes, never where it leads: the
engine's TLB is emptied at fixed times whether a snapshot is taken or not (`Timeline`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.frames import FREE
from xenlab.machine.memory import PAGE_SHIFT, PAGE_SIZE
from xenlab.timeline.sharing import own_bytes, pack, unpack

Pages = dict[int, bytes]
_ZERO = bytes(PAGE_SIZE)
_WORDS = PAGE_SIZE // 8
# Frames that are compared at once: few enough to stay in the host's cache.
_AT_ONCE = 64
# Within so many seconds of work, all parts of the past are equally near.
_NEAR_S = 10.0


@dataclass(slots=True, eq=False)
class Snapshot:
    """One moment.

    Attributes:
        time: when, in instructions.
        events: how many events the trace held.
        work: seconds that the host took to come here from the start of the timeline, about.
        machine: everything but memory, from `Hypervisor.snapshot`, packed.
        changed: the content of each frame that is not what it was at the snapshot before; zeros for one that was freed.
        own_bytes: what ``machine`` takes of the host's memory, besides what it shares.
    """

    time: int
    events: int
    work: float
    machine: dict[str, Any]
    changed: Pages
    own_bytes: int

    @property
    def size(self) -> int:
        """How much of the host's memory it takes, in bytes, about."""
        return len(self.changed) * PAGE_SIZE + self.own_bytes


class Snapshots:
    """The moments that are kept, in order; the first one always.

    Args:
        hypervisor: the machine; it is now where the timeline begins.
        events: how many events its trace holds.
        limit: how many moments are kept, 2 or more.
        memory_mib: how much of the host's memory they may take.

    Attributes:
        cost: seconds that it takes to take one.
        taken: how many were.
    """

    def __init__(self, hypervisor: Hypervisor, events: int, limit: int, memory_mib: int) -> None:
        self._xen, self._limit, self._bytes = hypervisor, limit, memory_mib << 20
        self.cost, self.taken = 0.0, 0
        # What memory held at one of them, put together.
        self._pages: Pages = {}
        self._pages_of: Snapshot | None = None
        self._kept: list[Snapshot] = []
        self.take(events, 0.0)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def size(self) -> int:
        """How much of the host's memory they take, in bytes."""
        return sum(kept.size for kept in self._kept)

    def times(self) -> list[int]:
        """When they are."""
        return [kept.time for kept in self._kept]

    def latest(self, time: int) -> Snapshot:
        """The last one at or before ``time``."""
        return self._kept[self._place(time) - 1]

    def _place(self, time: int) -> int:
        return bisect_right(self._kept, time, key=lambda kept: kept.time)

    def take(self, events: int, work: float) -> None:
        """Keep this moment; too many are thinned, the further from it the more."""
        started, xen = perf_counter(), self._xen
        place = self._place(xen.now)
        before = self._kept[place - 1] if place else None
        known = before.machine if before else {}
        machine, pages = pack(xen.snapshot(), known), self._contents(before)
        changed = {mfn: _page(xen, mfn) for mfn in _differing(xen, pages)}
        new = Snapshot(xen.now, events, work, machine, changed, own_bytes(machine, known))
        if place < len(self._kept):
            self._insert_before(self._kept[place], changed, pages)
        self._kept.insert(place, new)
        self._now_at(new, changed)
        self._thin(new)
        spent = perf_counter() - started
        self.taken, self.cost = self.taken + 1, (self.cost + spent) / 2 if self.taken else spent

    @staticmethod
    def _insert_before(after: Snapshot, changed: Pages, pages: Pages) -> None:
        """``after`` no longer follows the moment that ``pages`` is of: it has to say what is as it was then."""
        for mfn in changed.keys() - after.changed.keys():
            after.changed[mfn] = pages.get(mfn, _ZERO)

    def _now_at(self, new: Snapshot, changed: Pages) -> None:
        for mfn, page in changed.items():
            _set(self._pages, mfn, page)
        self._pages_of = new

    def _contents(self, snapshot: Snapshot | None) -> Pages:
        """What memory held at ``snapshot``, by frame, without those of zeros."""
        if snapshot is not self._pages_of:
            self._pages, self._pages_of = {}, snapshot
            for kept in self._kept:
                for mfn, page in kept.changed.items():
                    _set(self._pages, mfn, page)
                if kept is snapshot:
                    break
        return self._pages

    def put_back(self, snapshot: Snapshot) -> None:
        """Make the machine what it was; only pages that differ are written."""
        xen, pages = self._xen, self._contents(snapshot)
        for mfn in _differing(xen, pages):
            xen.memory.frame(mfn)[:] = pages.get(mfn, _ZERO)
            xen.cpu.forget_code(mfn << PAGE_SHIFT, mfn + 1 << PAGE_SHIFT)
        xen.restore(unpack(snapshot.machine))
        xen.forget_caches()

    def drop_after(self, time: int) -> None:
        """Forget those behind ``time``."""
        del self._kept[self._place(time) :]
        if self._pages_of not in self._kept:
            self._pages_of = None

    def _thin(self, new: Snapshot) -> None:
        size = self.size
        while len(self._kept) > self._limit or (len(self._kept) > 2 and size > self._bytes):
            size -= self._drop(self._least_useful(new))

    def _drop(self, place: int) -> int:
        """Forget the one at ``place``; how many bytes that has freed."""
        gone = self._kept.pop(place)
        if gone is self._pages_of:
            self._pages_of = None
        before = gone.size
        if place < len(self._kept):
            after = self._kept[place]
            before += after.size
            after.changed = gone.changed | after.changed
            after.own_bytes = own_bytes(after.machine, self._kept[place - 1].machine)
            before -= after.size
        return before

    def _least_useful(self, new: Snapshot) -> int:
        """The one whose absence costs least: the gap it leaves is small beside its distance from ``new``."""
        kept = self._kept

        def cost(number: int) -> float:
            after = kept[min(number + 1, len(kept) - 1)]
            return (after.work - kept[number - 1].work) / (_NEAR_S + abs(kept[number].work - new.work))

        return min((number for number in range(1, len(kept)) if kept[number] is not new), key=cost, default=1)


def _page(hypervisor: Hypervisor, mfn: int) -> bytes:
    page = bytes(hypervisor.memory.frame(mfn))
    return _ZERO if page == _ZERO else page


def _set(pages: Pages, mfn: int, page: bytes) -> None:
    if page is _ZERO:
        pages.pop(mfn, None)
    else:
        pages[mfn] = page


def _differing(hypervisor: Hypervisor, pages: Pages) -> Iterator[int]:
    """The frames that do not hold what ``pages`` says."""
    import numpy as np

    held = np.frombuffer(hypervisor.frames.owner, np.int32) != FREE
    held[list(pages)] = True
    mfns = np.flatnonzero(held)
    memory = np.frombuffer(hypervisor.memory.bytes, np.uint64).reshape(-1, _WORDS)
    for start in range(0, len(mfns), _AT_ONCE):
        some = mfns[start : start + _AT_ONCE]
        expected = b"".join([pages.get(mfn, _ZERO) for mfn in some.tolist()])
        differs = memory[some] != np.frombuffer(expected, np.uint64).reshape(-1, _WORDS)
        if differs.any():
            yield from some[differs.any(axis=1)].tolist()
