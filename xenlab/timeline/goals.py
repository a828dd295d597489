"""What a run can be taken to: an event of some kind, or a change of something that is watched.

The problem: "what led here?" is asked of something that is wrong now: a page-table entry, the count of a frame, a
bit.  Nobody knows the time at which it became so, and the trace says what was called, not what came of it.

So there are two kinds of goal.  `When` names events of the trace.  A `Watch` names a part of the machine, and its goal
is the last, or the next, moment at which that part is not what it was an instruction before.

The invariant: `Watch.value` depends on the machine alone and changes nothing in it.  What breaks without it: looking
at a run makes it another one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from xenlab.abi.structures import SharedInfo
from xenlab.errors import TimelineError
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.events import PORTS
from xenlab.hypervisor.frames import TABLES, FrameType
from xenlab.hypervisor.trace import Event, Kind, decode
from xenlab.machine.memory import PAGE_SHIFT, PAGE_SIZE
from xenlab.machine.paging import ACCESSED, DIRTY

_WORD = 4
_SHOWN = 4  # differences
_WITH_VECTOR = (Kind.TRAP, Kind.DELIVER)
_MARKS = int.from_bytes((ACCESSED | DIRTY).to_bytes(_WORD, "little") * (PAGE_SIZE // _WORD), "little")


@dataclass(frozen=True, slots=True)
class When:
    """Events; what is None may be anything.

    Attributes:
        kind: what happened, or any of several things.
        domain: to whom, or whose doing it was.
        vector: of a TRAP, or of the exception that a DELIVER hands to the guest.
        number: of a HYPERCALL; of a RETURN if ``kind`` says so.
        test: what else has to be true of it.
    """

    kind: Kind | frozenset[Kind] | None = None
    domain: int | None = None
    vector: int | None = None
    number: int | None = None
    test: Callable[[Event], bool] | None = None

    def matches(self, raw: tuple[Any, ...]) -> bool:
        """Whether an event, as it was recorded, is meant."""
        kind, domain = raw[1:3]
        if not self._is_kind(kind) or self.domain not in (None, domain):
            return False
        if self.vector is not None and (kind not in _WITH_VECTOR or raw[3] != self.vector):
            return False
        if self.number is not None and not self._is_call(raw):
            return False
        return self.test is None or self.test(decode(raw))

    def _is_kind(self, kind: int) -> bool:
        return kind in self.kind if isinstance(self.kind, frozenset) else self.kind in (None, kind)

    def _is_call(self, raw: tuple[Any, ...]) -> bool:
        if raw[1] == Kind.HYPERCALL:
            return bool(raw[3][0] == self.number)
        return self.kind is Kind.RETURN and bool(raw[3] == self.number)


class Watch(ABC):
    """A part of the machine that is watched."""

    @property
    @abstractmethod
    def name(self) -> str:
        """For people."""

    @abstractmethod
    def value(self, xen: Hypervisor) -> Any:
        """What is there now, as something that can be compared; None where there is no such thing."""

    @abstractmethod
    def places(self, xen: Hypervisor) -> tuple[int, int] | None:
        """The machine addresses, first and end, at which a guest's own stores change it; None if there are none."""

    @abstractmethod
    def difference(self, before: Any, after: Any) -> str:
        """What has changed, for people."""

    def is_marking(self, xen: Hypervisor, before: Any, after: Any) -> bool:
        """Whether it changed no more than the MMU does that walks a page table."""
        del xen, before, after
        return False


@dataclass(frozen=True)
class FrameContent(Watch):
    """The bytes of a machine frame, or some of them.

    Attributes:
        mfn: which frame.
        offset, length: which bytes of it.
    """

    mfn: int
    offset: int = 0
    length: int = PAGE_SIZE

    def __post_init__(self) -> None:
        if self.offset < 0 or self.length < 1 or self.offset + self.length > PAGE_SIZE:
            found = f"{self.length} bytes at {self.offset:#x}"
            raise TimelineError(f"frame {self.mfn:#x}: expected bytes within its {PAGE_SIZE}, found {found}")

    @property
    def name(self) -> str:
        return f"frame {self.mfn:#x}"

    def value(self, xen: Hypervisor) -> bytes:
        first, end = self.places(xen)
        return bytes(xen.memory.bytes[first:end])

    def places(self, xen: Hypervisor) -> tuple[int, int]:
        _check(self.mfn, xen)
        first = (self.mfn << PAGE_SHIFT) + self.offset
        return first, first + self.length

    def difference(self, before: bytes, after: bytes) -> str:
        """Word by word, the first few."""
        places = range(0, len(before), _WORD)
        changes = [at for at in places if before[at : at + _WORD] != after[at : at + _WORD]]
        words = [
            f"{self.offset + at:#05x}: {_number(before, at):#010x} -> {_number(after, at):#010x}"
            for at in changes[:_SHOWN]
        ]
        more = len(changes) - len(words)
        return ", ".join(words) + (f", and {more} words more" if more else "")

    def is_marking(self, xen: Hypervisor, before: bytes, after: bytes) -> bool:
        """Whether only accessed and dirty bits of a page table were set."""
        old, new = (int.from_bytes(value, "little") for value in (before, after))
        whole = self.offset % _WORD == 0 and xen.frames.type[self.mfn] in TABLES
        return whole and old & new == old and not (old ^ new) & ~_MARKS


def _number(value: bytes, at: int) -> int:
    return int.from_bytes(value[at : at + _WORD], "little")


@dataclass(frozen=True)
class FrameUse(Watch):
    """What a machine frame is: owner, type, counts and flags, the row of the frame table."""

    mfn: int
    COLUMNS: ClassVar[tuple[str, ...]] = ("owner", "type", "uses", "refs", "flags")

    @property
    def name(self) -> str:
        return f"use of frame {self.mfn:#x}"

    def value(self, xen: Hypervisor) -> tuple[int, ...]:
        _check(self.mfn, xen)
        return tuple(getattr(xen.frames, column)[self.mfn] for column in self.COLUMNS)

    def places(self, xen: Hypervisor) -> None:
        del xen

    def difference(self, before: tuple[int, ...], after: tuple[int, ...]) -> str:
        rows = zip(self.COLUMNS, before, after, strict=True)
        return ", ".join(f"{name} {_say(name, old)} -> {_say(name, new)}" for name, old, new in rows if old != new)


def _say(column: str, value: int) -> str:
    return FrameType(value).name.lower() if column == "type" else str(value)


def _check(mfn: int, xen: Hypervisor) -> None:
    if not 0 <= mfn < xen.frames.count:
        raise TimelineError(f"frame {mfn:#x}: expected one of the machine's, 0 to {xen.frames.count - 1:#x}")


@dataclass(frozen=True)
class PendingPort(Watch):
    """The pending bit of an event channel: set by a send, cleared by the guest."""

    domid: int
    port: int

    def __post_init__(self) -> None:
        if not 0 <= self.port < PORTS:
            raise TimelineError(f"port: expected 0 to {PORTS - 1}, found {self.port}")

    @property
    def name(self) -> str:
        return f"port {self.port} of domain {self.domid}"

    def value(self, xen: Hypervisor) -> int | None:
        places = self.places(xen)
        return None if places is None else xen.memory.words[places[0] >> 2] >> self.port % 32 & 1

    def places(self, xen: Hypervisor) -> tuple[int, int] | None:
        domain = xen.domains.get(self.domid)
        if domain is None:
            return None
        first = (domain.shared_info_mfn << PAGE_SHIFT) + SharedInfo.evtchn_pending.offset + self.port // 32 * _WORD
        return first, first + _WORD

    def difference(self, before: int | None, after: int | None) -> str:
        says = {None: "no such domain", 0: "not pending", 1: "pending"}
        return f"{says[before]} -> {says[after]}"


__all__ = ["FrameContent", "FrameUse", "PendingPort", "Watch", "When"]
