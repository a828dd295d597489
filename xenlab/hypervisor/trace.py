"""What happened, as it happens: the record that views, replay and grading read.

The problem: a picture of a run must come from the run, and recording must not change it or
slow it to a crawl.  So an event is one tuple of plain values, kept in a ring of fixed size;
nothing is formatted until somebody looks.

The invariant: the same run gives the same events, to the bit, on every machine; an event
holds nothing that depends on the host.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from itertools import islice
from typing import Any

NO_DOMAIN = -1
# What a MEMORY event counts: pages that a domain has, may have at most, and should have.
HAS, MOST, TARGET = "has", "most", "target"
DEFAULT_CAPACITY = 1 << 17


class Kind(IntEnum):
    """Kinds of event, and the values that follow time, kind and domain in each."""

    TRAP = 0  # vector, error code, address, registers, eip, ring
    HYPERCALL = 1  # the frame on entry, decoded to number, registers, eip
    RETURN = 2  # number, result
    EMULATE = 3  # code bytes, eip, changes as a tuple of (name, value)
    DELIVER = 4  # vector, from ring, to ring, handler's eip, frame address, frame words
    IRET = 5  # to ring, eip
    SWITCH = 6  # from vcpu, to vcpu (-1: none), slice in instructions
    CONSOLE = 7  # bytes written, the first 1,024 of one write
    DOMAIN = 8  # what happened to it, in one word
    CRASH = 9  # reason
    INPUT = 10  # description of something from outside
    FLUSH = 11  # reason, linear address of a single page or 0
    TABLE_WRITE = 12  # frame of the l1 table, changes as a tuple of (index, old, new), whether they were kept
    REFUSED = 13  # frame of the table, index, entry, errno
    MEMORY = 14  # how many pages a domain has, may have, should have: which of these, and the number
    UPCALL = 15  # from ring, to ring, callback's eip, frame address, frame words
    TIMER = 16  # vcpu, which of its timers went off
    GATE = 17  # the same as DELIVER, of what the CPU did without the hypervisor
    EVENT = 18  # port of the domain that it is for, who sent it (-1: the hypervisor), where it stopped (`events`)
    FAILSAFE = 19  # from ring, to ring, callback's eip, frame address, frame words


FIELDS: dict[Kind, tuple[str, ...]] = {
    Kind.TRAP: ("vector", "error", "address", "registers", "eip", "ring"),
    Kind.HYPERCALL: ("number", "registers", "eip"),
    Kind.RETURN: ("number", "result"),
    Kind.EMULATE: ("code", "eip", "changes"),
    Kind.DELIVER: ("vector", "from_ring", "to_ring", "handler", "frame", "words"),
    Kind.IRET: ("to_ring", "eip"),
    Kind.SWITCH: ("from_vcpu", "to_vcpu", "slice"),
    Kind.CONSOLE: ("data",),
    Kind.DOMAIN: ("change",),
    Kind.CRASH: ("reason",),
    Kind.INPUT: ("what",),
    Kind.FLUSH: ("reason", "address"),
    Kind.TABLE_WRITE: ("table", "changes", "kept"),
    Kind.REFUSED: ("table", "index", "entry", "errno"),
    Kind.MEMORY: ("what", "pages"),
    Kind.FAILSAFE: ("from_ring", "to_ring", "handler", "frame", "words"),
    Kind.GATE: ("vector", "from_ring", "to_ring", "handler", "frame", "words"),
    Kind.UPCALL: ("from_ring", "to_ring", "handler", "frame", "words"),
    Kind.TIMER: ("vcpu", "timer"),
    Kind.EVENT: ("port", "sender", "stopped"),
}


@dataclass(frozen=True, slots=True)
class Event:
    """One decoded event.

    Attributes:
        time: instructions begun on the CPU when it happened.
        kind: what it is.
        domain: the domain's id, -1 for none.
        values: the rest, by name; see `FIELDS`.
    """

    time: int
    kind: Kind
    domain: int
    values: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(f"a {self.kind.name} event has no {name!r}; it has {sorted(self.values)}") from None


class Trace:
    """A ring of events.

    Args:
        capacity: how many events are kept; the oldest go first.  None: all.

    Attributes:
        record: append one event tuple ``(time, kind, domain, *values)``.
    """

    __slots__ = ("_ring", "record")

    def __init__(self, capacity: int | None = DEFAULT_CAPACITY) -> None:
        # A list where nothing is ever dropped: a replay moves whole stretches of it at once.
        self._ring: deque[tuple[Any, ...]] | list[tuple[Any, ...]] = [] if capacity is None else deque(maxlen=capacity)
        self.record = self._ring.append

    def raw(self) -> list[tuple[Any, ...]]:
        """The events that are kept, oldest first, as they were recorded."""
        return list(self._ring)

    def events(self, kind: Kind | None = None) -> list[Event]:
        """The events that are kept, decoded, oldest first; only those of ``kind`` if given."""
        return [decode(raw) for raw in self._ring if kind is None or raw[1] == kind]

    def newest(self, count: int) -> list[tuple[Any, ...]]:
        """The last ``count`` events as they were recorded, newest first."""
        return list(islice(reversed(self._ring), count))

    def rewind(self, length: int) -> list[tuple[Any, ...]]:
        """Take away all events behind the first ``length``, and give them, newest first."""
        gone = self.newest(max(0, len(self._ring) - length))
        if isinstance(self._ring, list):
            del self._ring[length:]
        else:
            for _ in gone:
                self._ring.pop()
        return gone

    def extend(self, events: Iterable[tuple[Any, ...]]) -> None:
        """Append many, oldest first."""
        self._ring.extend(events)

    def clear(self) -> None:
        """Forget everything."""
        self._ring.clear()

    def __len__(self) -> int:
        return len(self._ring)


def decode(raw: tuple[Any, ...]) -> Event:
    """An event from the tuple that was recorded."""
    kind = Kind(raw[1])
    if kind is Kind.HYPERCALL:  # recorded as it stood on entry, since this is the most frequent one
        frame = raw[3]
        raw = (*raw[:3], frame[0], frame[:8], frame[8])
    return Event(raw[0], kind, raw[2], dict(zip(FIELDS[kind], raw[3:], strict=True)))
