"""A `PageTypes` part, each of whose answers is looked at before it is used.

The problem: the part may be a student's.  It may raise, or answer with something that is no answer, and the
hypervisor has to say so, to the person who put it in, instead of stumbling over it later.

What the part says decides what is allowed and counted.  What the MMU makes of an entry is not up to it: so the
hypervisor keeps the type of each frame in the frame table itself, from the part's answers, and reads for itself what
an entry asks for (`structural`).
"""

from __future__ import annotations

from typing import Any

from xenlab.abi.numbers import Errno
from xenlab.errors import HypercallError, XenlabError
from xenlab.hypervisor.frames import FrameTable, FrameType
from xenlab.hypervisor.page_entries import NOWHERE, Use
from xenlab.hypervisor.page_types import REFUSED, UNTYPED, UNUSED, VALIDATE, PageTypes
from xenlab.hypervisor.parts import wrong
from xenlab.machine.paging import RW, PagingMode

_ENTRY_ANSWERS = frozenset((*map(int, Use), *(-number for number in Errno)))
# As plain numbers: looking an enum's member up costs more than what is done with it.
_READ, _WRITE, _L1, _L2, _NONE = int(Use.READ), int(Use.WRITE), int(Use.L1), int(Use.L2), int(FrameType.NONE)
_TAKE, _DROP, _ENTRY = "-1, 0 or 1", "0, 1, 2 or 3", "a Use or a negated errno"


class CheckedTypes:
    """Asks a part.

    Args:
        part: the part.
        frames: where the types are kept that it gives to frames.

    Attributes:
        take_leaves, drop_leaves: the part's own, None where it has no such.

    All methods raise PartError where the part gives no answer.
    """

    def __init__(self, part: PageTypes, frames: FrameTable) -> None:
        self._part, self._frames, self._type = part, frames, frames.type
        self.take_leaves: Any = getattr(part, "take_leaves", None)
        self.drop_leaves: Any = getattr(part, "drop_leaves", None)

    def take(self, mfn: int, use: int) -> int:
        """One use more: the part's `REFUSED`, `GRANTED` or `VALIDATE`."""
        try:
            answer = self._part.take(mfn, use)
        except Exception as problem:
            raise self._failed(f"take({mfn:#x}, {Use(use).name})", _TAKE, problem) from problem
        if not isinstance(answer, int) or not REFUSED <= answer <= VALIDATE:
            raise wrong(self._part, f"take({mfn:#x}, {Use(use).name})", _TAKE, answer)
        if use and answer != REFUSED:
            self._type[mfn] = use
        return answer

    def drop(self, mfn: int, use: int) -> int:
        """One use less: the part's `UNTYPED` and `UNUSED`."""
        try:
            answer = self._part.drop(mfn, use)
        except Exception as problem:
            raise self._failed(f"drop({mfn:#x}, {Use(use).name})", _DROP, problem) from problem
        if not isinstance(answer, int) or not 0 <= answer <= UNTYPED | UNUSED:
            raise wrong(self._part, f"drop({mfn:#x}, {Use(use).name})", _DROP, answer)
        if answer & UNTYPED:
            self._type[mfn] = _NONE
        return answer

    def entry(self, mode: PagingMode, level: str, entry: int, domid: int) -> int:
        """What a present entry makes of its frame.  Raises HypercallError where the part says that it may not stand."""
        mfn = mode.frame_of(entry)
        owner = self._frames.owner[mfn] if mfn < self._frames.count else NOWHERE
        flags = entry & ~mode.frame_mask
        try:
            answer = self._part.entry(level, flags, domid, owner)
        except Exception as problem:
            raise self._failed(f"entry({level!r}, {flags:#x}, {domid}, {owner})", _ENTRY, problem) from problem
        if not isinstance(answer, int) or answer not in _ENTRY_ANSWERS:
            raise wrong(self._part, f"entry({level!r}, {flags:#x}, {domid}, {owner})", _ENTRY, answer)
        if answer < 0:
            raise HypercallError(-answer)
        if owner == NOWHERE:
            did = f"entry({level!r}, {flags:#x}, {domid}, {owner})"
            raise wrong(self._part, did, "a negated errno, since the machine has no such frame", answer)
        return structural(level, entry)

    def _failed(self, did: str, expected: str, problem: Exception) -> XenlabError:
        """What to raise when the part raised ``problem``."""
        if isinstance(problem, XenlabError) and not isinstance(problem, HypercallError):
            return problem
        return wrong(self._part, did, expected, problem)


def structural(level: str, entry: int) -> int:
    """What the MMU makes of the frame that a present entry names."""
    if level == "l1":
        return _WRITE if entry & RW else _READ
    return _L1 if level == "l2" else _L2
