"""Machine frames: who owns each, and which are free (paper 3.3.4).

The problem: memory is divided between domains and the hypervisor, and a frame that changes
hands must carry nothing from its old owner to its new one.

The invariant: every frame has exactly one owner or is free, and a free frame is all zeros.
What breaks without it: a new domain reads what an old one left behind.

Frames are dealt out scattered, in an order that is the same on every run, so that a guest
that confuses pseudo-physical with machine addresses fails at once instead of by luck.
"""

from __future__ import annotations

from math import gcd

from xenlab.errors import MachineError
from xenlab.machine.memory import Memory

XEN, FREE = -1, -2
# The first frames stay empty: a null machine address in a table should lead nowhere useful.
_RESERVED = 16
# One of them, always zero, is what guests see where the hypervisor shows them an empty page.
EMPTY_FRAME = 0


class FrameHeap:
    """Hands out machine frames and takes them back.

    Attributes:
        owner: for each frame the owning domain's id, `XEN` or `FREE`.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.owner = [XEN] * _RESERVED + [FREE] * (memory.frames - _RESERVED)
        self._free = _scattered(_RESERVED, memory.frames)

    @property
    def free_frames(self) -> int:
        """How many frames are free."""
        return len(self._free)

    def allocate(self, count: int, owner: int) -> list[int]:
        """Machine frame numbers of ``count`` zeroed frames that now belong to ``owner``.

        Raises:
            MachineError: when fewer are free; nothing is allocated then.
        """
        if count > len(self._free):
            raise MachineError(f"out of machine memory: {count} frames wanted, {len(self._free)} free")
        taken = [self._free.pop() for _ in range(count)]
        for mfn in taken:
            self.owner[mfn] = owner
        return taken

    def release(self, frames: list[int]) -> None:
        """Scrub ``frames`` and return them to the free ones."""
        for mfn in reversed(frames):
            assert self.owner[mfn] != FREE, f"frame {mfn:#x} freed twice"
            self._memory.scrub(mfn)
            self.owner[mfn] = FREE
            self._free.append(mfn)

    def state(self) -> dict[str, list[int]]:
        """Everything, as plain data."""
        return {"owner": list(self.owner), "free": list(self._free)}

    def load(self, state: dict[str, list[int]]) -> None:
        """Take over what `state` gave."""
        self.owner = list(state["owner"])
        self._free = list(state["free"])


def _scattered(first: int, end: int) -> list[int]:
    """All numbers from ``first`` to ``end - 1``, neighbours far apart; taken from the end."""
    count = end - first
    stride = max(1, int(count * 0.618))
    while gcd(stride, count) != 1:
        stride += 1
    return [first + number * stride % count for number in range(count)]
