"""Who changed it: the instruction, the call or the input by which something watched became what it is.

The problem: to compare two moments tells whether something differs, not what happened in between: it may have changed
and changed back.  To look after each instruction would take hours.

The idea: in a guest, only stores change memory, and Unicorn reports those to a few addresses at almost no cost.
Everything else is done by the hypervisor, so what is watched is compared when it is entered and left.  That gives
candidates, in a run at nearly full speed; the timeline goes to each and looks at the instruction itself.

Two things change memory without a report: the MMU, which sets accessed and dirty bits in page tables, and a store that
begins in another page and reaches into this one.  They show at the next comparison, and halving the time
between the two finds them.  Not found is only what such stores do and undo again before the next trap.

The invariant: observing changes nothing; and what is said to be a change is one: the value at its time is not the one
an instruction before.  What breaks without it: an innocent instruction is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from time import perf_counter
from typing import TYPE_CHECKING, Any

from xenlab.abi.numbers import Hypercall
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.trace import NO_DOMAIN, Event, Kind
from xenlab.machine.disassembler import disassemble
from xenlab.machine.fault_code import LONGEST_INSTRUCTION, read_linear
from xenlab.timeline.access_log import in_front_of
from xenlab.timeline.goals import Watch

if TYPE_CHECKING:
    from xenlab.timeline.timeline import Timeline

# A store that is single-stepped into a page table is reported as one of the next instruction.
_REPORTED_LATE = 2
# Instructions that are looked through first: who changed something is mostly near, and some pages change all the time.
_SHORT = 2_000
_PIECE_S = 0.05
Window = tuple[int, int]
_CALLS = {call.value: call.name for call in Hypercall}


class Cause(Enum):
    """How something changed."""

    STORE = "a store of the guest's"
    MMU = "the MMU marked a page-table entry as used"
    HYPERCALL = "a hypercall"
    TRAP = "what the hypervisor did for a trap"
    OUTSIDE = "what was due before the next instruction: an input, the end of a slice"


@dataclass(frozen=True, slots=True)
class Change:
    """Something that was watched changed.

    Attributes:
        time: the first moment at which it was as it then was; the instruction that began last is the one to blame.
        name: what changed.
        before, after: the values.
        difference: between them, for people.
        cause: how.
        domain: who ran, -1 if nobody did.
        address, instruction: what it executed, and at which linear address.
        event: the hypercall, the trap, the store to a page table or the input, if the trace has one.
    """

    time: int
    name: str
    before: Any
    after: Any
    difference: str
    cause: Cause
    domain: int
    address: int
    instruction: str
    event: Event | None

    def __str__(self) -> str:
        return f"{self.time:,}: {self.name} changed by {self.blame} ({self.difference})"

    @property
    def blame(self) -> str:
        """Who did it."""
        event, what = self.event, self.cause.value
        if self.cause is Cause.OUTSIDE:
            return f"the input {event.what}" if event is not None and event.kind is Kind.INPUT else what
        if self.cause is Cause.HYPERCALL and event is not None:
            what = _CALLS.get(event.number, f"hypercall {event.number}")
        return f"domain {self.domain}: {what}, at {self.address:#010x}: {self.instruction}"


class Observer:
    """Compares what is watched where it may have changed, and notes between which moments it did.

    Attributes:
        windows: candidates, ``(after, until)``: changed behind the first moment, and at the second at the latest.
        cause: of the last change, as far as can be seen from the outside.
        stored: whether a guest's store was reported.
    """

    def __init__(self, xen: Hypervisor, watch: Watch) -> None:
        self._xen, self._watch = xen, watch
        self._value = watch.value(xen)
        self._looked = xen.now
        self._store: int | None = None
        self._failure: BaseException | None = None
        self.handler, self._run_until = xen.cpu.handler, xen.cpu.run_until
        self.windows: list[Window] = []
        self.cause, self.stored = Cause.OUTSIDE, False

    def store(self, *_: int) -> None:
        """The guest is about to store; what was stored before is there by now."""
        time = self._xen.cpu.time_in_guest
        if time < 0 or self._failure is not None:
            return
        try:
            self._look(time - 1, Cause.STORE)
            self._store, self.stored = time, True
        except BaseException as failure:
            # It must not cross into libunicorn, where it would be lost.
            self._failure = failure

    def trap(self, vector: int, error: int, address: int) -> None:
        """In place of the hypervisor's own handler."""
        now = self._xen.now
        self._look(now, Cause.STORE)
        self._looked = now - 1
        self.handler(vector, error, address)
        self._look(now, Cause.TRAP)

    def run_until(self, end: int) -> None:
        """In front of the CPU's `run_until`: what was due has been done."""
        now = self._xen.now
        self._look(now + 1, Cause.OUTSIDE)
        self._looked = now
        self._run_until(end)
        self._look(self._xen.now, Cause.STORE)

    def due(self, part: object, name: str) -> Callable[..., Any]:
        """What stands in front of a method that does what is due, which may be long before guest code goes on."""
        plain = getattr(part, name)

        def method(*arguments: Any) -> Any:
            now = self._xen.now
            result = plain(*arguments)
            # A machine that goes idle at a time has done what is due then; any other does it on the way to the next.
            self._looked = min(self._looked, now - 1)
            self._look(now + 1, Cause.OUTSIDE)
            self._looked = now
            return result

        return method

    def finish(self) -> None:
        """The run is over; a machine that went idle has done what was due."""
        self._looked = min(self._looked, self._xen.now - 1)
        self._look(self._xen.now, Cause.OUTSIDE)
        if self._failure is not None:
            raise self._failure

    def _look(self, until: int, cause: Cause) -> None:
        value = self._watch.value(self._xen)
        if value != self._value:
            window = (self._looked, until) if self._store is None else (self._store - _REPORTED_LATE, self._store)
            self.windows.append(window)
            self._value, self.cause = value, cause
        self._store, self._looked = None, until


@contextmanager
def observed(xen: Hypervisor, watch: Watch) -> Iterator[Observer]:
    """Watch ``xen`` within this context, which must begin and end between runs."""
    observer = Observer(xen, watch)
    places = watch.places(xen)
    end = xen.cpu.engine.observe_stores(*places, observer.store) if places is not None else None
    xen.cpu.handler = observer.trap
    try:
        with (
            in_front_of(xen.cpu, {"run_until": observer.run_until}),
            in_front_of(xen.inputs, {"apply_next": observer.due(xen.inputs, "apply_next")}),
            in_front_of(xen.timers, {"expire": observer.due(xen.timers, "expire")}),
        ):
            yield observer
    finally:
        xen.cpu.handler = observer.handler
        if end is not None:
            end()
    observer.finish()


# Finding the moment.


def last_time(timeline: Timeline, watch: Watch, end: int) -> int | None:
    """The last moment, ``end`` or before, at which something changed."""
    for start, stop in _stretches(timeline, end):
        for window in reversed(_windows(timeline, watch, start, stop)):
            time = _last_within(timeline, watch, window)
            if time is not None:
                return time
    return None


def _stretches(timeline: Timeline, end: int) -> Iterator[Window]:
    """The past in pieces, the last one first: a few instructions, and then from snapshot to snapshot."""
    starts = [time for time in timeline.snapshot_times() if time < end - _SHORT]
    for start in (max(end - _SHORT, timeline.start), *reversed(starts)):
        if start < end:
            yield start, end
        end = start


def next_time(timeline: Timeline, watch: Watch, limit: int) -> int | None:
    """The first moment behind the position, and at ``limit`` at the latest, at which something changes."""
    start, at, length = timeline.position, timeline.position, _SHORT
    while at < limit:
        began = perf_counter()
        windows = _windows(timeline, watch, at, min(at + length, limit))
        reached = timeline.position
        times = (_first_within(timeline, watch, (max(window[0], start), window[1])) for window in windows)
        found = next((time for time in times if time is not None), None)
        if found is not None or reached < min(at + length, limit):
            return found
        if perf_counter() - began < _PIECE_S:
            length *= 4
        at = reached
    return None


def _windows(timeline: Timeline, watch: Watch, start: int, end: int) -> list[Window]:
    """Run from ``start`` to ``end`` and give the candidates."""
    timeline.seek(start)
    with observed(timeline.hypervisor, watch) as observer:
        _run_through(timeline, end)
    return observer.windows


def _run_through(timeline: Timeline, end: int) -> None:
    """Go to ``end`` without leaving out what lies before a snapshot; a machine that is idle there does what is due."""
    timeline.run(end - timeline.position)
    timeline.seek(end)


def _last_within(timeline: Timeline, watch: Watch, window: Window) -> int | None:
    after, until = max(window[0], timeline.start), window[1]
    if until - after <= _REPORTED_LATE:
        return max(_changes(timeline, watch, after, until), default=None)
    final = _value_at(timeline, watch, until)
    return _halve(timeline, watch, after, until, lambda value: bool(value == final))


def _first_within(timeline: Timeline, watch: Watch, window: Window) -> int | None:
    after, until = window
    if until - after <= _REPORTED_LATE:
        return min(_changes(timeline, watch, after, until), default=None)
    initial = _value_at(timeline, watch, after)
    return _halve(timeline, watch, after, until, lambda value: bool(value != initial))


def _changes(timeline: Timeline, watch: Watch, after: int, until: int) -> list[int]:
    values = [_value_at(timeline, watch, time) for time in range(after, until + 1)]
    return [after + 1 + step for step, (old, new) in enumerate(pairwise(values)) if old != new]


def _halve(timeline: Timeline, watch: Watch, after: int, until: int, true: Callable[[Any], bool]) -> int | None:
    """The moment at which ``true`` begins to be; None if it is from the start, or not at the end."""
    if true(_value_at(timeline, watch, after)) or not true(_value_at(timeline, watch, until)):
        return None
    while until - after > 1:
        middle = (after + until) // 2
        if true(_value_at(timeline, watch, middle)):
            until = middle
        else:
            after = middle
    return until


def _value_at(timeline: Timeline, watch: Watch, time: int) -> Any:
    timeline.seek(time)
    return watch.value(timeline.hypervisor)


# Telling what happened.


@dataclass(slots=True)
class _Executed:
    """The instruction that was begun last, and by whom."""

    domain: int = NO_DOMAIN
    address: int = 0
    code: bytes = b""


@contextmanager
def _executed(xen: Hypervisor) -> Iterator[_Executed]:
    last = _Executed()

    def begun(_engine: int, address: int, _length: int, _data: int) -> None:
        if xen.cpu.time_in_guest >= 0 and xen.current is not None:
            code = read_linear(xen.memory, xen.cpu.state, address, LONGEST_INSTRUCTION)
            last.domain, last.address, last.code = xen.current.domid, address, code

    end = xen.cpu.engine.observe(begun, lambda *_: None)
    try:
        yield last
    finally:
        end()


def change_at(timeline: Timeline, watch: Watch, time: int) -> Change:
    """Go to ``time``, and say what changed there."""
    xen = timeline.hypervisor
    before = _value_at(timeline, watch, time - 1)
    known = timeline.happened
    with observed(xen, watch) as observer, _executed(xen) as last:
        _run_through(timeline, time)
    after, cause = watch.value(xen), observer.cause
    if cause is Cause.STORE and not observer.stored and watch.is_marking(xen, before, after):
        cause = Cause.MMU
    cause, event = _event_of(cause, time, timeline.last_events(timeline.happened - known))
    if cause is Cause.OUTSIDE:
        last = _Executed()
    instruction = disassemble(last.code, last.address, count=1)[0].text if last.code else ""
    difference = watch.difference(before, after)
    return Change(time, watch.name, before, after, difference, cause, last.domain, last.address, instruction, event)


def _event_of(cause: Cause, time: int, events: list[Event]) -> tuple[Cause, Event | None]:
    """The event that belongs to a change, and what that says about the cause."""
    for kind, better in _TELLING[cause].items():
        found = [event for event in events if event.kind is kind and (better is Cause.OUTSIDE or event.time == time)]
        if found:
            return better, found[-1]
    return cause, None


_TELLING: dict[Cause, dict[Kind, Cause]] = {
    Cause.STORE: {Kind.TABLE_WRITE: Cause.STORE},
    Cause.TRAP: {Kind.HYPERCALL: Cause.HYPERCALL, Kind.TRAP: Cause.TRAP},
    Cause.OUTSIDE: {Kind.INPUT: Cause.OUTSIDE},
    Cause.MMU: {},
}


__all__ = ["Cause", "Change", "Observer", "change_at", "last_time", "next_time", "observed"]
