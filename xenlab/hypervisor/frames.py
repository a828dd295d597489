"""The frame table: who owns each machine frame, what it is used as, and how often (paper 3.3.3, 3.3.4).

The problem: memory is divided between domains and the hypervisor, in frames of 4 KiB.  A frame that
changes hands must carry nothing from its old owner to its new one, and a frame that is a page table
must not be a page of data at the same time.  So each frame has a row in a table:

    owner    a domain's id, `XEN`, `FREE` or `ORPHAN`
    type     what it may be used as now, one at a time: a page table of one level, descriptors, writable data
    uses     how many uses of that type there are; only at 0 may the type change
    refs     how many references there are of any kind: owning it, mapping it, naming it in a table
    flags    `OWNED` (its owner has not given it up), `PINNED`, `VALIDATED`

Types and counts are kept by `page_types`; owners and free frames are kept here.

The invariant: every frame has exactly one owner or is free; a free frame has no type, no
reference and only zeros in it.  What breaks without it: a new domain reads what an old one left behind.

Machine addresses are not hidden from guests, only checked.  What a guest sees of this table is the
machine-to-physical list: for each frame the number that its owner knows it by.  It lies in machine
memory and is mapped read-only into every address space.

Frames are dealt out scattered, in an order that is the same on every run, so that a guest
that confuses pseudo-physical with machine addresses fails at once instead of by luck.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from enum import IntEnum
from math import gcd
from typing import Any

from xenlab.errors import MachineError
from xenlab.machine.memory import PAGE_SHIFT, PAGE_SIZE, Memory

XEN, FREE = -1, -2
# The owner is gone, and another domain still maps the frame.
ORPHAN = -4
# The first frames stay empty: a null machine address in a table should lead nowhere useful.
_RESERVED = 16
# One of them, always zero, is what guests see where the hypervisor shows them an empty page.
EMPTY_FRAME = 0
# Another is the task state segment: the stack on which the running vCPU enters ring 1 through a call gate.
TSS_FRAME = 1
# In the machine-to-physical list: a frame that no guest has a number for.
NO_PFN = 0xFFFF_FFFF

OWNED, PINNED, VALIDATED = 1, 2, 4
_COLUMNS = ("owner", "type", "uses", "refs", "flags", "left")


class FrameType(IntEnum):
    """What a frame may be used as.  In PAE mode `L2_TOP` is the l2 table that also holds the hypervisor's range."""

    NONE = 0
    L1 = 1
    L2 = 2
    L3 = 3
    L2_TOP = 4
    DESCRIPTORS = 5
    WRITABLE = 6


TABLES = frozenset((FrameType.L1, FrameType.L2, FrameType.L3, FrameType.L2_TOP))


class FrameTable:
    """One row for each machine frame.

    Attributes:
        owner, type, uses, refs, flags: the columns; see the head of this file.
        left: for each frame, how often the TLB had been emptied when a mapping of it last went away (see `tlb`).
        m2p: the machine-to-physical list, in machine memory.
        m2p_frames: where that list lies.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        count = memory.frames
        self.owner = array("i", [FREE]) * count
        self.type = array("B", bytes(count))
        self.uses = array("i", bytes(4 * count))
        self.refs = array("i", bytes(4 * count))
        self.flags = array("B", bytes(count))
        self.left = array("q", [-1]) * count
        m2p_count = -(-count * 4 // PAGE_SIZE)
        self.m2p_frames = range(_RESERVED, _RESERVED + m2p_count)
        first = _RESERVED + m2p_count
        for mfn in range(first):
            self.owner[mfn] = XEN
        start = self.m2p_frames.start << PAGE_SHIFT
        self.m2p = memory.words[start >> 2 : (start >> 2) + count]
        memory.bytes[start : start + 4 * count] = NO_PFN.to_bytes(4, "little") * count
        self._free = _scattered(first, count)

    @property
    def count(self) -> int:
        """How many frames the machine has."""
        return len(self.owner)

    @property
    def free_frames(self) -> int:
        """How many frames are free."""
        return len(self._free)

    def allocate(self, count: int, owner: int, order: int = 0) -> list[int]:
        """Machine frame numbers of ``count`` zeroed frames that now belong to ``owner``, with no type or reference.

        Args:
            order: take them as extents of ``2**order`` frames that follow one another, the first one
                a multiple of that.

        Raises:
            MachineError: when fewer are free, or not in one piece; nothing is allocated then.
        """
        if count > len(self._free):
            raise MachineError(f"out of machine memory: {count} frames wanted, {len(self._free)} free")
        taken = self._extents(count, order) if order else [self._free.pop() for _ in range(count)]
        for mfn in taken:
            self.owner[mfn] = owner
        return taken

    def _extents(self, count: int, order: int) -> list[int]:
        free, size, taken = set(self._free), 1 << order, list[int]()
        for start in range(0, self.count, size):
            if len(taken) < count and free.issuperset(range(start, start + size)):
                taken += range(start, start + size)
        if len(taken) < count:
            raise MachineError(f"out of machine memory: no {count} frames in pieces of {size}")
        gone = set(taken)
        self._free = [mfn for mfn in self._free if mfn not in gone]
        return taken

    def release(self, frames: Iterable[int]) -> None:
        """Scrub ``frames`` and return them to the free ones."""
        for mfn in reversed(list(frames)):
            assert self.owner[mfn] != FREE, f"frame {mfn:#x} freed twice"
            assert not self.refs[mfn], f"frame {mfn:#x} freed with {self.refs[mfn]} references to it"
            self._memory.scrub(mfn)
            self.owner[mfn] = FREE
            self.type[mfn] = self.flags[mfn] = self.uses[mfn] = 0
            self.m2p[mfn] = NO_PFN
            self._free.append(mfn)

    def owned_by(self, domid: int) -> list[int]:
        """The frames that belong to a domain, in machine order."""
        import numpy as np

        found: list[int] = np.flatnonzero(np.frombuffer(self.owner, np.int32) == domid).tolist()
        return found

    def owner_of(self, mfn: int) -> int:
        """Whose a frame is; `FREE` for a number that no frame has."""
        return self.owner[mfn] if 0 <= mfn < len(self.owner) else FREE

    def describe(self, mfn: int) -> str:
        """One row, for people."""
        owner = self.owner[mfn]
        whose = {XEN: "the hypervisor's", FREE: "free", ORPHAN: "of a domain that is gone"}.get(
            owner, f"domain {owner}'s"
        )
        marks = [name for bit, name in ((PINNED, "pinned"), (VALIDATED, "validated")) if self.flags[mfn] & bit]
        kind = FrameType(self.type[mfn]).name.lower().replace("_", " ")
        uses, refs = _counted(self.uses[mfn], "use"), _counted(self.refs[mfn], "reference")
        text = f"frame {mfn:#x}, {whose}, type {kind}, {uses}, {refs}"
        return ", ".join((text, *marks))

    def state(self) -> dict[str, Any]:
        """Everything but the machine-to-physical list, which is memory, as plain data."""
        return {name: getattr(self, name)[:] for name in _COLUMNS} | {"free": list(self._free)}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        for name in _COLUMNS:
            # In place: others hold views of these columns.
            getattr(self, name)[:] = state[name]
        self._free = list(state["free"])


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _scattered(first: int, end: int) -> list[int]:
    """All numbers from ``first`` to ``end - 1``, neighbours far apart; taken from the end."""
    count = end - first
    stride = max(1, int(count * 0.618))
    while gcd(stride, count) != 1:
        stride += 1
    return [first + number * stride % count for number in range(count)]
