"""Whole page tables: checked once when they become tables, and entry by entry from then on (paper 3.3.3).

A guest's page tables form a tree; each table is a frame of the guest's with the type of its level, and
each entry is one use of the frame that it names.  So the types keep the tree honest from below:

    base pointer, pin ──> l3 ──> l2 ──> l1 ──> pages      (PAE; the two-level format has no l3)

To take a frame as a table is to check all its entries and take what they name in turn; to drop the last
use of a table is to drop what its entries name.  Whole tables of leaves are done on arrays.

A tree may be large.  So that one call cannot keep the machine busy, checking stops when the call's
allowance is used up, and goes on when the call is made again: `Preempted`.  A frame whose check was interrupted
keeps its type, so it cannot become anything else; it is not `VALIDATED`, so nothing may rely on it.  Whoever takes
it next goes on where the check stopped.

The top of each address space belongs to the hypervisor: the entries there are written by it when the
table is taken, and the guest can change none of them.

The invariant: each entry of a `VALIDATED` table was allowed when it was stored, and what it names has been counted
once.  What breaks without it: the MMU walks into memory that nobody has checked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from xenlab.abi.numbers import Errno
from xenlab.errors import HypercallError
from xenlab.hypervisor.checked_types import CheckedTypes, structural
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.frames import TABLES, VALIDATED, FrameTable
from xenlab.hypervisor.layout import first_reserved_slot
from xenlab.hypervisor.linear_tables import LinearTables
from xenlab.hypervisor.page_entries import Use, as_stored
from xenlab.hypervisor.page_types import REFUSED, UNTYPED, UNUSED, VALIDATE
from xenlab.hypervisor.preemption import TABLE_COST, Allowance, Preempted
from xenlab.hypervisor.tlb import RETYPED, Tlb
from xenlab.machine.memory import PAGE_SHIFT, PAGE_SIZE, Memory
from xenlab.machine.paging import ACCESSED, DIRTY, PRESENT, RW, TWO_LEVEL, PagingMode

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

_LEVELS: dict[int, str] = {Use.L1: "l1", Use.L2: "l2", Use.L2_TOP: "l2", Use.L3: "l3"}
_AD = ACCESSED | DIRTY
_LAST_L3_SLOT = 3


def root_use(mode: PagingMode) -> Use:
    """What the frame behind the base pointer is used as."""
    return Use.L2_TOP if mode is TWO_LEVEL else Use.L3


class PageTables:
    """Takes and drops tables, and changes their entries.

    Args:
        memory, frames, tlb: the machine's.
        types: the part that counts, with its answers checked.
        check_descriptors: checks a frame of descriptors; raises HypercallError.
        release: called with a frame to which nothing refers any more.
        allowance: what the current call may still do.
        refused: told of each entry that was refused: frame of the table, index, entry, errno.

    Attributes:
        types: as given.
        partial: for tables whose check was interrupted, the next entry.
    """

    def __init__(
        self,
        memory: Memory,
        frames: FrameTable,
        types: CheckedTypes,
        tlb: Tlb,
        check_descriptors: Callable[[Domain, int], None],
        release: Callable[[int], None],
        allowance: Allowance,
        refused: Callable[[int, int, int, int], None],
    ) -> None:
        import numpy as np

        self._memory, self._frames, self.types, self._tlb = memory, frames, types, tlb
        self._check_descriptors, self._release, self._allowance = check_descriptors, release, allowance
        self._refused = refused
        self._words = np.frombuffer(memory.bytes, np.uint32)
        self._qwords = np.frombuffer(memory.bytes, np.uint64)
        # A part that knows arrays is used that way.
        self._take_leaves, self._drop_leaves = types.take_leaves, types.drop_leaves
        self.partial: dict[int, int] = {}
        self._linear = LinearTables(frames, self.types)

    def entries(self, mode: PagingMode, mfn: int) -> NDArray[np.unsignedinteger]:
        """The table in frame ``mfn`` as an array over machine memory."""
        array: NDArray[np.unsignedinteger] = self._words if mode.entry_size == 4 else self._qwords
        count = PAGE_SIZE // mode.entry_size
        return array[mfn * count : mfn * count + count]

    # Taking and dropping frames.

    def take(self, domain: Domain, mfn: int, use: int) -> None:
        """Use frame ``mfn`` of ``domain`` as a table or as descriptors once more.

        Raises:
            HypercallError: it is something else, or its contents may not be that; nothing has changed then.
            Preempted: make the call again.
        """
        verdict = self.types.take(mfn, use)
        if verdict == REFUSED:
            raise HypercallError(Errno.EINVAL)
        held = mfn in self.partial
        if verdict != VALIDATE and not held:
            return
        if verdict == VALIDATE:
            self._tlb.reused(mfn, RETYPED)
        try:
            self._check(domain, mfn, use)
        except Preempted:
            # The frame keeps one use of its own until the check has ended.
            if held:
                self.types.drop(mfn, use)
            raise
        except HypercallError:
            self._give_up(domain, mfn, use, held)
            raise
        self._frames.flags[mfn] |= VALIDATED
        self.partial.pop(mfn, None)
        if held:
            self.types.drop(mfn, use)

    def _give_up(self, domain: Domain, mfn: int, use: int, held: bool) -> None:
        """The check failed: what the first entries took goes back, and so do the frame's own uses."""
        self._drop_contents(domain, mfn, use, self.partial.pop(mfn, 0))
        for _ in range(1 + held):
            last = self.types.drop(mfn, use)
        if last & UNUSED:
            self._release(mfn)

    def drop(self, domain: Domain, mfn: int, use: int) -> None:
        """Use frame ``mfn`` once less; with the last use as a table goes what its entries name."""
        last = self.types.drop(mfn, use)
        if last & UNTYPED and use != Use.WRITE:
            self._frames.flags[mfn] &= ~VALIDATED
            if use in TABLES:
                self._drop_contents(domain, mfn, use, None)
        if last & UNUSED:
            self._release(mfn)

    def drop_partial(self, domain: Domain) -> None:
        """End all interrupted checks of a domain that will not go on with them."""
        for mfn in [mfn for mfn in self.partial if self._frames.owner[mfn] == domain.domid]:
            use = self._frames.type[mfn]
            self._drop_contents(domain, mfn, use, self.partial.pop(mfn))
            if self.types.drop(mfn, use) & UNUSED:
                self._release(mfn)

    # Checking whole tables.

    def _check(self, domain: Domain, mfn: int, use: int) -> None:
        self._allowance.left -= TABLE_COST
        if use == Use.DESCRIPTORS:
            self._check_descriptors(domain, mfn)
        elif use == Use.L1:
            self._check_leaves(domain, mfn)
        else:
            self._check_branches(domain, mfn, use)

    def _check_leaves(self, domain: Domain, mfn: int) -> None:
        entries = self.entries(domain.mode, mfn)
        if self._take_leaves is not None and self._take_leaves(domain.mode, entries, domain.domid):
            return
        for index in _present(entries):
            self.partial[mfn] = index
            self.take_entry(domain, mfn, Use.L1, index, int(entries[index]))

    def _check_branches(self, domain: Domain, mfn: int, use: int) -> None:
        entries = self.entries(domain.mode, mfn)
        start = self.partial.get(mfn, 0)
        reserved = first_reserved_slot(domain.mode, use)
        for index in _present(entries[: _slots(domain.mode, use, reserved)]):
            if index < start:
                continue
            self.partial[mfn] = index
            if self._allowance.left <= 0:
                raise Preempted
            entry = as_stored(_LEVELS[use], int(entries[index]))
            entries[index] = entry
            self.take_entry(domain, mfn, use, index, entry)
        if use == Use.L3 and not entries[_LAST_L3_SLOT] & PRESENT:
            # The hypervisor's range is behind it.
            self.partial[mfn] = _slots(domain.mode, use, reserved)
            raise HypercallError(Errno.EINVAL)
        if reserved is not None:
            entries[reserved:] = 0
            for slot, entry in domain.hypervisor_slots.items():
                entries[slot] = entry

    def _drop_contents(self, domain: Domain, mfn: int, use: int, end: int | None) -> None:
        """Drop what the entries of a table name, all or those below ``end``."""
        entries = self.entries(domain.mode, mfn)[:end]
        if use == Use.L1 and self._drop_leaves is not None:
            present = entries[(entries & PRESENT) != 0]
            self._tlb.unmapped_many((present & domain.mode.frame_mask) >> PAGE_SHIFT)
            for unused in self._drop_leaves(domain.mode, entries):
                self._release(unused)
            return
        reserved = first_reserved_slot(domain.mode, use)
        slots = _slots(domain.mode, use, reserved)
        # Read before the first is dropped: the table may be given up, and scrubbed, by what it names.
        for index, entry in [(index, int(entries[index])) for index in _present(entries[:slots])]:
            self.drop_entry(domain, mfn, use, index, entry)
        if reserved is not None and end is None:
            entries[reserved:] = 0

    # One entry.

    def take_entry(
        self, domain: Domain, table: int, use: int, index: int, entry: int, owner: Domain | None = None
    ) -> None:
        """Take what one entry of ``table`` names; pages of ``owner``, if that is somebody else than ``domain``.

        Raises:
            HypercallError: the entry may not stand there; nothing was taken then.
            Preempted: make the call again.
        """
        if entry & PRESENT:
            try:
                self._take_present(domain, table, use, index, entry, owner)
            except HypercallError as refusal:
                self._refused(table, index, entry, refusal.errno)
                raise

    def _take_present(self, domain: Domain, table: int, use: int, index: int, entry: int, owner: Domain | None) -> None:
        mode, level = domain.mode, _LEVELS[use]
        mfn = mode.frame_of(entry)
        # Pages may be another's, if the caller may say so; tables never.
        named = self.types.entry(mode, level, entry, (owner if owner and level == "l1" else domain).domid)
        if level == "l1":
            if self.types.take(mfn, named) == REFUSED:
                raise HypercallError(Errno.EBUSY)
            return
        if named == Use.L2 and index == _LAST_L3_SLOT:
            named = Use.L2_TOP
        try:
            self.take(domain, mfn, named)
        except HypercallError:
            if not self._linear.take(table, use, mfn, entry):
                raise

    def drop_entry(self, domain: Domain, table: int, use: int, index: int, entry: int) -> None:
        """Drop what one entry of a validated table names."""
        if not entry & PRESENT:
            return
        mfn, level = domain.mode.frame_of(entry), _LEVELS[use]
        if level == "l1":
            self._tlb.unmapped(mfn)
            self.drop(domain, mfn, structural(level, entry))
        elif level == "l2" and self._linear.is_one(table, mfn):
            if kind := self._linear.drop(table, mfn):
                self.drop(domain, mfn, kind)
        else:
            named = structural(level, entry)
            self.drop(domain, mfn, Use.L2_TOP if named == Use.L2 and index == _LAST_L3_SLOT else named)

    def update(
        self, domain: Domain, table: int, index: int, new: int, *, owner: Domain | None = None, keep_marks: bool = False
    ) -> None:
        """Change one entry of a validated table.

        Args:
            domain: whose table it is.
            table: its frame.
            index: which entry.
            new: the new entry.
            owner: whose pages it may name, if not ``domain``'s.
            keep_marks: leave the accessed and dirty bits as the MMU has set them.

        Raises:
            HypercallError: the entry may not be that; nothing has changed then.
            Preempted: make the call again.
        """
        mode, use = domain.mode, self._frames.type[table]
        try:
            self._check_slot(mode, use, index)
        except HypercallError as refusal:
            self._refused(table, index, new, refusal.errno)
            raise
        level, address = _LEVELS[use], table << PAGE_SHIFT
        old = mode.read(self._memory, address, index)
        new = as_stored(level, new | old & _AD if keep_marks and new & PRESENT else new)
        unchanged = mode.frame_mask | PRESENT | RW
        if old & PRESENT and not (old ^ new) & unchanged:
            # The same frame for the same use: only what the new flags may be is asked.
            self.types.entry(mode, level, new, self._frames.owner[mode.frame_of(new)])
            mode.write(self._memory, address, index, new)
            return
        self.take_entry(domain, table, use, index, new, owner)
        mode.write(self._memory, address, index, new)
        self.drop_entry(domain, table, use, index, old)

    def _check_slot(self, mode: PagingMode, use: int, index: int) -> None:
        reserved = first_reserved_slot(mode, use)
        if reserved is not None and index >= reserved:
            raise HypercallError(Errno.EPERM)
        if use == Use.L3 and index >= _LAST_L3_SLOT:
            # The table behind the last one holds the hypervisor's range, at every moment.
            raise HypercallError(Errno.EINVAL)

    def state(self) -> dict[str, Any]:
        """What is not in the frame table, as plain data."""
        return {"partial": dict(self.partial), "linear": self._linear.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        self.partial = dict(state["partial"])
        self._linear.load(state["linear"])


def _present(entries: NDArray[np.unsignedinteger]) -> Iterable[int]:
    import numpy as np

    found: list[int] = np.flatnonzero(entries & 1).tolist()
    return found


def _slots(mode: PagingMode, use: int, reserved: int | None) -> int:
    """How many entries of a table the guest fills."""
    if use == Use.L3:
        return _LAST_L3_SLOT + 1
    return PAGE_SIZE // mode.entry_size if reserved is None else reserved


__all__ = ["PageTables", "root_use"]
