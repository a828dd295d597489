"""A domain's console as the interface has it: two rings of bytes in a page that the guest and the tools share.

The problem: a guest's messages have to reach a person, and what the person types the guest.  The hypervisor's
own call, ``console_io``, is for its own messages and for the initial domain; every other domain has a page
with `ConsoleRing` in it.  Each ring has a producer and a consumer index that only ever count up; a byte's place is its
number modulo the size.  Who produces writes the bytes first and its index then, so neither side waits for the other::

                 out_cons          out_prod
                     |                 |
    out  . . . . . . H e l l o \\n . . . . .        the guest produces, the daemon consumes
    in   . . l s \\n . . . . . . . . . . . .        the daemon produces, the guest consumes
             |       |
          in_cons in_prod

The invariant: whatever a guest writes into its page, the daemon touches nothing but that page, and takes no more
from it at once than the ring holds.  Indices that are further apart than the ring is long mean nothing: then nothing
is read, and nothing written, until they make sense again.  What breaks without it: a guest that counts its index
backwards has the daemon read four gigabytes.

What the daemon does to the machine comes in through the queue of inputs, like all that comes from outside.  There
are no event channels yet: nobody tells the daemon that there is something to read, nor the guest, which has to look.
Paper 2.3, 3.2.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from xenlab.abi.structures import ConsoleRing
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.frames import FrameType
from xenlab.hypervisor.inputs import Typed
from xenlab.hypervisor.trace import Kind
from xenlab.machine.memory import PAGE_SHIFT, PAGE_SIZE

IN_BYTES, OUT_BYTES = ConsoleRing.input.size, ConsoleRing.out.size
_U32 = 0xFFFF_FFFF
# Of one reading; the trace keeps a bounded number of bytes.
_RECORDED_BYTES = 1024
# What the page may be used as: a page table is written by nobody but the hypervisor.
_DATA = frozenset((FrameType.NONE, FrameType.WRITABLE))


@dataclass(frozen=True, slots=True)
class DrainConsole:
    """The daemon takes what a guest has written into its ring."""

    domid: int

    def apply(self, hypervisor: Hypervisor) -> None:
        """Do it; nothing where there is no ring or nothing in it."""
        domain = hypervisor.domains.get(self.domid)
        ring = ring_of(hypervisor, domain)
        if domain is None or ring is None or not written(ring):
            return
        data = _read(ring.out, ring.out_cons, written(ring))
        ring.out_cons = ring.out_prod
        _forget_code(hypervisor, domain)
        domain.write_console(data)
        hypervisor.record(Kind.CONSOLE, domain.domid, data[:_RECORDED_BYTES])


@dataclass(frozen=True, slots=True)
class FeedConsole:
    """The daemon puts typed bytes into a guest's ring; those for which there is no room are lost."""

    domid: int
    data: bytes

    def apply(self, hypervisor: Hypervisor) -> None:
        """Do it, and wake a guest that sleeps."""
        domain = hypervisor.domains.get(self.domid)
        ring = ring_of(hypervisor, domain)
        if domain is None or ring is None:
            return
        data = self.data[: room(ring)]
        for number, byte in enumerate(data, ring.in_prod):
            ring.input[number % IN_BYTES] = byte
        ring.in_prod = ring.in_prod + len(data) & _U32
        _forget_code(hypervisor, domain)
        for vcpu in domain.vcpus:
            hypervisor.wake(vcpu)


def ring_of(hypervisor: Hypervisor, domain: Domain | None) -> ConsoleRing | None:
    """The ring in the domain's memory, in place; None if it has none, or has made something else of the page."""
    mfn, frames = (domain.console_mfn if domain else 0), hypervisor.frames
    if domain is None or not mfn or frames.owner_of(mfn) != domain.domid or frames.type[mfn] not in _DATA:
        return None
    return ConsoleRing.from_buffer(hypervisor.memory.frame(mfn))


def written(ring: ConsoleRing) -> int:
    """How many bytes a guest has written that nobody has read; 0 for indices that mean nothing."""
    count: int = ring.out_prod - ring.out_cons & _U32
    return count if count <= OUT_BYTES else 0


def room(ring: ConsoleRing) -> int:
    """How many more bytes can be put into the ring for a guest to read; 0 for indices that mean nothing."""
    count: int = ring.in_prod - ring.in_cons & _U32
    return max(0, IN_BYTES - count)


def _read(ring: ctypes.Array[ctypes.c_uint8], start: int, count: int) -> bytes:
    first = start % len(ring)
    return (bytes(ring) * 2)[first : first + count]


def _forget_code(hypervisor: Hypervisor, domain: Domain) -> None:
    """A guest may well execute its console page; the CPU has to see what is written into it."""
    start = domain.console_mfn << PAGE_SHIFT
    hypervisor.cpu.forget_code(start, start + PAGE_SIZE)


class ConsoleDaemon:
    """Between a domain's console and whoever watches it.

    A guest may read what is typed from its ring, or by ``CONSOLEIO_read``.  It is offered in both places until
    the guest has taken some from one of them, and there alone from then on.

    Args:
        hypervisor: where the domain is.
        domain: whose console it is.
    """

    def __init__(self, hypervisor: Hypervisor, domain: Domain) -> None:
        self._xen, self._domain = hypervisor, domain
        self._ring_reads, self._calls_read = False, not domain.console_mfn
        # What is still to be put into the ring; how many bytes were; how many were offered to the call.
        self._waiting, self._fed, self._offered = b"", 0, 0

    @property
    def unread(self) -> int:
        """How many bytes were typed that the guest has not read."""
        self._notice()
        if not self._ring_reads:
            return len(self._domain.console_in)
        ring = ring_of(self._xen, self._domain)
        return len(self._waiting) + (0 if ring is None else IN_BYTES - room(ring))

    def type(self, data: bytes) -> None:
        """Somebody types.  Without any ``data`` a sleeping guest is woken, as by a key that it may have missed."""
        self._notice()
        if not self._calls_read:
            self._waiting += data
        if self._ring_reads:
            data = b""
        self._offered += len(data)
        self._xen.submit(Typed(self._domain.domid, data))

    def attend(self) -> None:
        """Take what the guest has written, and put in what there is room for.  Once between two runs."""
        self._notice()
        ring = ring_of(self._xen, self._domain)
        if ring is None:
            return
        if written(ring):
            self._xen.submit(DrainConsole(self._domain.domid))
        if data := self._waiting[: room(ring)]:
            self._waiting = self._waiting[len(data) :]
            self._fed += len(data)
            self._xen.submit(FeedConsole(self._domain.domid, data))

    def _notice(self) -> None:
        """See where the guest reads, once all that was typed has come to it."""
        if self._ring_reads or self._calls_read or self._xen.inputs.next_time() is not None:
            return
        ring = ring_of(self._xen, self._domain)
        if len(self._domain.console_in) < self._offered:
            self._calls_read, self._waiting = True, b""
        # Nobody but the daemon counts in_prod up: if it is something else, the page is used for something else.
        elif ring is not None and ring.in_prod == self._fed and 0 < ring.in_cons <= self._fed:
            self._ring_reads = True
