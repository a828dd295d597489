"""The hypercalls that need no mechanism of their own: traps, stack, console, helps, scheduling.

Each function is one hypercall: it checks its arguments, and then acts.  The numbers, argument
orders and errnos are Xen's (xen.h, sched.h).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from xenlab.abi.numbers import (
    ConsoleIo,
    Errno,
    Hypercall,
    SchedOp,
    Shutdown,
    VmAssist,
    VmAssistType,
)
from xenlab.errors import HypercallError
from xenlab.hypervisor.callbacks import Callbacks
from xenlab.hypervisor.control_interface import ControlInterface
from xenlab.hypervisor.debug_registers import DebugRegisters
from xenlab.hypervisor.descriptors import checked_selector
from xenlab.hypervisor.domain import VECTORS, Domain, Vcpu
from xenlab.hypervisor.physdev import PhysicalDevices, show_level
from xenlab.hypervisor.preemption import Continuation
from xenlab.hypervisor.trace import Kind
from xenlab.hypervisor.traps import BadReturn, Undeliverable, gates_from_table, set_gate
from xenlab.hypervisor.version import Version
from xenlab.machine.memory import PAGE_SIZE

if TYPE_CHECKING:
    from xenlab.hypervisor.core import Hypervisor

_CONSOLE_LIMIT, _LARGEST_INT = 16 * PAGE_SIZE, 0x7FFF_FFFF
# Of one write; the trace keeps a fixed number of events, and so a bounded number of bytes.
_RECORDED_BYTES = 1024
_TRAP_INFO = 8
_WATCHDOGS = 2
_PROCESSORS = 1
# As plain numbers: looking a member up on its class costs more than what is done with it.
_YIELD, _BLOCK = int(SchedOp.YIELD), int(SchedOp.BLOCK)


class Services:
    """Hypercalls served by the hypervisor itself, those of the small files beside this one included."""

    def __init__(self, hypervisor: Hypervisor) -> None:
        self._xen = hypervisor
        self._guest = hypervisor.guest_memory
        table = hypervisor.hypercalls
        table.register(Hypercall.set_trap_table, self.set_trap_table)
        table.register(Hypercall.stack_switch, self.stack_switch)
        table.register(Hypercall.iret, self.iret)
        table.register(Hypercall.console_io, self.console_io)
        table.register(Hypercall.sched_op, self.sched_op)
        table.register(Hypercall.sched_op_compat, self.sched_op_compat)
        table.register(Hypercall.vm_assist, self.vm_assist)
        for more in (Version, Callbacks, PhysicalDevices, DebugRegisters, ControlInterface):
            more(hypervisor)

    def set_trap_table(self, vcpu: Vcpu, address: int, *_: int) -> int:
        """Register exception handlers from an array of ``trap_info`` that ends with address 0.

        A null pointer unregisters all.  An array that cannot be read to its end changes nothing.
        """
        if not address:
            vcpu.traps = [None] * VECTORS
            set_gate(vcpu)
            return 0
        for vector, gate in gates_from_table(self._trap_rows(vcpu, address)).items():
            vcpu.traps[vector] = gate
        set_gate(vcpu)
        return 0

    def _trap_rows(self, vcpu: Vcpu, address: int) -> list[tuple[int, int, int, int]]:
        rows: list[tuple[int, int, int, int]] = []
        # A row more than there are vectors: the terminator of a full table.
        for number in range(VECTORS + 1):
            row = self._guest.read(vcpu, address + number * _TRAP_INFO, _TRAP_INFO)
            handler = int.from_bytes(row[4:], "little")
            if not handler:
                break
            rows.append((row[0], row[1], int.from_bytes(row[2:4], "little"), handler))
        return rows

    def stack_switch(self, vcpu: Vcpu, ss: int, esp: int, *_: int) -> int:
        """Set the stack on which the kernel is entered from ring 3."""
        vcpu.kernel_ss, vcpu.kernel_esp = checked_selector(ss & 0xFFFF), esp
        self._xen.cpu.set_inner_stack(vcpu.state, vcpu.kernel_ss, esp)
        set_gate(vcpu)
        return 0

    def iret(self, vcpu: Vcpu, *_: int) -> int:
        """Return from an exception handler; the answer is the EAX that the frame held."""
        try:
            ring, eax = self._xen.traps.iret(vcpu)
        except BadReturn as fault:
            self._xen.exceptions.refuse_return(vcpu, fault)
            return fault.eax
        except Undeliverable as reason:
            self._xen.crash(vcpu, str(reason))
            return 0
        self._xen.record(Kind.IRET, vcpu.domain.domid, ring, vcpu.state.eip)
        vcpu.nmi_masked = False
        self._xen.exceptions.take_nmi(vcpu)
        return eax

    def console_io(self, vcpu: Vcpu, command: int, count: int, address: int, *_: int) -> int:
        """Write to or read from the domain's console.

        Returns:
            0 for a write; for a read the number of bytes, which may be 0.
        """
        domain = vcpu.domain
        if command == ConsoleIo.WRITE:
            self._print(vcpu, count, address)
            return 0
        if command != ConsoleIo.READ:
            raise HypercallError(Errno.ENOSYS)
        if count > _LARGEST_INT:  # it could not be told from an errno
            raise HypercallError(Errno.E2BIG)
        data = bytes(domain.console_in[:count])
        self._guest.write(vcpu, address, data)
        del domain.console_in[: len(data)]
        return len(data)

    def _print(self, vcpu: Vcpu, count: int, address: int) -> None:
        """Print so many bytes; a long text page by page, up to where it cannot be read, and the rest in a call of its
        own."""
        part = count if count <= _CONSOLE_LIMIT else PAGE_SIZE
        data = self._guest.read(vcpu, address, part)
        vcpu.domain.write_console(data)
        self._xen.record(Kind.CONSOLE, vcpu.domid, data[:_RECORDED_BYTES])
        if part < count:
            raise Continuation(ecx=count - part, edx=address + part)

    def vm_assist(self, vcpu: Vcpu, command: int, kind: int, *_: int) -> int:
        """Switch a help for ported kernels on or off.

        Two do something here: stores to page tables are carried out, and the I/O privilege level is where a kernel
        looks for it (`physdev`).
        """
        if kind not in VmAssistType._value2member_map_:
            raise HypercallError(Errno.EINVAL)
        if command not in (VmAssist.ENABLE, VmAssist.DISABLE):
            raise HypercallError(Errno.ENOSYS)
        domain, bit = vcpu.domain, 1 << kind
        domain.assists = domain.assists & ~bit | (bit if command == VmAssist.ENABLE else 0)
        domain.writable_tables = bool(domain.assists & 1 << VmAssistType.WRITABLE_PAGETABLES)
        for each in domain.vcpus:
            show_level(each)
            set_gate(each)
        return 0

    def sched_op(self, vcpu: Vcpu, command: int, address: int, *_: int) -> int:
        """Yield the CPU, sleep until something happens, or end a domain."""
        if command == _YIELD:
            self._xen.reschedule()
        elif command == _BLOCK:
            self._xen.events.block(vcpu)
        elif command == SchedOp.POLL:
            self._xen.events.poll(vcpu, address)
        elif command == SchedOp.SHUTDOWN:
            self._shut_down(vcpu.domain, self._guest.read_word(vcpu, address))
        elif command in _SCHEDULING:
            return _SCHEDULING[command](self, vcpu, address)
        else:
            raise HypercallError(Errno.ENOSYS)
        return 0

    def sched_op_compat(self, vcpu: Vcpu, command: int, reason: int, *_: int) -> int:
        """As it was before Xen 3.1: the reason of a shutdown stands in the register itself."""
        if command == SchedOp.SHUTDOWN:
            self._shut_down(vcpu.domain, reason)
            return 0
        if command not in (SchedOp.YIELD, SchedOp.BLOCK):
            raise HypercallError(Errno.ENOSYS)
        return self.sched_op(vcpu, command, 0)

    def _shut_down(self, domain: Domain, reason: int) -> None:
        code = _reason(reason)
        self._xen.shut_down(domain, code if domain.shutdown_code is None else domain.shutdown_code)

    def _remote_shutdown(self, vcpu: Vcpu, address: int) -> int:
        """The control domain ends another."""
        domid, reason = self._guest.read_words(vcpu, address, 2)
        domain = self._xen.domains.get(domid & 0xFFFF)
        if domain is None:
            raise HypercallError(Errno.ESRCH)
        if not vcpu.domain.privileged:
            raise HypercallError(Errno.EPERM)
        if not domain.ended:
            self._shut_down(domain, reason)
        return 0

    def _shutdown_code(self, vcpu: Vcpu, address: int) -> int:
        """Say now why the domain will have ended; the first to say so counts."""
        reason = self._guest.read_word(vcpu, address)
        if vcpu.domain.shutdown_code is None:
            vcpu.domain.shutdown_code = _reason(reason)
        return 0

    def _watchdog(self, vcpu: Vcpu, address: int) -> int:
        """Set, set again or stop one of the two watchdogs, which end the domain after so many seconds (`timers`)."""
        number, timeout = self._guest.read_words(vcpu, address, 2)
        domain = vcpu.domain
        if number > _WATCHDOGS or not (number or timeout) or (number and not domain.watchdogs >> number - 1 & 1):
            raise HypercallError(Errno.EINVAL)
        if not number:
            number = next((n for n in range(1, _WATCHDOGS + 1) if not domain.watchdogs >> n - 1 & 1), 0)
            if not number:
                raise HypercallError(Errno.ENOSPC)
            domain.watchdogs |= 1 << number - 1
            self._xen.timers.watch(domain.domid, number, timeout)
            return number
        if not timeout:
            domain.watchdogs &= ~(1 << number - 1)
        self._xen.timers.watch(domain.domid, number, timeout)
        return 0

    def _pin_override(self, vcpu: Vcpu, address: int) -> int:
        """Bind the control domain's vCPU to a processor; there is one, and it runs there anyway."""
        if not vcpu.domain.privileged:
            raise HypercallError(Errno.EPERM)
        processor = self._guest.read_word(vcpu, address)
        if _PROCESSORS <= processor < 1 << 31:
            raise HypercallError(Errno.EINVAL)
        return 0


def _reason(reason: int) -> Shutdown:
    """The lowest byte of what a guest says; Xen takes any, we those that exist."""
    if reason & 0xFF > max(Shutdown):
        raise HypercallError(Errno.EINVAL)
    return Shutdown(reason & 0xFF)


_SCHEDULING: dict[int, Callable[[Services, Vcpu, int], int]] = {
    SchedOp.REMOTE_SHUTDOWN: Services._remote_shutdown,
    SchedOp.SHUTDOWN_CODE: Services._shutdown_code,
    SchedOp.WATCHDOG: Services._watchdog,
    SchedOp.PIN_OVERRIDE: Services._pin_override,
}
