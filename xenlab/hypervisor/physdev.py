"""Physical devices as far as a guest can ask for them: its I/O privilege level, and interrupts (paper 2.1.2, 3.1).

The problem: on an x86 a kernel says by a level in EFLAGS, and by a bitmap in its task segment, who may execute IN,
OUT, CLI and STI.  A guest's kernel may have neither: with them it would reach the real ports and the real interrupt
flag.  So both are virtual.  The guest names a level and a bitmap by hypercalls, and what they allow the
hypervisor carries out on its behalf (`port_io`, `emulate`).

Two readings of the level exist.  In the old one a kernel counts as ring 1, where it really runs, and needs a level of
1.  In the one that ``vm_assist`` switches on it counts as ring 0, as the kernel itself believes; it then finds the
level in the EFLAGS of frames, and sets it by the EFLAGS that it returns with.

The invariant: the real level is 0 for every guest at all times.  What breaks without it: POPF sets the real
interrupt flag, and there is no next trap.

There are no devices, so everything about interrupts and buses is refused: to ordinary domains as Xen does it, to the
initial domain for lack of any.  Numbers and errnos are those of physdev.h and Xen's arch/x86/physdev.c.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from xenlab.abi.numbers import Errno, Hypercall, PhysdevOp, VmAssistType
from xenlab.errors import HypercallError
from xenlab.hypervisor.domain import Vcpu
from xenlab.hypervisor.layout import start_of

if TYPE_CHECKING:
    from xenlab.hypervisor.core import Hypervisor

LEVEL_SHIFT = 12  # of the level in EFLAGS
PORTS = 0x1_0000
_BITMAP_BYTES = PORTS >> 3
_ARCHITECTURAL = 1 << VmAssistType.ARCHITECTURAL_IOPL
_WORD, _TWO_WORDS = 4, 8
# What is only for the domain that has the devices, and how many bytes of its argument are read before it is refused.
_FOR_ITS_OWNER = {
    PhysdevOp.APIC_READ: 12,
    PhysdevOp.APIC_WRITE: 12,
    PhysdevOp.ALLOC_IRQ_VECTOR: _TWO_WORDS,
    PhysdevOp.MAP_PIRQ: 36,
    PhysdevOp.UNMAP_PIRQ: _TWO_WORDS,
    PhysdevOp.MANAGE_PCI_ADD: 2,
    PhysdevOp.MANAGE_PCI_REMOVE: 2,
    PhysdevOp.RESTORE_MSI: 2,
    PhysdevOp.MANAGE_PCI_ADD_EXT: 16,
    PhysdevOp.SETUP_GSI: _TWO_WORDS,
    PhysdevOp.PCI_MMCFG_RESERVED: 16,
    PhysdevOp.PCI_DEVICE_ADD: 12,
    PhysdevOp.PCI_DEVICE_REMOVE: 4,
    PhysdevOp.RESTORE_MSI_EXT: 4,
    PhysdevOp.PREPARE_MSIX: 4,
    PhysdevOp.RELEASE_MSIX: 4,
}


class PhysicalDevices:
    """The hypercall ``physdev_op``."""

    def __init__(self, xen: Hypervisor) -> None:
        self._guest = xen.guest_memory
        xen.hypercalls.register(Hypercall.physdev_op, self.physdev_op)
        xen.hypercalls.register(Hypercall.physdev_op_compat, self.physdev_op_compat)

    def physdev_op(self, vcpu: Vcpu, command: int, address: int, *_: int) -> int:
        """Do one command of physdev.h, with its argument at ``address``."""
        if command == PhysdevOp.SET_IOPL:
            self._set_level(vcpu, self._guest.read_word(vcpu, address))
        elif command == PhysdevOp.SET_IOBITMAP:
            self._set_bitmap(vcpu, *self._guest.read_words(vcpu, address, 2))
        elif command in (PhysdevOp.EOI, PhysdevOp.IRQ_STATUS_QUERY):
            self._guest.read(vcpu, address, _WORD if command == PhysdevOp.EOI else _TWO_WORDS)
            raise HypercallError(Errno.EINVAL)  # there is no interrupt of that number
        elif command == PhysdevOp.GET_FREE_PIRQ:
            self._guest.read(vcpu, address, _TWO_WORDS)
            raise HypercallError(Errno.ENOSPC)
        elif command in _FOR_ITS_OWNER:
            self._guest.read(vcpu, address, _FOR_ITS_OWNER[PhysdevOp(command)])
            raise HypercallError(Errno.ENODEV if vcpu.domain.privileged else Errno.EPERM)
        elif command != PhysdevOp.IRQ_UNMASK_NOTIFY:
            raise HypercallError(Errno.ENOSYS)
        return 0

    def physdev_op_compat(self, vcpu: Vcpu, address: int, *_: int) -> int:
        """As it was before Xen 3.2: the command is the first word of the argument."""
        return self.physdev_op(vcpu, self._guest.read_word(vcpu, address), address + _WORD)

    def _set_level(self, vcpu: Vcpu, level: int) -> None:
        if level > 3:
            raise HypercallError(Errno.EINVAL)
        set_level(vcpu, level)

    def _set_bitmap(self, vcpu: Vcpu, address: int, ports: int) -> None:
        if address + _BITMAP_BYTES > start_of(vcpu.state.mode) or ports > PORTS:
            raise HypercallError(Errno.EINVAL)
        vcpu.io = replace(vcpu.io, bitmap=address, ports=ports)


def is_architectural(vcpu: Vcpu) -> bool:
    """Whether the kernel counts as ring 0, and sees its level."""
    return bool(vcpu.domain.assists & _ARCHITECTURAL)


def set_level(vcpu: Vcpu, level: int) -> None:
    """Give ``vcpu`` the I/O privilege level ``level``."""
    vcpu.io = replace(vcpu.io, level=level)
    show_level(vcpu)


def show_level(vcpu: Vcpu) -> None:
    """Have frames show the level or not, as the guest has chosen."""
    vcpu.shown_level = vcpu.io.level << LEVEL_SHIFT if is_architectural(vcpu) else 0


def level_for(vcpu: Vcpu) -> int:
    """The outermost real ring that is privileged; 0 for none that a guest runs in."""
    return max(vcpu.io.level, 1) if is_architectural(vcpu) else vcpu.io.level
