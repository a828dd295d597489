"""``vcpu_op``: what a kernel asks about its virtual CPUs, and where it wants their records (vcpu.h).

A kernel may have its `vcpu_info`, with the event bits and the time record, in a page of its own instead of in the
shared-information page.  That page is then used by the hypervisor: it counts as one more writable use, so the frame
cannot become a page table, and is given back when the domain ends.

Two more records are copies that are written to a linear address of the guest's when the vCPU gets the CPU: how long
it was in each state (`accounting`), and the time (`clocks`).  If nothing is mapped there, nothing is written.

Most commands may be given for any vCPU of one's own domain: a kernel starts the others (`guest_context`), brings them
up and takes them down.  Alarms only the vCPU itself sets, and its `vcpu_info` it moves itself, or another one while it
is down.

The invariant: the hypervisor writes where the guest's kernel itself could have written.  What breaks without it: a
record laid over a page table.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from xenlab.abi.numbers import VCPU_SSHOTTMR_FUTURE, Errno, Hypercall, VcpuOp
from xenlab.errors import HypercallError
from xenlab.hypervisor import lifecycle
from xenlab.hypervisor.accounting import runstate
from xenlab.hypervisor.alarms import REAL
from xenlab.hypervisor.clocks import INSTRUCTION_NS, to_instructions, to_ns
from xenlab.hypervisor.domain import VCPU_INFO_BYTES, RunState, Vcpu
from xenlab.hypervisor.guest_context import GuestContexts
from xenlab.hypervisor.layout import start_of
from xenlab.hypervisor.page_entries import Use
from xenlab.hypervisor.page_types import REFUSED
from xenlab.machine.memory import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from xenlab.hypervisor.core import Hypervisor

# State, since when, and the four times, all in nanoseconds; without padding for a 32-bit guest.
_RUNSTATE = struct.Struct("<IQ4Q")
_SINGLE_SHOT = struct.Struct("<QI")
_INFO = struct.Struct("<QII")
_TIME_BYTES = 32
_SHORTEST_TICK_NS, _LONGEST_TICK_NS = 1_000_000, (1 << 63) - 1
_SELECTOR = 4


class VcpuOps:
    """The commands of ``vcpu_op``."""

    def __init__(self, xen: Hypervisor) -> None:
        self._xen, self._guest, self._contexts = xen, xen.guest_memory, GuestContexts(xen)
        xen.hypercalls.register(Hypercall.vcpu_op, self.vcpu_op)

    def vcpu_op(self, vcpu: Vcpu, command: int, number: int, address: int, *_: int) -> int:
        """Do one command for vCPU ``number`` of the caller's domain, with its argument at ``address``."""
        if number >= len(vcpu.domain.vcpus):
            raise HypercallError(Errno.ENOENT)
        if command not in _COMMANDS:
            raise HypercallError(Errno.ENOSYS)
        return _COMMANDS[command](self, vcpu, vcpu.domain.vcpus[number], address) or 0

    def switched_to(self, vcpu: Vcpu) -> None:
        """``vcpu``, which asked for it, gets the CPU: its record of states is written."""
        if vcpu.runstate_area:
            self.copy_out(vcpu, vcpu.runstate_area, self._runstate_record(vcpu))

    def copy_out(self, vcpu: Vcpu, address: int, record: bytes) -> None:
        """Write a record to the guest, if it has memory there."""
        with suppress(HypercallError):
            self._guest.write(vcpu, address, record)

    def release(self, vcpu: Vcpu) -> None:
        """Give back the page that the vCPU's record stood in: the vCPU ends."""
        if vcpu.info_mfn:
            self._xen.page_tables.drop(vcpu.domain, vcpu.info_mfn, Use.WRITE)
            vcpu.info_mfn = 0

    def _runstate_record(self, vcpu: Vcpu) -> bytes:
        state, since, times = runstate(self._xen, vcpu)
        return _RUNSTATE.pack(state, to_ns(since), *map(to_ns, times))

    def _initialise(self, vcpu: Vcpu, target: Vcpu, address: int) -> None:
        self._contexts.initialise(vcpu, target, address)

    def _up(self, _vcpu: Vcpu, target: Vcpu, _address: int) -> None:
        if not target.initialised:
            raise HypercallError(Errno.EINVAL)
        lifecycle.bring_up(self._xen, target)

    def _down(self, _vcpu: Vcpu, target: Vcpu, _address: int) -> None:
        lifecycle.take_down(self._xen, target)

    def _is_up(self, _vcpu: Vcpu, target: Vcpu, _address: int) -> int:
        return target.run_state is not RunState.DOWN

    def _get_runstate(self, vcpu: Vcpu, target: Vcpu, address: int) -> None:
        self._guest.write(vcpu, address, self._runstate_record(target))

    def _register_runstate(self, vcpu: Vcpu, target: Vcpu, address: int) -> None:
        target.runstate_area = self._area(vcpu, address, _RUNSTATE.size)
        self._xen.timers.attend(target)
        # Through the page tables of the one that asks, as all that is written before the call is over.
        self.copy_out(vcpu, target.runstate_area, self._runstate_record(target))

    def _register_time(self, vcpu: Vcpu, target: Vcpu, address: int) -> None:
        target.time_area = self._area(vcpu, address, _TIME_BYTES)
        self._xen.clocks.refresh(target, vcpu)

    def _area(self, vcpu: Vcpu, address: int, size: int) -> int:
        """The linear address in the first of the two words at ``address``."""
        area = self._guest.read_words(vcpu, address, 2)[0]
        if area + size > start_of(vcpu.domain.mode):
            raise HypercallError(Errno.EFAULT)
        return area

    def _set_periodic(self, vcpu: Vcpu, target: Vcpu, address: int) -> None:
        period = int.from_bytes(self._guest.read(vcpu, address, 8), "little")
        if not _SHORTEST_TICK_NS <= period <= _LONGEST_TICK_NS:
            raise HypercallError(Errno.EINVAL)
        self._xen.timers.set_tick(target, to_instructions(period))

    def _stop_periodic(self, _vcpu: Vcpu, target: Vcpu, _address: int) -> None:
        self._xen.timers.set_tick(target, 0)

    def _set_single_shot(self, vcpu: Vcpu, target: Vcpu, address: int) -> None:
        _check_own(vcpu, target)
        at, flags = _SINGLE_SHOT.unpack(self._guest.read(vcpu, address, _SINGLE_SHOT.size))
        if flags & VCPU_SSHOTTMR_FUTURE and at < to_ns(self._xen.now):
            raise HypercallError(Errno.ETIME)
        # A signed number to Xen, and what is long past goes off at once.
        self._xen.timers.set_alarm(vcpu, REAL, INSTRUCTION_NS if at >> 63 or not at else at)

    def _stop_single_shot(self, vcpu: Vcpu, target: Vcpu, _address: int) -> None:
        _check_own(vcpu, target)
        self._xen.timers.set_alarm(vcpu, REAL, 0)

    def _register_info(self, vcpu: Vcpu, target: Vcpu, address: int) -> None:
        """Have the record of a vCPU at a place of its own from now on, where all its events are found pending."""
        mfn, offset, _unused = _INFO.unpack(self._guest.read(vcpu, address, _INFO.size))
        frames = self._xen.frames
        fits = offset <= PAGE_SIZE - VCPU_INFO_BYTES and offset % 4 == 0
        stands_still = target is vcpu or target.run_state is RunState.DOWN
        if not fits or target.info_mfn or not stands_still or frames.owner_of(mfn) != vcpu.domid:
            raise HypercallError(Errno.EINVAL)
        if self._xen.page_tables.types.take(mfn, Use.WRITE) == REFUSED:
            raise HypercallError(Errno.EINVAL)
        memory, place = self._xen.memory.bytes, (mfn << PAGE_SHIFT) + offset
        memory[place : place + VCPU_INFO_BYTES] = memory[target.info : target.info + VCPU_INFO_BYTES]
        self._xen.cpu.forget_code(mfn << PAGE_SHIFT, mfn + 1 << PAGE_SHIFT)
        target.info, target.info_mfn = place, mfn
        # What came meanwhile must not be lost; a kernel can cope with finding nothing.
        self._xen.memory.words[place + _SELECTOR >> 2] = 0xFFFF_FFFF
        memory[place] |= 1

    def _send_nmi(self, vcpu: Vcpu, target: Vcpu, address: int) -> None:
        if address:
            raise HypercallError(Errno.EINVAL)
        target.nmi_pending = True
        if target is not vcpu:
            self._xen.events.unblock(target)  # it finds the NMI when it gets the CPU
        elif self._xen.allowance.shared:
            self._xen.reschedule()  # behind the batch, which may have to be called again
        else:
            self._xen.exceptions.take_nmi(target)

    def _get_physid(self, _vcpu: Vcpu, _target: Vcpu, _address: int) -> None:
        raise HypercallError(Errno.EINVAL)  # no vCPU is bound to a physical one


def _check_own(vcpu: Vcpu, target: Vcpu) -> None:
    if target is not vcpu:
        raise HypercallError(Errno.EINVAL)


_COMMANDS: dict[int, Callable[[VcpuOps, Vcpu, Vcpu, int], int | None]] = {
    VcpuOp.INITIALISE: VcpuOps._initialise,
    VcpuOp.UP: VcpuOps._up,
    VcpuOp.DOWN: VcpuOps._down,
    VcpuOp.IS_UP: VcpuOps._is_up,
    VcpuOp.GET_RUNSTATE_INFO: VcpuOps._get_runstate,
    VcpuOp.REGISTER_RUNSTATE_MEMORY_AREA: VcpuOps._register_runstate,
    VcpuOp.SET_PERIODIC_TIMER: VcpuOps._set_periodic,
    VcpuOp.STOP_PERIODIC_TIMER: VcpuOps._stop_periodic,
    VcpuOp.SET_SINGLESHOT_TIMER: VcpuOps._set_single_shot,
    VcpuOp.STOP_SINGLESHOT_TIMER: VcpuOps._stop_single_shot,
    VcpuOp.REGISTER_VCPU_INFO: VcpuOps._register_info,
    VcpuOp.SEND_NMI: VcpuOps._send_nmi,
    VcpuOp.GET_PHYSID: VcpuOps._get_physid,
    VcpuOp.REGISTER_VCPU_TIME_MEMORY_AREA: VcpuOps._register_time,
}
