"""A TLB as a model: the CPU's cache of translations, with a size, a policy and counters (paper 2.1.1).

The problem: what a flush costs is paid later, one miss at a time, and neither a CPU nor an emulator
says when.  The emulator has a TLB too, but of another size and out of sight.  This one is plain data and
is fed with the accesses of a real run (`accesses`).

Geometry: ``entries`` slots in sets of ``ways``; a page may stand in any way of the one set that the
low bits of its number select, so with as many ways as entries anywhere.  The default, 64 entries, is the
size that the paper's Xeons had for data.  One TLB serves data and instructions, and a large page is
held in pieces of 4 KiB.

Untagged: an entry does not say whose it is.  So a flush takes all of them but the global ones, and until
then an entry answers, whatever the page table says by now: a stale entry.

The invariant: a page stands in at most one slot, in its own set, and an entry changes only by being
thrown out.  What breaks without it: hits and misses that no machine would have.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

from xenlab.errors import MachineError
from xenlab.machine.paging import GLOBAL

# Why an entry had to be filled: the page was never here, a flush took it, or another page needed its place.
FIRST, FLUSHED, EVICTED = "first", "flushed", "evicted"
FILL_REASONS = (FIRST, FLUSHED, EVICTED)


class Policy(Enum):
    """Which way of a full set gives place."""

    LRU = "least recently used"
    ROUND_ROBIN = "round robin"


class TlbEntry(NamedTuple):
    """One translation.

    Attributes:
        page: linear page number, the address without its low 12 bits.
        frame: machine frame number.
        flags: the page-table entry's bits that are not the frame.
    """

    page: int
    frame: int
    flags: int

    @property
    def is_global(self) -> bool:
        """Whether it survives a new page-table base."""
        return bool(self.flags & GLOBAL)


class Tlb:
    """The model.

    Args:
        entries: how many translations it holds.
        ways: how many of them a set has; None for one set of all, fully associative.
        policy: which one of a full set gives place.

    Attributes:
        slots: the contents; way ``w`` of set ``s`` is at ``s * ways + w``.
        hits: accesses that found their page.
        fills: accesses that did not, by reason; each filled a slot.
        flushes: by reason, those of a single page too.
        page_flushes: how many of them were of a single page.

    Raises:
        MachineError: the ways do not divide the entries into a power of two of sets.
    """

    def __init__(self, entries: int = 64, ways: int | None = 4, policy: Policy = Policy.LRU) -> None:
        self.entries, self.ways, self.policy = entries, entries if ways is None else ways, policy
        self.sets = _sets(self.entries, self.ways)
        self.slots: list[TlbEntry | None] = [None] * entries
        self.hits = self.page_flushes = 0
        self.fills: Counter[str] = Counter()
        self.flushes: Counter[str] = Counter()
        self._place: dict[int, int] = {}
        self._lost: dict[int, str] = {}
        # When each slot was last used, and for each set whose turn it is to give place.
        self._used = [0] * entries
        self._turn = [0] * self.sets
        self._clock = 0

    @property
    def misses(self) -> int:
        """Accesses that did not find their page."""
        return self.fills.total()

    def access(self, page: int, frame: int, flags: int) -> bool:
        """Look ``page`` up; on a miss fill a slot with what the walk found.

        Args:
            page: linear page number.
            frame, flags: what the page tables say now; on a hit nobody asks them.

        Returns:
            Whether it was a hit.
        """
        self._clock += 1
        place = self._place.get(page)
        hit = place is not None
        if place is None:
            place = self._make_room(page % self.sets)
            self.fills[self._lost.pop(page, FIRST)] += 1
            self.slots[place] = TlbEntry(page, frame, flags)
            self._place[page] = place
        else:
            self.hits += 1
        self._used[place] = self._clock
        return hit

    def lookup(self, page: int) -> TlbEntry | None:
        """The entry for ``page``, if there is one; counts as no access."""
        place = self._place.get(page)
        return None if place is None else self.slots[place]

    def flush(self, reason: str, *, global_too: bool = False) -> None:
        """Throw out all entries, global ones only if told: what loading a page-table base does."""
        self.flushes[reason] += 1
        for entry in [entry for entry in self.slots if entry is not None]:
            if global_too or not entry.is_global:
                self._throw_out(entry.page, FLUSHED)

    def flush_page(self, page: int, reason: str) -> None:
        """Throw out one page, a global one too: what INVLPG does."""
        self.flushes[reason] += 1
        self.page_flushes += 1
        if page in self._place:
            self._throw_out(page, FLUSHED)

    def _make_room(self, chosen: int) -> int:
        """A free slot of a set."""
        places = range(chosen * self.ways, (chosen + 1) * self.ways)
        free = next((place for place in places if self.slots[place] is None), None)
        if free is not None:
            return free
        if self.policy is Policy.LRU:
            place = min(places, key=self._used.__getitem__)
        else:
            place = places[self._turn[chosen]]
            self._turn[chosen] = (self._turn[chosen] + 1) % self.ways
        entry = self.slots[place]
        assert entry is not None
        self._throw_out(entry.page, EVICTED)
        return place

    def _throw_out(self, page: int, reason: str) -> None:
        self.slots[self._place.pop(page)] = None
        self._lost[page] = reason

    def state(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {
            "geometry": (self.entries, self.ways, self.policy.value),
            "slots": [entry and tuple(entry) for entry in self.slots],
            "order": (list(self._used), list(self._turn), self._clock),
            "lost": dict(self._lost),
            "counts": (self.hits, self.page_flushes, dict(self.fills), dict(self.flushes)),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` of a TLB with the same geometry and policy gave."""
        geometry = (self.entries, self.ways, self.policy.value)
        if tuple(state["geometry"]) != geometry:
            raise MachineError(f"TLB: expected the state of one with {geometry}, found {state['geometry']}")
        self.slots = [entry and TlbEntry(*entry) for entry in state["slots"]]
        self._place = {entry.page: place for place, entry in enumerate(self.slots) if entry is not None}
        used, turn, self._clock = state["order"]
        self._used, self._turn, self._lost = list(used), list(turn), dict(state["lost"])
        self.hits, self.page_flushes, fills, flushes = state["counts"]
        self.fills, self.flushes = Counter(fills), Counter(flushes)


def _sets(entries: int, ways: int) -> int:
    sets, rest = divmod(entries, ways) if ways > 0 else (0, 0)
    if sets < 1 or rest or sets & sets - 1:
        raise MachineError(f"TLB: expected ways that divide {entries} entries into 1, 2, 4, 8 … sets, found {ways}")
    return sets


@dataclass(frozen=True, slots=True)
class TlbCost:
    """What a TLB's misses and flushes cost, in cycles.  Round figures of the time; put your own in their place.

    Attributes:
        levels: page tables that a miss reads.
        level_cycles: for each of them.
        flush_cycles: for loading the page-table base register.
        page_cycles: for flushing a single page.
    """

    levels: int = 2
    level_cycles: int = 25
    flush_cycles: int = 200
    page_cycles: int = 100

    def walks(self, tlb: Tlb) -> int:
        """Cycles spent in walking page tables."""
        return tlb.misses * self.levels * self.level_cycles

    def flushing(self, tlb: Tlb) -> int:
        """Cycles spent in flushing, without the misses that follow from it."""
        whole = tlb.flushes.total() - tlb.page_flushes
        return whole * self.flush_cycles + tlb.page_flushes * self.page_cycles

    def total(self, tlb: Tlb) -> int:
        """Both."""
        return self.walks(tlb) + self.flushing(tlb)


__all__ = ["EVICTED", "FILL_REASONS", "FIRST", "FLUSHED", "Policy", "Tlb", "TlbCost", "TlbEntry"]
