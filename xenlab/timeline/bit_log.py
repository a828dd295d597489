"""Every change of the event bits in a run, with the instruction that made it (lesson 08; paper 3.1).

The problem: a guest masks a port, or clears a bit, by a plain store to the page that it shares with the hypervisor.  No
trap tells of it, so it is in no trace.

So the run is made once instruction by instruction, and after each the bits are compared with those before.  The record
holds for every replay of the same timeline.

The invariant: between two changes that are recorded the bits stand still.  What breaks without it: a picture
that shows a bit and cannot say who set it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from xenlab.hypervisor.core import Stop
from xenlab.hypervisor.event_bits import Bits, bits_of
from xenlab.hypervisor.trace import Kind
from xenlab.timeline.timeline import Timeline

_BY_HYPERVISOR = frozenset((Kind.HYPERCALL, Kind.EVENT, Kind.INPUT, Kind.UPCALL))


@dataclass(frozen=True, slots=True)
class BitChange:
    """One instruction's changes of one domain's bits.

    Attributes:
        time: behind the instruction.
        domid: whose bits.
        before, after: all of them.
        eip: where the CPU went on.
        by_guest: whether it was a store of the guest's own, and not the hypervisor.
    """

    time: int
    domid: int
    before: Bits
    after: Bits
    eip: int
    by_guest: bool

    def cleared(self, port: int) -> bool:
        """Whether the pending bit of ``port`` went from 1 to 0."""
        return bool(self.before.pending & ~self.after.pending & 1 << port)


@dataclass(frozen=True, slots=True)
class BitLog:
    """The changes of a run, in the order of time."""

    changes: Sequence[BitChange] = ()

    def until(self, time: int) -> Sequence[BitChange]:
        """Those up to ``time``."""
        return self.changes[: bisect_right(self.changes, time, key=lambda change: change.time)]

    def served(self, domid: int, port: int, time: int, until: int) -> int | None:
        """When the bit of ``port`` was next cleared after ``time``, None if it was not by ``until``."""
        changes = self.until(until)
        return next((c.time for c in changes if c.time > time and c.domid == domid and c.cleared(port)), None)


def record_bits(timeline: Timeline, instructions: int) -> BitLog:
    """Run so far, or until nobody can run, write down every change, and come back to where the run began."""
    xen, began, changes = timeline.hypervisor, timeline.position, list[BitChange]()
    before = {domid: bits_of(xen, domain) for domid, domain in xen.domains.items()}
    for _ in range(instructions):
        known = len(xen.trace or ())
        stop = timeline.run(1).stop
        new = {raw[1] for raw in xen.trace.newest(len(xen.trace) - known)} if xen.trace is not None else set()
        for domid, domain in xen.domains.items():
            after, old = bits_of(xen, domain), before.get(domid, Bits(0, 0, 0, 0, 0))
            if after != old:
                eip = xen.current.state.eip if xen.current is not None else 0
                changes.append(BitChange(timeline.position, domid, old, after, eip, not new & _BY_HYPERVISOR))
                before[domid] = after
        if stop is Stop.IDLE:
            break
    timeline.seek(began)
    return BitLog(changes)


__all__ = ["BitChange", "BitLog", "record_bits"]
