"""How a kernel starts another virtual CPU: ``VCPUOP_initialise`` and the context that it takes (vcpu.h).

The problem: the first vCPU of a domain is made by the tools.  All others exist from the start as well, but are down
and have nothing to run: what they begin with only the guest's kernel knows.  So it hands over a whole processor in one
structure, ``vcpu_guest_context``: registers, trap table, descriptor tables, page tables, kernel stack, callbacks.  On
a real machine it would send an interrupt that starts a processor at an address, in a state that no guest may be in.

Everything in it is judged as the hypercall that sets it would: frames of descriptors and the root table are checked and
counted, a selector of ring 0 is moved to ring 1, control and debug registers take their own bits only, and bad debug
registers are left as they were.  A segment that cannot be loaded is found when the vCPU first runs, as it is by the
return into it (`segment_registers`).  That it runs is another call: `lifecycle.bring_up`.

What may be refused is looked at first and all at once; the rest cannot fail.  The check of the root table may have to
be made in parts (`preemption`), and then nothing but that check has happened.

The invariant: a vCPU has a root table, counted once, from this call to the end of its domain, or it has never been
initialised; and no vCPU is initialised twice.  What breaks without it: a processor that walks page tables which
nobody has checked, or whose old ones are never given back.

Errnos and the order of checks are those of Xen's arch_set_info_guest for 32-bit guests.
"""

from __future__ import annotations

from contextlib import suppress
from ctypes import sizeof
from typing import TYPE_CHECKING

from xenlab.abi.numbers import Errno, VcpuFlags
from xenlab.abi.structures import VcpuGuestContext
from xenlab.errors import HypercallError
from xenlab.hypervisor import lifecycle
from xenlab.hypervisor.callbacks import callback, failsafe
from xenlab.hypervisor.debug_registers import ENABLED, written
from xenlab.hypervisor.descriptor_tables import GUEST_GDT_PAGES, MOST_GDT_ENTRIES, MOST_LDT_ENTRIES
from xenlab.hypervisor.descriptors import checked_selector
from xenlab.hypervisor.domain import Gate, Vcpu
from xenlab.hypervisor.emulate import CR0_TS, CR4_OWN
from xenlab.hypervisor.exceptions import set_task_switched
from xenlab.hypervisor.page_tables import root_use
from xenlab.hypervisor.physdev import LEVEL_SHIFT, set_level
from xenlab.hypervisor.preemption import Continuation, Preempted
from xenlab.hypervisor.traps import returned_flags, set_gate
from xenlab.machine.engine import GENERAL, SEGMENTS
from xenlab.machine.memory import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from xenlab.hypervisor.core import Hypervisor

_PER_PAGE = MOST_GDT_ENTRIES // GUEST_GDT_PAGES
_U32 = 0xFFFF_FFFF
_DEBUG = (0, 1, 2, 3, 6, 7)


class GuestContexts:
    """Fills vCPUs that have not been initialised."""

    def __init__(self, xen: Hypervisor) -> None:
        self._xen, self._guest = xen, xen.guest_memory

    def initialise(self, vcpu: Vcpu, target: Vcpu, address: int) -> None:
        """Let ``target`` begin with the context at ``address``, once it is up.

        Raises:
            HypercallError: EFAULT where there is none, EEXIST for a vCPU that has begun, EINVAL for tables that
                cannot be; nothing is changed then.
            Continuation: make the call again.
        """
        data = self._guest.read(vcpu, address, sizeof(VcpuGuestContext))
        if target.initialised:
            raise HypercallError(Errno.EEXIST)
        context = VcpuGuestContext.from_buffer_copy(data)
        if context.ldt_base % PAGE_SIZE or context.ldt_ents > MOST_LDT_ENTRIES or context.gdt_ents > MOST_GDT_ENTRIES:
            raise HypercallError(Errno.EINVAL)
        frames = tuple(context.gdt_frames[: -(-context.gdt_ents // _PER_PAGE)])
        self._xen.allowance.begin()
        self._xen.descriptor_tables.take_all(vcpu.domain, frames)
        try:
            root = self._take_root(vcpu, context.ctrlreg[3])
        except (HypercallError, Preempted) as refusal:
            self._xen.descriptor_tables.drop_all(vcpu.domain, frames)
            if isinstance(refusal, Preempted):
                raise Continuation from None
            raise
        self._begin(target, context, frames, root)

    def _take_root(self, vcpu: Vcpu, cr3: int) -> int:
        """The frame of a root table by its number in CR3, where more than 20 bits of it are turned round (xen.h)."""
        mfn = cr3 >> PAGE_SHIFT | cr3 << 32 - PAGE_SHIFT & _U32
        if self._xen.frames.owner_of(mfn) != vcpu.domid:
            raise HypercallError(Errno.EINVAL)
        self._xen.page_tables.take(vcpu.domain, mfn, root_use(vcpu.domain.mode))
        return mfn

    def _begin(self, target: Vcpu, context: VcpuGuestContext, frames: tuple[int, ...], root: int) -> None:
        """Nothing here can fail."""
        target.state.cr3 = root << PAGE_SHIFT
        self._xen.descriptor_tables.install_gdt(target, frames)
        self._xen.descriptor_tables.install_ldt(target, context.ldt_base, context.ldt_ents)
        self._set_entries(target, context)
        _set_control(target, context)
        self._set_registers(target, context)
        set_gate(target)
        if context.flags & VcpuFlags.ONLINE:
            lifecycle.bring_up(self._xen, target)

    def _set_entries(self, target: Vcpu, context: VcpuGuestContext) -> None:
        """Where the kernel is entered: by exceptions, by events, from ring 3, and where registers cannot be loaded."""
        target.traps = [
            Gate(checked_selector(row.cs), row.address, row.flags & 3, bool(row.flags & 4)) if row.address else None
            for row in context.trap_ctxt
        ]
        eip = context.event_callback_eip
        target.event_callback = callback(context.event_callback_cs, eip) if eip else None
        masks = bool(context.flags & VcpuFlags.FAILSAFE_DISABLES_EVENTS)
        target.failsafe_callback = failsafe(context.failsafe_callback_cs, context.failsafe_callback_eip, masks)
        target.kernel_ss, target.kernel_esp = checked_selector(context.kernel_ss & 0xFFFF), context.kernel_sp
        self._xen.cpu.set_inner_stack(target.state, target.kernel_ss, target.kernel_esp)

    def _set_registers(self, target: Vcpu, context: VcpuGuestContext) -> None:
        state, registers = target.state, context.user_regs
        for name in (*GENERAL, "eip"):
            setattr(state, name, getattr(registers, name))
        selectors = {name: getattr(registers, name) for name in SEGMENTS}
        for name in ("cs", "ss"):
            selectors[name] = checked_selector(selectors[name])
        self._xen.exceptions.segment_registers.load_first(target, selectors)
        state.eflags = returned_flags(registers.eflags)
        set_level(target, registers.eflags >> LEVEL_SHIFT & 3)
        if context.flags & VcpuFlags.I387_VALID:
            state.set_floating_point(bytes(context.fpu_ctxt))


def _set_control(target: Vcpu, context: VcpuGuestContext) -> None:
    control = target.control
    control["cr2"], control["cr4"] = context.ctrlreg[2], context.ctrlreg[4] & CR4_OWN
    set_task_switched(target, bool(context.ctrlreg[0] & CR0_TS))
    for number in _DEBUG:
        with suppress(HypercallError):
            control |= written(control, number, context.debugreg[number])
    target.watched = bool(control["dr7"] & ENABLED)


__all__ = ["GuestContexts"]
