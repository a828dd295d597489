"""Runs of page-table updates done on arrays (paper 3.3.3: batching).

The problem: to fill a page table takes 1,024 updates, and in Python one costs two microseconds when it is
done by itself.  The guest sends them as one batch anyway, so a run of them is checked and stored by a few
array operations.

A run is what can be done in any order with the same result: updates of distinct entries of one validated l1
table, by the plain command, that name only frames of the domain which it has not given up.  Whatever is not like
that, or would be refused, is left to be done one by one, which also finds the errno.

The invariant: state, errno and count are what they would be one by one (a property test compares
them).  What breaks without it: a guest gets past a check by putting two updates into one batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from xenlab.hypervisor.domain import Domain, Vcpu
from xenlab.hypervisor.frames import OWNED, VALIDATED, FrameTable, FrameType
from xenlab.hypervisor.guest_memory import GuestMemory
from xenlab.hypervisor.page_tables import PageTables
from xenlab.hypervisor.tlb import Tlb
from xenlab.machine.memory import PAGE_SHIFT, PAGE_SIZE, Memory
from xenlab.machine.paging import PRESENT, RW, PagingMode

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Below this many the arrays cost more than they save.
LONG_ENOUGH = 16
_UPDATE_BYTES = 16


class LeafBatches:
    """Does runs of updates for `Mmu.mmu_update`."""

    def __init__(
        self,
        memory: Memory,
        guest: GuestMemory,
        frames: FrameTable,
        tables: PageTables,
        tlb: Tlb,
        release: Callable[[int], None],
    ) -> None:
        import numpy as np

        self._memory, self._guest, self._release = memory, guest, release
        self._frames, self._tables, self._tlb = frames, tables, tlb
        self._take, self._drop = tables.types.take_leaves, tables.types.drop_leaves
        self._flags = np.frombuffer(frames.flags, np.uint8)

    def run(self, vcpu: Vcpu, domain: Domain, address: int, count: int) -> int:
        """Do the run that begins with the update at linear ``address``, of ``count`` that are left.

        Returns:
            How many were done: 0 where the first one has to be done by itself.

        Raises:
            HypercallError: EFAULT, if the first update cannot be read.
        """
        import numpy as np

        if self._take is None or self._drop is None:
            return 0
        # Up to the end of the page, whose translation cannot change within a run.
        count = min(count, (PAGE_SIZE - address % PAGE_SIZE) // _UPDATE_BYTES)
        if count < LONG_ENOUGH:
            return 0
        at = self._guest.machine_address(vcpu, address, count * _UPDATE_BYTES, False)
        words = np.frombuffer(self._memory.bytes, np.uint64, 2 * count, at)
        pointers, values = words[::2], words[1::2]
        mfn = int(pointers[0]) >> PAGE_SHIFT
        # A batch that lies in the table that it changes would change itself.
        if mfn == at >> PAGE_SHIFT or not self._is_leaf_table(domain, mfn):
            return 0
        length = _length(domain.mode, pointers, mfn)
        if length < LONG_ENOUGH:
            return 0
        offsets = (pointers[:length] & (PAGE_SIZE - 1)).astype("int64")
        indices = offsets // domain.mode.entry_size
        table = self._tables.entries(domain.mode, mfn)
        return length if self._store(domain, table, indices, values[:length].astype(table.dtype)) else 0

    def _is_leaf_table(self, domain: Domain, mfn: int) -> bool:
        frames = self._frames
        if mfn >= frames.count or frames.owner[mfn] != domain.domid:
            return False
        return frames.type[mfn] == FrameType.L1 and bool(frames.flags[mfn] & VALIDATED)

    def _store(
        self,
        domain: Domain,
        table: NDArray[np.unsignedinteger],
        indices: NDArray[np.int64],
        new: NDArray[np.unsignedinteger],
    ) -> bool:
        mode = domain.mode
        present = (new & PRESENT) != 0
        named = ((new[present] & mode.frame_mask) >> PAGE_SHIFT).astype("int64")
        if len(named) and (named.max() >= len(self._flags) or not (self._flags[named] & OWNED).all()):
            return False
        if not self._take(mode, new, domain.domid):
            return False
        old = table[indices]
        table[indices] = new
        lost = old[((old & PRESENT) != 0) & (((old ^ new) & (mode.frame_mask | PRESENT | RW)) != 0)]
        self._tlb.unmapped_many((lost & mode.frame_mask) >> PAGE_SHIFT)
        for unused in self._drop(mode, old):
            self._release(unused)
        return True


def _length(mode: PagingMode, pointers: NDArray[np.uint64], mfn: int) -> int:
    """How many updates from the first on are plain ones of distinct entries of frame ``mfn``."""
    import numpy as np

    plain = ((pointers >> PAGE_SHIFT) == mfn) & ((pointers & (mode.entry_size - 1)) == 0)
    length = len(plain) if plain.all() else int(plain.argmin())
    order = np.argsort(pointers[:length], kind="stable")
    ordered = pointers[order]
    again = order[1:][ordered[1:] == ordered[:-1]]
    return int(again.min()) if len(again) else length


__all__ = ["LONG_ENOUGH", "LeafBatches"]
