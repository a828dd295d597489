"""Page tables that name tables of their own level ("linear page tables").

A table may name itself where an l1 table is expected, so that a guest finds its page tables at a linear
address: the MMU then takes the tables for pages.  That is safe as long as they cannot be written that way, and it
is not counted, or the table could never be given up.

In PAE mode, where there are four l2 tables, one of them may name the others so.  That is a use of them as
what they are.  But neither a chain nor a ring may come of it, or dropping one table could drop any number
of others in turn (Xen advisory 240).  So a table that names others is named by none, and the other way round.

The invariant: dropping a table that is named so drops nothing further on this way.
"""

from __future__ import annotations

from xenlab.hypervisor.checked_types import CheckedTypes
from xenlab.hypervisor.frames import VALIDATED, FrameTable, FrameType
from xenlab.hypervisor.page_types import REFUSED
from xenlab.machine.paging import RW

_KINDS = (FrameType.L2, FrameType.L2_TOP)


class LinearTables:
    """Which l2 tables name which as if they were l1 tables."""

    def __init__(self, frames: FrameTable, types: CheckedTypes) -> None:
        self._frames, self._types = frames, types
        # By table: how many others it names (positive), or how many name it (negative).
        self._named: dict[int, int] = {}

    def is_one(self, table: int, mfn: int) -> bool:
        """Whether an entry of the l2 table ``table`` that names ``mfn`` is of this kind, once it was taken."""
        return mfn == table or self._frames.type[mfn] in _KINDS

    def take(self, table: int, use: int, mfn: int, entry: int) -> bool:
        """Take frame ``mfn`` for such an entry, if it may be one."""
        if use not in _KINDS or not self.is_one(table, mfn) or entry & RW:
            return False
        if mfn == table:
            return True
        if not self._frames.flags[mfn] & VALIDATED:
            return False
        if self._named.get(table, 0) < 0 or self._named.get(mfn, 0) > 0:
            return False
        if self._types.take(mfn, self._frames.type[mfn]) == REFUSED:
            return False
        self._count(table, mfn, 1)
        return True

    def drop(self, table: int, mfn: int) -> int:
        """Such an entry goes; what frame ``mfn`` has to be dropped as, 0 for nothing."""
        if mfn == table:
            return 0
        self._count(table, mfn, -1)
        return self._frames.type[mfn]

    def _count(self, table: int, mfn: int, step: int) -> None:
        for end, change in ((table, step), (mfn, -step)):
            self._named[end] = self._named.get(end, 0) + change
            if not self._named[end]:
                del self._named[end]

    def state(self) -> dict[int, int]:
        """Everything, as plain data."""
        return dict(self._named)

    def load(self, state: dict[int, int]) -> None:
        """Take over what `state` gave."""
        self._named = dict(state)
