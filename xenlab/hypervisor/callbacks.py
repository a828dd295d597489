"""Callbacks: where the hypervisor enters a guest's kernel for what is no exception (paper 3.1).

The problem: besides its table of exception handlers a kernel has to say where it takes events, where a return to
it goes that failed, where system calls by SYSENTER and SYSCALL arrive, and where an NMI does.  Old kernels name
the first two in one hypercall, later ones name each on its own.

The invariant: a callback is entered in a ring that is not the hypervisor's: a selector of ring 0 is moved to ring 1.
What breaks without it: a guest has its own code run in ring 0.

Of these the ones for SYSENTER and SYSCALL are never entered: on the emulated CPU both instructions fault.  For the
failsafe callback see `segment_registers`.

Numbers and errnos are those of callback.h, nmi.h and Xen's arch/x86/pv/callback.c for 32-bit guests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xenlab.abi.numbers import FLAT_RING1_CS, CallbackOp, CallbackType, Errno, Hypercall, NmiOp
from xenlab.errors import HypercallError
from xenlab.hypervisor.descriptors import checked_selector
from xenlab.hypervisor.domain import Gate, Vcpu
from xenlab.machine.vectors import NMI

if TYPE_CHECKING:
    from xenlab.hypervisor.core import Hypervisor


_MASKS_EVENTS = 1  # CALLBACKF_mask_events in callback.h


class Callbacks:
    """The hypercalls that register them."""

    def __init__(self, xen: Hypervisor) -> None:
        self._guest = xen.guest_memory
        xen.hypercalls.register(Hypercall.set_callbacks, self.set_callbacks)
        xen.hypercalls.register(Hypercall.callback_op, self.callback_op)
        xen.hypercalls.register(Hypercall.nmi_op, self.nmi_op)

    def set_callbacks(self, vcpu: Vcpu, event_cs: int, event_eip: int, cs: int = 0, eip: int = 0, *_: int) -> int:
        """Register the event callback, and one for a vCPU whose segment registers cannot be loaded any more."""
        vcpu.event_callback = callback(event_cs, event_eip)
        vcpu.failsafe_callback = failsafe(cs, eip, False)
        return 0

    def callback_op(self, vcpu: Vcpu, command: int, address: int, *_: int) -> int:
        """Register or unregister one callback; all but that for NMIs can only be replaced."""
        if command == CallbackOp.REGISTER:
            kind, cs, eip = self._guest.read_words(vcpu, address, 3)
            return _register(vcpu, _known(kind), cs, eip, kind >> 16)
        if command != CallbackOp.UNREGISTER:
            raise HypercallError(Errno.EINVAL)
        if _known(self._guest.read_word(vcpu, address)) != CallbackType.NMI:
            raise HypercallError(Errno.EINVAL)
        vcpu.traps[NMI] = None
        return 0

    def nmi_op(self, vcpu: Vcpu, command: int, address: int, *_: int) -> int:
        """Register or unregister the handler of NMIs, which is a row of the trap table."""
        if command == NmiOp.REGISTER:
            eip, _pad = self._guest.read_words(vcpu, address, 2)
            return _register(vcpu, CallbackType.NMI, FLAT_RING1_CS, eip)
        if command != NmiOp.UNREGISTER:
            raise HypercallError(Errno.ENOSYS)
        vcpu.traps[NMI] = None
        return 0


def _known(word: int) -> CallbackType:
    """The type in the lower half of a first word; flags stand in the upper one."""
    try:
        return CallbackType(word & 0xFFFF)
    except ValueError:
        raise HypercallError(Errno.ENOSYS) from None


def _register(vcpu: Vcpu, kind: CallbackType, cs: int, eip: int, flags: int = 0) -> int:
    if kind == CallbackType.EVENT:
        vcpu.event_callback = callback(cs, eip)
    elif kind == CallbackType.FAILSAFE:
        vcpu.failsafe_callback = failsafe(cs, eip, bool(flags & _MASKS_EVENTS))
    elif kind == CallbackType.NMI:
        # Whatever segment was named; at address 0 there is no handler.
        vcpu.traps[NMI] = callback(FLAT_RING1_CS, eip) if eip else None
    return 0


def callback(cs: int, eip: int) -> Gate:
    """Where events are taken, or NMIs."""
    return Gate(checked_selector(cs & 0xFFFF), eip, 0, True)


def failsafe(cs: int, eip: int, masks_events: bool) -> Gate | None:
    """Where a return goes that failed; at address 0 there is no such callback."""
    return Gate(checked_selector(cs & 0xFFFF), eip, 0, masks_events) if eip else None
