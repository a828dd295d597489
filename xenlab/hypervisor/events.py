"""Event channels: how one domain, or the hypervisor, tells another that something happened (paper 3.1).

The problem: a device tells a kernel by an interrupt that there is work.  In a virtual machine the device may
be another domain, which can be neither waited for nor trusted.

The idea: an event is one bit.  A domain has up to 1,024 ports.  Two ports of two domains are bound to each other, and a
send at one sets the other's bit in a page that the receiver shares with the hypervisor.  The
receiver masks single ports, or all upcalls, by a store to that page, without a hypercall::

    port  ->  bit in evtchn_pending, unless in evtchn_mask  ->  bit of the word in evtchn_pending_sel
          ->  evtchn_upcall_pending, unless evtchn_upcall_mask  ->  the guest enters its callback

Each arrow is followed only when the bit before it was 0, so a thousand sends before the receiver looks are one upcall.
The upcall is built like an exception frame, with the mask set, before guest code goes on: behind every
trap, when a vCPU gets its turn, and after something from outside.  ``iret`` takes the mask away and is a trap
too, so what came in between is delivered then.

The invariant: a bit that is set and not masked is followed by an upcall as soon as the guest takes any, and by one
only.  What breaks without it: a lost event lets a guest sleep for ever; a doubled one is served twice.

Errnos and the order of checks are those of Xen's common/event_channel.c, with one exception: an answer that
could not be written is refused before anything is done.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct, iter_unpack
from typing import TYPE_CHECKING

from xenlab.abi.numbers import (
    DOMID_SELF,
    VIRQS,
    Errno,
    EvtchnOp,
    EvtchnStatus,
    Hypercall,
    Virq,
)
from xenlab.abi.structures import SharedInfo, VcpuInfo
from xenlab.errors import HypercallError
from xenlab.hypervisor.domain import VCPUS_PER_DOMAIN, Domain, Port, RunState, Vcpu
from xenlab.hypervisor.trace import NO_DOMAIN, Kind
from xenlab.hypervisor.traps import EVENT, Undeliverable
from xenlab.machine.memory import PAGE_SHIFT
from xenlab.machine.vectors import SOFTWARE

if TYPE_CHECKING:
    from xenlab.hypervisor.core import Hypervisor

PORTS = 1024
ANY_PORT = -1
_PENDING = SharedInfo.evtchn_pending.offset >> 2
MASK_BEHIND = SharedInfo.evtchn_mask.offset - SharedInfo.evtchn_pending.offset >> 2
_UPCALL_MASK, _SELECTOR = VcpuInfo.evtchn_upcall_mask.offset, VcpuInfo.evtchn_pending_sel.offset
_MOST_POLLED = 128
_POLL = Struct("<IIQ")
# The others exist once for the whole machine.
_OF_A_VCPU = frozenset((Virq.TIMER, Virq.DEBUG, Virq.XENOPROF, Virq.XENPMU, Virq.VIRTUAL_TIMER))
# Enum members as plain names: looking one up on its class costs more than what is done with it.
_RUNNABLE = RunState.RUNNABLE
_UPCALL, _EVENT, _SEND = int(Kind.UPCALL), int(Kind.EVENT), int(EvtchnOp.SEND)
_VIRQ, _INTERDOMAIN, _IPI = EvtchnStatus.VIRQ, EvtchnStatus.INTERDOMAIN, EvtchnStatus.IPI
# Where an event stopped: at a bit that was 1 already, at the port's mask, or not before the upcall was pending.
AT_PENDING, AT_MASK, AT_SELECTOR, AT_UPCALL, THROUGH = "pending", "mask", "selector", "upcall", ""
# What an operation gives back: the last words of its argument, as they are written to the guest.
_Answer = tuple[int, ...]


class EventChannels:
    """Ports, their bits, and the upcalls that follow."""

    def __init__(self, xen: Hypervisor) -> None:
        self._xen, self._guest, self._traps = xen, xen.guest_memory, xen.traps
        self._bytes, self._words, self._cpu = xen.memory.bytes, xen.memory.words, xen.cpu
        xen.hypercalls.register(Hypercall.event_channel_op, self.event_channel_op)
        xen.hypercalls.register(Hypercall.event_channel_op_compat, self.event_channel_op_compat)

    # The upcall.

    def upcall(self, vcpu: Vcpu) -> None:
        """Let ``vcpu`` enter its callback if it has events pending and takes them; ended if it cannot be entered."""
        at = vcpu.info
        if not self._bytes[at] or self._bytes[at + _UPCALL_MASK] or vcpu.event_callback is None:
            return
        if vcpu.opened_at >= 0 and vcpu.opened_at == self._cpu.instructions:
            return  # the store that a page table was opened for comes first, and the next trap after it
        try:
            done = self._traps.deliver(vcpu, EVENT, SOFTWARE, 0)
        except Undeliverable as reason:
            self._xen.crash(vcpu, str(reason))
            return
        record = self._xen.recorder
        if record is not None:
            record((self._xen.now, _UPCALL, vcpu.domid, *done))

    def due(self, vcpu: Vcpu) -> bool:
        """Whether events are pending for ``vcpu`` and not masked."""
        return bool(self._bytes[vcpu.info]) and not self._bytes[vcpu.info + _UPCALL_MASK]

    # The bits.

    def set_pending(self, domain: Domain, port: int, sender: int = NO_DOMAIN) -> None:
        """An event for ``domain`` at ``port``, which is in use, from the domain ``sender`` or from the hypervisor."""
        # `_place` and `_wake_pollers`, spelled out: this is done for every event.
        words, bit = self._words, 1 << (port & 31)
        at = (domain.shared_info_mfn << PAGE_SHIFT - 2) + _PENDING + (port >> 5)
        pending, stopped = words[at], AT_PENDING
        if not pending & bit:
            words[at] = pending | bit
            stopped = AT_MASK if words[at + MASK_BEHIND] & bit else self._select(domain, port)
            for vcpu in domain.vcpus:
                if vcpu.polling:
                    self._end_poll(vcpu, port)
        record = self._xen.recorder
        if record is not None:
            record((self._cpu.instructions, _EVENT, domain.domid, port, sender, stopped))

    def _wake_pollers(self, domain: Domain, port: int) -> None:
        for vcpu in domain.vcpus:
            self._end_poll(vcpu, port)

    def _end_poll(self, vcpu: Vcpu, port: int) -> None:
        if vcpu.polling in (ANY_PORT, port):
            self.unblock(vcpu)

    def _place(self, domain: Domain, port: int) -> tuple[int, int]:
        """Where the pending bit of a port stands: the word's number in machine memory, and the bit."""
        return (domain.shared_info_mfn << PAGE_SHIFT - 2) + _PENDING + (port >> 5), 1 << (port & 31)

    def _select(self, domain: Domain, port: int) -> str:
        vcpu = domain.vcpus[domain.ports[port].vcpu]
        at, bit = vcpu.info + _SELECTOR >> 2, 1 << (port >> 5)
        selected = self._words[at]
        if selected & bit:
            return AT_SELECTOR
        self._words[at] = selected | bit
        pending = self._bytes[vcpu.info]
        if pending & 1:
            return AT_UPCALL
        self._bytes[vcpu.info] = pending | 1
        if vcpu.run_state is not _RUNNABLE:
            self.unblock(vcpu)
        return THROUGH

    def unblock(self, vcpu: Vcpu) -> None:
        """End the sleep of ``vcpu``, and what it polls for."""
        vcpu.polling = 0
        self._xen.wake(vcpu)

    def block(self, vcpu: Vcpu) -> None:
        """Unmask upcalls and sleep, unless one is due."""
        self._traps.set_event_mask(vcpu, 0)
        if self.may_sleep(vcpu):
            vcpu.polling = 0
            self._xen.block(vcpu)

    def may_sleep(self, vcpu: Vcpu) -> bool:
        """Whether there is nothing to wait for, with upcalls unmasked."""
        return not self.due(vcpu)

    def poll(self, vcpu: Vcpu, address: int) -> None:
        """Sleep until an event comes at one of the ports of a ``sched_poll``, masked or not, or until its time."""
        ports, count, timeout = _POLL.unpack(self._guest.read(vcpu, address, _POLL.size))
        if count > _MOST_POLLED:
            raise HypercallError(Errno.EINVAL)
        polled = [port for (port,) in iter_unpack("<I", self._guest.read(vcpu, ports, 4 * count))]
        if self.due(vcpu) or any(self._is_pending(vcpu.domain, port) for port in polled):
            return
        # Nothing is ever sent to port 0, and it would look like no poll at all.
        vcpu.polling = (polled[0] if count == 1 else ANY_PORT) or ANY_PORT
        self._xen.block(vcpu)
        self._xen.timers.limit_poll(vcpu, timeout)

    def _is_pending(self, domain: Domain, port: int) -> bool:
        if _checked(port) not in domain.ports:
            return False
        at, bit = self._place(domain, port)
        return bool(self._words[at] & bit)

    def raise_virq(self, virq: Virq) -> None:
        """Something that the hypervisor tells the control domain, if that has bound a port to it."""
        for domain in self._xen.domains.values():
            port = _virq_port(domain, virq) if domain.privileged else None
            if port is not None:
                self.set_pending(domain, port)

    def raise_virq_of(self, vcpu: Vcpu, virq: Virq) -> None:
        """Something that concerns one vCPU, if its domain has bound a port to it."""
        port = _virq_port(vcpu.domain, virq, vcpu.key % VCPUS_PER_DOMAIN)
        if port is not None:
            self.set_pending(vcpu.domain, port)

    def hears(self, vcpu: Vcpu, virq: Virq) -> bool:
        """Whether the domain of ``vcpu`` has bound a port to this event of it."""
        return _virq_port(vcpu.domain, virq, vcpu.key % VCPUS_PER_DOMAIN) is not None

    # The ports.

    def event_channel_op(self, vcpu: Vcpu, command: int, address: int, *_: int) -> int:
        """Do one command of event_channel.h, with its argument at ``address``."""
        if command == _SEND:  # the shortest way, since it is taken most
            self.send(vcpu.domain, self._guest.read_word(vcpu, address))
            return 0
        if command not in _OPERATIONS:
            raise HypercallError(Errno.ENOSYS)
        count, operation = _OPERATIONS[command]
        words = self._guest.read_words(vcpu, address, count)
        if command in _WITH_ANSWER:
            self._guest.check_writable(vcpu, address, 4 * count)
        answer = operation(self, vcpu, words)
        if answer:
            self._guest.write_words(vcpu, address + 4 * (count - len(answer)), answer)
        return 0

    def event_channel_op_compat(self, vcpu: Vcpu, address: int, *_: int) -> int:
        """As it was before Xen 3.2: the command is the first word of the argument."""
        return self.event_channel_op(vcpu, self._guest.read_word(vcpu, address), address + 4)

    def _alloc_unbound(self, vcpu: Vcpu, words: _Answer) -> _Answer:
        """A port that the domain in the upper half of the first word may bind to."""
        domain, remote = self._domain(vcpu, words[0] & 0xFFFF), words[0] >> 16
        _free_port(domain)
        _check_control(vcpu, domain)
        return (self.new_unbound(domain, vcpu.domid if remote == DOMID_SELF else remote),)

    def new_unbound(self, domain: Domain, remote: int) -> int:
        """A new port of ``domain`` that the domain ``remote`` may bind to."""
        port = _free_port(domain)
        domain.ports[port] = Port(EvtchnStatus.UNBOUND, remote=remote)
        return port

    def _bind_interdomain(self, vcpu: Vcpu, words: _Answer) -> _Answer:
        """Connect a new port with one that the other domain has left unbound for this one."""
        domain, remote, theirs = vcpu.domain, self._domain(vcpu, words[0] & 0xFFFF), words[1]
        ours = _free_port(domain)
        found = remote.ports.get(_checked(theirs))
        if found is None or found.status != EvtchnStatus.UNBOUND or found.remote != domain.domid:
            raise HypercallError(Errno.EINVAL)
        domain.ports[ours] = Port(EvtchnStatus.INTERDOMAIN, remote=remote.domid, remote_port=theirs)
        remote.ports[theirs] = Port(EvtchnStatus.INTERDOMAIN, found.vcpu, domain.domid, ours)
        # What the other domain has sent before is not known any more, so something may have been.
        self.set_pending(domain, ours, domain.domid)
        return (ours,)

    def _bind_virq(self, vcpu: Vcpu, words: _Answer) -> _Answer:
        virq, number, _port = words
        if virq >= VIRQS or (virq not in _OF_A_VCPU and number):
            raise HypercallError(Errno.EINVAL)
        _check_vcpu(vcpu.domain, number)
        if _virq_port(vcpu.domain, virq, number) is not None:
            raise HypercallError(Errno.EEXIST)
        port = _free_port(vcpu.domain)
        vcpu.domain.ports[port] = Port(EvtchnStatus.VIRQ, number, virq=virq)
        if virq == Virq.TIMER:
            self._xen.timers.attend(vcpu.domain.vcpus[number])
        return (port,)

    def _bind_ipi(self, vcpu: Vcpu, words: _Answer) -> _Answer:
        _check_vcpu(vcpu.domain, words[0])
        port = _free_port(vcpu.domain)
        vcpu.domain.ports[port] = Port(EvtchnStatus.IPI, words[0])
        return (port,)

    def _close(self, vcpu: Vcpu, words: _Answer) -> _Answer:
        if _checked(words[0]) not in vcpu.domain.ports:
            raise HypercallError(Errno.EINVAL)
        self._free(vcpu.domain, words[0])
        return ()

    def close_all(self, domain: Domain) -> None:
        """``domain`` is destroyed: the ports at the other ends are unbound again."""
        for port in list(domain.ports):
            self._free(domain, port)

    def _free(self, domain: Domain, port: int) -> None:
        closed = domain.ports.pop(port)
        if closed.status == EvtchnStatus.INTERDOMAIN:
            others = self._xen.domains[closed.remote].ports
            kept = others[closed.remote_port].vcpu
            others[closed.remote_port] = Port(EvtchnStatus.UNBOUND, kept, remote=domain.domid)
        at, bit = self._place(domain, port)
        self._words[at] &= ~bit

    def send(self, domain: Domain, port: int) -> None:
        """An event from ``domain`` through its ``port``; nobody hears it while that is unbound.

        Raises:
            HypercallError: EINVAL for a port that cannot send.
        """
        found = domain.ports.get(port)
        if found is None or found.status is _VIRQ:
            raise HypercallError(Errno.EINVAL)
        if found.status is _INTERDOMAIN:
            self.set_pending(self._xen.domains[found.remote], found.remote_port, domain.domid)
        elif found.status is _IPI:
            self.set_pending(domain, port, domain.domid)

    def _status(self, vcpu: Vcpu, words: _Answer) -> _Answer:
        domain = self._domain(vcpu, words[0] & 0xFFFF)
        found = domain.ports.get(_checked(words[1]), Port(EvtchnStatus.CLOSED))
        _check_control(vcpu, domain)
        first, second = words[4:]
        if found.status in (EvtchnStatus.UNBOUND, EvtchnStatus.INTERDOMAIN):
            first = first & 0xFFFF_0000 | found.remote
            second = found.remote_port or second
        elif found.status == EvtchnStatus.VIRQ:
            first = found.virq
        return (found.status, found.vcpu, first, second)

    def _unmask(self, vcpu: Vcpu, words: _Answer) -> _Answer:
        """Clear a port's mask, and let an event that came meanwhile go on from there."""
        domain, port = vcpu.domain, _checked(words[0])
        if port in domain.ports:
            self.clear_mask(domain, port)
        return ()

    def clear_mask(self, domain: Domain, port: int) -> None:
        """The bits of `_unmask`."""
        at, bit = self._place(domain, port)
        was_masked = self._words[at + MASK_BEHIND] & bit
        self._words[at + MASK_BEHIND] &= ~bit
        if was_masked and self._words[at] & bit:
            self._select(domain, port)

    def _bind_vcpu(self, vcpu: Vcpu, words: _Answer) -> _Answer:
        """Choose which vCPU a port's events go to; neither its own timer nor its own signals can be sent elsewhere."""
        port, number = words
        _check_vcpu(vcpu.domain, number)
        found = vcpu.domain.ports.get(_checked(port))
        fixed = found is None or found.status == EvtchnStatus.IPI or found.virq in _OF_A_VCPU
        if found is None or fixed:
            raise HypercallError(Errno.EINVAL)
        vcpu.domain.ports[port] = Port(found.status, number, found.remote, found.remote_port, found.virq)
        return ()

    def _domain(self, vcpu: Vcpu, domid: int) -> Domain:
        found = vcpu.domain if domid == DOMID_SELF else self._xen.domains.get(domid)
        if found is None:
            raise HypercallError(Errno.ESRCH)
        return found


def _checked(port: int) -> int:
    if port >= PORTS:
        raise HypercallError(Errno.EINVAL)
    return port


def _free_port(domain: Domain) -> int:
    """The lowest port that is not in use; 0 never is."""
    for port in range(1, PORTS):
        if port not in domain.ports:
            return port
    raise HypercallError(Errno.ENOSPC)


def _virq_port(domain: Domain, virq: int, number: int = 0) -> int | None:
    """Where ``domain`` has bound ``virq``; for those of a vCPU, where that one has."""
    for port, found in domain.ports.items():
        if found.virq == virq and (virq not in _OF_A_VCPU or found.vcpu == number):
            return port
    return None


def _check_vcpu(domain: Domain, number: int) -> None:
    if number >= len(domain.vcpus):
        raise HypercallError(Errno.ENOENT)


def _check_control(vcpu: Vcpu, domain: Domain) -> None:
    if domain is not vcpu.domain and not vcpu.domain.privileged:
        raise HypercallError(Errno.EPERM)


_WITH_ANSWER = frozenset(
    (EvtchnOp.ALLOC_UNBOUND, EvtchnOp.BIND_INTERDOMAIN, EvtchnOp.BIND_VIRQ, EvtchnOp.BIND_IPI, EvtchnOp.STATUS)
)
# Each command with the size of its argument in words.
_OPERATIONS: dict[int, tuple[int, Callable[[EventChannels, Vcpu, _Answer], _Answer]]] = {
    EvtchnOp.BIND_INTERDOMAIN: (3, EventChannels._bind_interdomain),
    EvtchnOp.BIND_VIRQ: (3, EventChannels._bind_virq),
    EvtchnOp.CLOSE: (1, EventChannels._close),
    EvtchnOp.STATUS: (6, EventChannels._status),
    EvtchnOp.ALLOC_UNBOUND: (2, EventChannels._alloc_unbound),
    EvtchnOp.BIND_IPI: (2, EventChannels._bind_ipi),
    EvtchnOp.BIND_VCPU: (2, EventChannels._bind_vcpu),
    EvtchnOp.UNMASK: (1, EventChannels._unmask),
}
