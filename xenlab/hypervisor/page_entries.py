"""What may stand in a guest's page table, entry by entry (paper 2.1.1, 3.3.3).

The problem: a guest writes its own page tables, in machine addresses, and the MMU believes
whatever stands there.  So each entry is looked at before the MMU can see it.  An entry that is
not present may hold anything, and is not asked about.  Of a present one two things are asked:

* its flags: none that would change what the entry means (a superpage, a global or an uncached
  page, a reserved bit);
* what it makes of the frame that it names: a page to read, a page to write, or the page table of the
  level below.  That is a `Use`, and `page_types` says whether the frame can be used so now.

The invariant: an entry names only frames of the domain whose frames it may name, and asks for
nothing that `page_types` does not count.  What breaks without it: a superpage flag turns a checked page
table into four megabytes of somebody's memory.

The errnos are Xen's (arch/x86/mm.c): EINVAL for flags and for tables of others, EPERM for a page where
there is no memory, EBUSY for a page of another domain.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

from xenlab.abi.numbers import Errno
from xenlab.machine.memory import PAGE_SHIFT
from xenlab.machine.paging import ACCESSED, DIRTY, GLOBAL, NX, PAE, PRESENT, PSE, RW, USER, PagingMode

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# The owner of a frame number that is beyond the end of memory.
NOWHERE = -3
_CACHING = 0x18  # PCD, PWT
_HIGH = 0x7FF0_0000_0000_0000  # bits 52 to 62 of a PAE entry
_REFUSED = _CACHING | PSE | GLOBAL | _HIGH
_REFUSED_L3 = _REFUSED | NX
# Reserved in the hardware's PAE root entries; Xen, which walks four levels, lets guests set them.
_TAKEN_OFF_L3 = RW | USER | ACCESSED | DIRTY


class Use(IntEnum):
    """What a frame is used as.

    The first two are references without a type.  The numbers of the others are those of `FrameType`.
    """

    READ = 0  # a mapping that cannot write, or being owned
    L1 = 1
    L2 = 2
    L3 = 3
    L2_TOP = 4
    DESCRIPTORS = 5
    WRITE = 6


def judge_entry(level: str, flags: int, domid: int, owner: int) -> int:
    """What a present entry makes of the frame that it names.

    Args:
        level: of the table that it stands in: ``l1``, ``l2`` or ``l3``.
        flags: the entry without the frame's address.
        domid: whose frames it may name.
        owner: whose the frame is: a domain's id, `XEN`, `FREE`, or `NOWHERE`.

    Returns:
        The `Use`, or a negated errno if the entry must not stand there.
    """
    if flags & (_REFUSED_L3 if level == "l3" else _REFUSED):
        return -Errno.EINVAL
    if level == "l1":
        if owner == NOWHERE:
            return -Errno.EPERM
        if owner != domid:
            return -Errno.EBUSY
        return Use.WRITE if flags & RW else Use.READ
    if owner != domid:
        return -Errno.EINVAL
    return Use.L1 if level == "l2" else Use.L2


def as_stored(level: str, entry: int) -> int:
    """An entry in the form that is stored: without what the hardware reserves in PAE's root."""
    return entry & ~_TAKEN_OFF_L3 if level == "l3" and entry & PRESENT else entry


def split_leaves(mode: PagingMode, entries: NDArray[np.unsignedinteger]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Frame numbers of the present entries of an l1 table, and of those that can write, in order."""
    import numpy as np

    # What all entries have in common spares picking some out.
    common = int(np.bitwise_and.reduce(entries, initial=~entries.dtype.type(0)))
    present = entries if common & PRESENT else entries[(entries & PRESENT) != 0]
    mfns = ((present & mode.frame_mask) >> PAGE_SHIFT).astype(np.int64)
    return mfns, mfns if common & PRESENT and common & RW else mfns[(present & RW) != 0]


def flags_are_ordinary(mode: PagingMode, entries: NDArray[np.unsignedinteger]) -> bool:
    """Whether no present entry of an l1 table has a flag that `judge_entry` refuses."""
    import numpy as np

    refused = _REFUSED if mode is PAE else _REFUSED & 0xFFF
    if not int(np.bitwise_or.reduce(entries, initial=entries.dtype.type(0))) & refused:
        return True
    suspicious = entries[(entries & refused) != 0]
    return not (suspicious & PRESENT).any()


__all__ = ["NOWHERE", "Use", "as_stored", "flags_are_ordinary", "judge_entry", "split_leaves"]
