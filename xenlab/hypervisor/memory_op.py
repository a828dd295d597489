"""The hypercall with which a domain gets and returns memory: `memory_op` (paper 3.3.4).

A balloon driver in the guest calls it: to give memory back it takes pages from its own allocator, unmaps them and
calls decrease; to have more it calls populate, and puts the new pages into its allocator.

Answers are Xen's (common/memory.c).  Those that work on a list of extents answer how many were
done, which is 0 for a list that cannot be read; only questions answer with an errno.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from xenlab.abi.numbers import DOMID_SELF, Errno, Hypercall, MemoryOp
from xenlab.errors import HypercallError, MachineError
from xenlab.hypervisor.domain import Domain, Vcpu
from xenlab.hypervisor.foreign import named_domain
from xenlab.hypervisor.frames import OWNED
from xenlab.hypervisor.layout import start_of
from xenlab.hypervisor.preemption import Continuation
from xenlab.hypervisor.trace import HAS, Kind

if TYPE_CHECKING:
    from xenlab.hypervisor.core import Hypervisor

_COMMAND_BITS = 6
_MOST_EXTENTS = 0xFFFF_FFFF >> _COMMAND_BITS
# The largest extents: of a guest's and of the control domain's calls.
_MOST_ORDER, _CONTROL_ORDER = 9, 18
_RESERVATION_BYTES = 20
_EXTENT_COST = 4


@dataclass(frozen=True, slots=True)
class Extents:
    """A ``xen_memory_reservation``.

    Attributes:
        list_at: linear address of a list of frame numbers, 0 for none.
        count: how many.
        order: each stands for ``2**order`` frames.
        domid: whose reservation is meant.
    """

    list_at: int
    count: int
    order: int
    domid: int


class MemoryOps:
    """The commands of `memory_op`."""

    def __init__(self, xen: Hypervisor) -> None:
        self._xen, self._guest, self._frames = xen, xen.guest_memory, xen.frames
        xen.hypercalls.register(Hypercall.memory_op, self.memory_op)

    def memory_op(self, vcpu: Vcpu, command: int, address: int, *_: int) -> int:
        """Do the command in the lowest bits of ``command``, from the extent in the other bits on."""
        start, command = command >> _COMMAND_BITS, command & (1 << _COMMAND_BITS) - 1
        if command in self._on_extents:
            return self._extents(vcpu, command, address, start)
        if command == MemoryOp.EXCHANGE:
            return self._exchange(vcpu, address)
        if command == MemoryOp.MAXIMUM_RAM_PAGE:
            return self._frames.count
        if command in (MemoryOp.CURRENT_RESERVATION, MemoryOp.MAXIMUM_RESERVATION):
            domain = self._domain(vcpu, self._guest.read_word(vcpu, address) & 0xFFFF)
            return domain.pages if command == MemoryOp.CURRENT_RESERVATION else domain.most_pages
        if command == MemoryOp.MACHPHYS_MAPPING:
            start = start_of(vcpu.domain.mode)
            self._guest.write_words(vcpu, address, (start, start + 4 * self._frames.count, self._frames.count - 1))
            return 0
        raise HypercallError(Errno.ENOSYS)

    def _domain(self, vcpu: Vcpu, domid: int) -> Domain:
        return named_domain(self._xen.domains, vcpu.domain, DOMID_SELF if domid == vcpu.domid else domid)

    def _read(self, vcpu: Vcpu, address: int) -> Extents:
        words = self._guest.read_words(vcpu, address, _RESERVATION_BYTES // 4)
        return Extents(words[0], words[1], words[2], words[4] & 0xFFFF)

    def _extents(self, vcpu: Vcpu, command: int, address: int, start: int) -> int:
        try:
            extents = self._read(vcpu, address)
            domain = self._domain(vcpu, extents.domid)
        except HypercallError:
            return start
        if extents.count > _MOST_EXTENTS or extents.order > _most_order(vcpu):
            return start
        before = domain.pages
        try:
            return self._in_turn(vcpu, command, domain, extents, start)
        finally:
            if domain.pages != before:
                self._xen.record(Kind.MEMORY, domain.domid, HAS, domain.pages)

    def _in_turn(self, vcpu: Vcpu, command: int, domain: Domain, extents: Extents, start: int) -> int:
        allowance, one = self._xen.allowance, self._on_extents[command]
        allowance.begin()
        for number in range(start, extents.count):
            if allowance.left <= 0:
                raise Continuation(ebx=command | number << _COMMAND_BITS)
            allowance.left -= _EXTENT_COST << extents.order
            try:
                one(self, vcpu, domain, extents, extents.list_at + 4 * number)
            except (HypercallError, MachineError):
                return number
        return max(start, extents.count)

    def _increase(self, vcpu: Vcpu, domain: Domain, extents: Extents, at: int) -> None:
        if extents.list_at:
            self._guest.check_writable(vcpu, at, 4)
        first = self._xen.reservations.allocate(domain, 1, extents.order)[0]
        if extents.list_at:
            self._guest.write_words(vcpu, at, (first,))

    def _decrease(self, vcpu: Vcpu, domain: Domain, extents: Extents, at: int) -> None:
        first = self._guest.read_word(vcpu, at)
        for mfn in range(first, first + (1 << extents.order)):
            if not self._xen.reservations.give_up(domain, mfn):
                raise HypercallError(Errno.EINVAL)

    def _populate(self, vcpu: Vcpu, domain: Domain, extents: Extents, at: int) -> None:
        pfn = self._guest.read_word(vcpu, at)
        self._guest.check_writable(vcpu, at, 4)
        taken = self._xen.reservations.allocate(domain, 1, extents.order)
        self._number(taken, pfn)
        self._guest.write_words(vcpu, at, (taken[0],))

    def _number(self, frames: list[int], pfn: int) -> None:
        for offset, mfn in enumerate(frames):
            self._frames.m2p[mfn] = pfn + offset & 0xFFFF_FFFF

    _on_extents: ClassVar[dict[int, Callable[..., None]]] = {
        int(MemoryOp.INCREASE_RESERVATION): _increase,
        int(MemoryOp.DECREASE_RESERVATION): _decrease,
        int(MemoryOp.POPULATE_PHYSMAP): _populate,
    }

    def _exchange(self, vcpu: Vcpu, address: int) -> int:
        """Give up frames to which nothing else refers, for as many others, in pieces of another size."""
        given, wanted = self._read(vcpu, address), self._read(vcpu, address + _RESERVATION_BYTES)
        done_at = address + 2 * _RESERVATION_BYTES
        done = self._guest.read_word(vcpu, done_at)
        self._guest.check_writable(vcpu, done_at, 4)
        domain = self._exchanging(vcpu, given, wanted, done)
        # As many extents at a time as make up one of the larger size.
        order = max(given.order, wanted.order)
        inputs, outputs = 1 << order - given.order, 1 << order - wanted.order
        allowance = self._xen.allowance
        allowance.begin()
        while done < given.count:
            if allowance.left <= 0:
                raise Continuation()
            allowance.left -= 2 * _EXTENT_COST << order
            at = wanted.list_at + 4 * (done // inputs * outputs)
            self._trade(vcpu, domain, (given, given.list_at + 4 * done, inputs), (wanted, at, outputs))
            done += inputs
            self._guest.write_words(vcpu, done_at, (done,))
        return 0

    def _exchanging(self, vcpu: Vcpu, given: Extents, wanted: Extents, done: int) -> Domain:
        if max(given.order, wanted.order) > _most_order(vcpu):
            raise HypercallError(Errno.EPERM)
        same = given.count << given.order == wanted.count << wanted.order and given.domid == wanted.domid
        whole = given.count % (1 << max(wanted.order - given.order, 0)) == 0
        if not same or not whole or done > given.count or max(given.count, wanted.count) > _MOST_EXTENTS:
            raise HypercallError(Errno.EINVAL)
        return self._domain(vcpu, given.domid)

    def _trade(
        self, vcpu: Vcpu, domain: Domain, given: tuple[Extents, int, int], wanted: tuple[Extents, int, int]
    ) -> None:
        (extents, at, count), (out, out_at, out_count) = given, wanted
        firsts = [self._guest.read_word(vcpu, at + 4 * number) for number in range(count)]
        frames = [first + offset for first in firsts for offset in range(1 << extents.order)]
        if len(set(frames)) != len(frames) or not all(self._only_owned(domain, mfn) for mfn in frames):
            raise HypercallError(Errno.EINVAL)
        numbers = [self._guest.read_word(vcpu, out_at + 4 * number) for number in range(out_count)]
        self._guest.check_writable(vcpu, out_at, 4 * out_count)
        try:
            taken = self._frames_for(domain, out_count, out.order)
        except MachineError:
            raise HypercallError(Errno.ENOMEM) from None
        for mfn in frames:
            self._xen.reservations.give_up(domain, mfn)
        for number, pfn in enumerate(numbers):
            piece = taken[number << out.order : number + 1 << out.order]
            self._number(piece, pfn)
            self._guest.write_words(vcpu, out_at + 4 * number, (piece[0],))

    def _frames_for(self, domain: Domain, count: int, order: int) -> list[int]:
        """New frames beside the old ones, which the domain has for a moment more than it may."""
        domain.most_pages += count << order
        try:
            return self._xen.reservations.allocate(domain, count, order)
        finally:
            domain.most_pages -= count << order

    def _only_owned(self, domain: Domain, mfn: int) -> bool:
        """Whether owning it is the only reference to a frame of the domain's."""
        frames = self._frames
        if frames.owner_of(mfn) != domain.domid or mfn == domain.shared_info_mfn:
            return False
        return bool(frames.flags[mfn] & OWNED) and frames.refs[mfn] == 1


def _most_order(vcpu: Vcpu) -> int:
    return _CONTROL_ORDER if vcpu.domain.privileged else _MOST_ORDER
