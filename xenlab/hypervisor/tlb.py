"""When the TLB is emptied, and when not (paper 2.1.1, 3.3.3).

The problem: the x86 TLB is filled by the hardware and carries no tag that says whose an entry is.  An
entry stays until it is flushed, also when the page table says something else by then.  And a
flush is dear: everything has to be looked up anew.

So the hypervisor flushes only where somebody could be deceived:

    switch         another domain runs next, with page tables of its own
    base pointer   the guest loads another root table
    asked          the guest asks for it; what it forgets to ask for is its own affair,
    page           as long as it concerns its own memory only
    retyped        a frame becomes a page table or a descriptor table, and a mapping of it that went
                   away since the last flush may still let the guest write to it
    freed          a frame is nobody's any more, and a stale mapping may still lead there
    descriptors    the hypervisor itself has changed what stands in its range: other descriptor tables

and not at a hypercall, since the hypervisor lives in the guest's own address space.

    opened         a page table is made writable for one instruction of the guest's, and closed again

Retyping and freeing are decided by time: each frame remembers at which flush count a mapping of it last went away.
If the TLB has been emptied since, there can be no stale entry.

The invariant: no TLB entry leads to a frame of another owner, or lets a guest write to a page table.  What
breaks without it: all validation is in vain, because the MMU does not look at the page table at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from xenlab.hypervisor.frames import FrameTable
from xenlab.machine.cpu import Cpu

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SWITCH, BASE, ASKED, PAGE = "switch", "base pointer", "asked", "page"
RETYPED, FREED, DESCRIPTORS, OPENED = "retyped", "freed", "descriptors", "opened"
REASONS = (SWITCH, BASE, ASKED, PAGE, RETYPED, FREED, DESCRIPTORS, OPENED)


class FlushPolicy(Protocol):
    """The slot for the decision to flush before a frame is used otherwise (lesson 06)."""

    def must_flush(self, reason: str, left: int, flushes: int) -> bool:
        """Whether the TLB has to be emptied.

        Args:
            reason: `RETYPED` or `FREED`.
            left: how often the TLB had been emptied when a mapping of the frame last went away, -1 for never.
            flushes: how often it has been emptied by now.
        """
        ...


class FlushIfStale:
    """Flush only if a mapping went away since the last flush."""

    def must_flush(self, _reason: str, left: int, flushes: int) -> bool:
        return left == flushes


class Tlb:
    """Flushes, counted by reason.

    Attributes:
        counts: how many there were, by reason.
        watching: false while the tables of a domain that ended are dropped, which no CPU walks any more.
    """

    def __init__(self, cpu: Cpu, frames: FrameTable, policy: FlushPolicy, record: Callable[[str, int], None]) -> None:
        import numpy as np

        self._cpu, self._frames, self.policy, self._record = cpu, frames, policy, record
        self._left = np.frombuffer(frames.left, np.int64)
        self.watching = True
        self.counts = dict.fromkeys(REASONS, 0)

    def flush(self, reason: str, address: int = 0) -> None:
        """Empty the TLB before the next guest instruction.

        A flush of a single page empties all of it too: Unicorn has no call for one page, and a CPU may
        always forget more than it was asked to.
        """
        self._cpu.flush_tlb()
        self.counts[reason] += 1
        self._record(reason, address)

    def unmapped(self, mfn: int) -> None:
        """A mapping of frame ``mfn`` went away."""
        self._frames.left[mfn] = self._cpu.flushes

    def unmapped_many(self, mfns: NDArray[np.integer]) -> None:
        """Mappings of all these frames went away."""
        self._left[mfns.astype("int64")] = self._cpu.flushes

    def reused(self, mfn: int, reason: str) -> None:
        """Frame ``mfn`` is about to be something else, or nobody's."""
        if self.watching and self.policy.must_flush(reason, self._frames.left[mfn], self._cpu.flushes):
            self.flush(reason)
