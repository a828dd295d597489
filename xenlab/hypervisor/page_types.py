"""Types and reference counts of frames: the heart of the paper's memory protection (paper 3.3.3).

The problem: guests manage their page tables themselves, and a guest that could write to one past
the hypervisor could map anything.  To check all tables on each use would cost far too much.

The idea: each machine frame has one type at a time, and a count of its uses as that.  A frame
whose uses are writable mappings cannot become a page table, and a page table cannot be mapped
writable, because the type of a frame may change only when its count is zero.  So the contents of
a page table are checked once, when the frame becomes one; from then on each change is checked as
it is made, and the MMU may walk the table at full speed.

    take(frame, use)      one use more; refused where the frame is in use as something else
    drop(frame, use)      one use less; says whether that was the last of its type, or of all

A frame may be referred to without a type: a read-only mapping does not mind what it reads.  Such a
reference still keeps the frame from being given to somebody else.

The invariant: `uses` and `refs` of a frame equal the number of entries, pins, base pointers and
descriptor tables that name it (`auditor` counts them again).  What breaks without it: a frame is
reused while somebody still maps it.

`PageTypes` is a slot: a student's class of these methods runs the same guests (exercise 05).  One that
has also ``take_leaves`` and ``drop_leaves`` is given whole tables as arrays; one that has not is asked entry by
entry.  Both ways have the same results.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from xenlab.hypervisor.frames import FrameTable, FrameType
from xenlab.hypervisor.page_entries import Use, flags_are_ordinary, judge_entry, split_leaves
from xenlab.machine.paging import PagingMode

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Answers of `take`.
REFUSED, GRANTED, VALIDATE = -1, 0, 1
# Answers of `drop`, which may be combined.
UNTYPED, UNUSED = 1, 2
# As many uses as the count of Xen on 32-bit x86 could hold.
MOST_USES = (1 << 26) - 1
_WRITE, _NONE = int(Use.WRITE), int(FrameType.NONE)
_ENTRIES = 1024  # of a table, at most


class PageTypes(Protocol):
    """The slot for types and counts.  All values are plain numbers; see `Use` for what a frame is used as."""

    def entry(self, level: str, flags: int, domid: int, owner: int) -> int:
        """What a page-table entry makes of its frame, or a negated errno: see `judge_entry`.

        Only a refusal counts: what an allowed entry means to the MMU the hypervisor reads for itself.
        """
        ...

    def take(self, mfn: int, use: int) -> int:
        """Count one use more.

        Returns:
            `GRANTED`; `VALIDATE` if the frame has just become what ``use`` says and its contents have to be
            checked before anyone relies on them; `REFUSED` if it is something else now.
        """
        ...

    def drop(self, mfn: int, use: int) -> int:
        """Count one use less: `UNTYPED` if it was the last of its type, `UNUSED` if no reference is left, or both."""
        ...


class FrameTypes:
    """`PageTypes` on the columns of the frame table.

    Args:
        frames: the table.
        most_uses: how many uses of one frame are counted; one more is refused.
    """

    def __init__(self, frames: FrameTable, most_uses: int = MOST_USES) -> None:
        import numpy as np

        self._frames, self._most = frames, most_uses
        self._type, self._uses, self._refs = frames.type, frames.uses, frames.refs
        self._types = np.frombuffer(frames.type, np.uint8)
        self._use_counts, self._ref_counts = np.frombuffer(frames.uses, np.int32), np.frombuffer(frames.refs, np.int32)
        self._owners = np.frombuffer(frames.owner, np.int32)
        self._last_place, self._places = np.zeros(frames.count, np.int32), np.arange(_ENTRIES, dtype=np.int32)
        self._may_be_written = np.array([kind in (_NONE, _WRITE) for kind in FrameType])
        # Each reference is an entry of some table, so a small machine has too few frames for so many.
        self._may_overflow = frames.count * _ENTRIES >= most_uses

    def entry(self, level: str, flags: int, domid: int, owner: int) -> int:
        return judge_entry(level, flags, domid, owner)

    def take(self, mfn: int, use: int) -> int:
        if self._refs[mfn] >= self._most:
            return REFUSED
        if use:
            found = self._type[mfn]
            if found != use:
                if self._uses[mfn]:
                    return REFUSED
                self._type[mfn], self._uses[mfn] = use, 1
                self._refs[mfn] += 1
                return GRANTED if use == _WRITE else VALIDATE
            self._uses[mfn] += 1
        self._refs[mfn] += 1
        return GRANTED

    def drop(self, mfn: int, use: int) -> int:
        last = 0
        if use:
            self._uses[mfn] -= 1
            if not self._uses[mfn]:
                self._type[mfn] = _NONE
                last = UNTYPED
        self._refs[mfn] -= 1
        return last if self._refs[mfn] else last | UNUSED

    def take_leaves(self, mode: PagingMode, entries: NDArray[np.unsignedinteger], domid: int) -> bool:
        """Take what all entries of an l1 table ask for, or nothing.

        Returns:
            Whether it was done.  If not, `entry` and `take` have to say why.
        """
        if not flags_are_ordinary(mode, entries):
            return False
        mfns, written = split_leaves(mode, entries)
        if not len(mfns):
            return True
        try:
            owners = self._owners.take(mfns)
        except IndexError:  # a frame that the machine does not have
            return False
        if (owners != domid).any() or not self._may_be_written.take(self._types.take(written)).all():
            return False
        if self._may_overflow and self._ref_counts.take(mfns).max() + len(mfns) > self._most:
            return False
        self._types[written] = _WRITE
        self._add(mfns, written, 1)
        return True

    def drop_leaves(self, mode: PagingMode, entries: NDArray[np.unsignedinteger]) -> list[int]:
        """Give back what the entries of an l1 table had taken; the frames to which no reference is left."""
        mfns, written = split_leaves(mode, entries)
        self._add(mfns, written, -1)
        self._types[written[self._use_counts.take(written) == 0]] = _NONE
        unused: set[int] = set(mfns[self._ref_counts.take(mfns) == 0].tolist())
        return sorted(unused)

    def _add(self, mfns: NDArray[np.int64], written: NDArray[np.int64], step: int) -> None:
        """Change references and uses.  Distinct frames, the usual case, are done ten times as fast as repeated ones."""
        import numpy as np

        places = self._places[: len(mfns)]
        self._last_place[mfns] = places
        if (self._last_place.take(mfns) == places).all():
            self._ref_counts[mfns] += step
            self._use_counts[written] += step
        else:
            np.add.at(self._ref_counts, mfns, step)
            np.add.at(self._use_counts, written, step)

    def state(self) -> dict[str, Any]:
        """Nothing: the columns are saved with the frame table."""
        return {}

    def load(self, _state: dict[str, Any]) -> None:
        """Nothing to take back."""


__all__ = ["GRANTED", "REFUSED", "UNTYPED", "UNUSED", "VALIDATE", "FrameTypes", "PageTypes"]
