"""The hypercalls that need no mechanism of their own: traps, stack, console, version, scheduling.

Each function is one hypercall: it checks its arguments, and then acts.  The numbers, argument
orders and errnos are Xen's (xen.h, sched.h, version.h).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xenlab.abi.numbers import (
    ConsoleIo,
    Errno,
    Hypercall,
    SchedOp,
    Shutdown,
    VmAssist,
    VmAssistType,
    XenVersion,
)
from xenlab.errors import HypercallError
from xenlab.hypervisor.descriptors import checked_selector
from xenlab.hypervisor.domain import VECTORS, Vcpu
from xenlab.hypervisor.layout import start_of
from xenlab.hypervisor.trace import Kind
from xenlab.hypervisor.traps import Undeliverable, gates_from_table, set_gate
from xenlab.machine.memory import PAGE_SIZE

if TYPE_CHECKING:
    from xenlab.hypervisor.core import Hypervisor

XEN_MAJOR, XEN_MINOR, EXTRA_VERSION = 4, 17, b".0-xenlab"
CAPABILITIES = b"xen-3.0-x86_32 xen-3.0-x86_32p "
_CONSOLE_LIMIT = 16 * PAGE_SIZE
# Of one write; the trace keeps a fixed number of events, and so a bounded number of bytes.
_RECORDED_BYTES = 1024
_TRAP_INFO = 8
_FEATURES = 1 << 4 | 1 << 5 | 1 << 16  # pae_pgdir_above_4gb, mmu_pt_update_preserve_ad, not_direct_mapped


class Services:
    """Hypercalls served by the hypervisor itself."""

    def __init__(self, hypervisor: Hypervisor) -> None:
        self._xen = hypervisor
        self._guest = hypervisor.guest_memory
        table = hypervisor.hypercalls
        table.register(Hypercall.set_trap_table, self.set_trap_table)
        table.register(Hypercall.stack_switch, self.stack_switch)
        table.register(Hypercall.iret, self.iret)
        table.register(Hypercall.console_io, self.console_io)
        table.register(Hypercall.xen_version, self.xen_version)
        table.register(Hypercall.sched_op, self.sched_op)
        table.register(Hypercall.vm_assist, self.vm_assist)

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
        except Undeliverable as reason:
            self._xen.crash(vcpu, str(reason))
            return 0
        self._xen.record(Kind.IRET, vcpu.domain.domid, ring, vcpu.state.eip)
        return eax

    def console_io(self, vcpu: Vcpu, command: int, count: int, address: int, *_: int) -> int:
        """Write to or read from the domain's console.

        Returns:
            0 for a write; for a read the number of bytes, which may be 0.
        """
        # The count is a signed int of Xen's; a huge one is a negative one.
        if count > _CONSOLE_LIMIT:
            raise HypercallError(Errno.EINVAL)
        domain = vcpu.domain
        if command == ConsoleIo.WRITE:
            data = self._guest.read(vcpu, address, count)
            domain.write_console(data)
            self._xen.record(Kind.CONSOLE, domain.domid, data[:_RECORDED_BYTES])
            return 0
        if command == ConsoleIo.READ:
            data = bytes(domain.console_in[:count])
            self._guest.write(vcpu, address, data)
            del domain.console_in[: len(data)]
            return len(data)
        raise HypercallError(Errno.ENOSYS)

    def xen_version(self, vcpu: Vcpu, command: int, address: int, *_: int) -> int:
        """Tell the guest what it runs on."""
        if not command:  # VERSION, the cheapest hypercall there is
            return XEN_MAJOR << 16 | XEN_MINOR
        if command == XenVersion.PAGESIZE:
            return PAGE_SIZE
        if command == XenVersion.GET_FEATURES:
            if any(self._guest.read(vcpu, address, 8)[:4]):  # there is one word of features
                raise HypercallError(Errno.EINVAL)
            self._guest.write(vcpu, address + 4, _FEATURES.to_bytes(4, "little"))
            return 0
        answer = self._version_answer(vcpu, command)
        if answer is None:
            raise HypercallError(Errno.ENOSYS)
        self._guest.write(vcpu, address, answer)
        return 0

    def _version_answer(self, vcpu: Vcpu, command: int) -> bytes | None:
        compiled = (b"xenlab".ljust(64, b"\0"), b"xenlab".ljust(16, b"\0"), bytes(32), bytes(32))
        start = start_of(vcpu.state.mode)
        answers: dict[int, bytes] = {
            XenVersion.EXTRAVERSION: EXTRA_VERSION.ljust(16, b"\0"),
            XenVersion.COMPILE_INFO: b"".join(compiled),
            XenVersion.CAPABILITIES: CAPABILITIES.ljust(1024, b"\0"),
            XenVersion.CHANGESET: bytes(64),
            XenVersion.PLATFORM_PARAMETERS: start.to_bytes(4, "little"),
            XenVersion.GUEST_HANDLE: vcpu.domain.domid.to_bytes(16, "little"),
            XenVersion.COMMANDLINE: bytes(1024),
        }
        return answers.get(command)

    def vm_assist(self, vcpu: Vcpu, command: int, kind: int, *_: int) -> int:
        """Switch a help for ported kernels on or off; the one that does anything here is writable page tables."""
        if command not in (VmAssist.ENABLE, VmAssist.DISABLE) or kind not in VmAssistType._value2member_map_:
            raise HypercallError(Errno.ENOSYS if command > VmAssist.DISABLE else Errno.EINVAL)
        if kind == VmAssistType.WRITABLE_PAGETABLES:
            vcpu.domain.writable_tables = command == VmAssist.ENABLE
        return 0

    def sched_op(self, vcpu: Vcpu, command: int, address: int, *_: int) -> int:
        """Yield the CPU, sleep until something happens, or end the domain."""
        if command == SchedOp.YIELD:
            self._xen.reschedule()
        elif command == SchedOp.BLOCK:
            self._xen.events.block(vcpu)
        elif command == SchedOp.POLL:
            self._xen.events.poll(vcpu, address)
        elif command == SchedOp.SHUTDOWN:
            reason = self._guest.read_word(vcpu, address) & 0xFF
            if reason > max(Shutdown):
                raise HypercallError(Errno.EINVAL)
            self._xen.shut_down(vcpu.domain, Shutdown(reason))
        else:
            raise HypercallError(Errno.ENOSYS)
        return 0
