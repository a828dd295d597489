"""What becomes of an exception (paper 2.1.2, 3.1).

An exception that is not a hypercall is one of these, in this order of asking:

* a store to a page table, which is carried out under supervision (`writable_tables`);
* the CPU's own look into a page of the LDT that it has not been shown yet (`descriptor_tables`);
* a touch of the hypervisor's range, which is a limit violation to the guest;
* a privileged instruction, which is emulated (`emulate`);
* the guest's own affair: it goes to the handler that the guest registered (`traps`), and if there is none, or it
  cannot be entered, the guest is ended with a report.

Two of the last kind change what the guest reads in its virtual registers, as in Xen: after #NM CR0.TS is off, so that
the handler only has to load the floating-point registers of the application that needs them; after #DB DR6 says why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xenlab.abi.numbers import Hypercall
from xenlab.hypervisor.domain import Vcpu
from xenlab.hypervisor.emulate import carry_out
from xenlab.hypervisor.layout import LDT_BASE
from xenlab.hypervisor.preemption import Preempted
from xenlab.hypervisor.trace import Kind
from xenlab.hypervisor.traps import Undeliverable
from xenlab.hypervisor.writable_tables import WritableTables
from xenlab.machine.memory import PAGE_SHIFT
from xenlab.machine.state import CR0_TS
from xenlab.machine.vectors import DEBUG, NO_DEVICE, PAGE_FAULT, PROTECTION, SOFTWARE

if TYPE_CHECKING:
    from xenlab.hypervisor.core import Hypervisor

_U32 = 0xFFFF_FFFF
_LONGEST_INSTRUCTION = 15
# So many faults at an address, with no instruction begun in between, end a guest: all but the first are at fetching.
_TRIPLE = 3
_USER_ACCESS = 4  # in a page fault's error code
_SINGLE_STEP = 0x4000  # in DR6
_TRAP, _DELIVER = int(Kind.TRAP), int(Kind.DELIVER)


class Exceptions:
    """Takes every exception of a guest that is not a hypercall."""

    def __init__(self, xen: Hypervisor) -> None:
        self._xen, self._traps, self._cpu = xen, xen.traps, xen.cpu
        self._open = WritableTables(xen, self._refused_store).open
        xen.hypercalls.register(Hypercall.fpu_taskswitch, self.fpu_taskswitch)

    def handle(self, vcpu: Vcpu, vector: int, error: int, address: int) -> None:
        """Vector, error code and address are the CPU's."""
        if vector >= 32:
            error = SOFTWARE
        elif vector == PAGE_FAULT:
            if self._open(vcpu, error, address):
                return
            if address >= vcpu.address_limit:
                if self._xen.descriptor_tables.page_in_ldt(vcpu, error, address):
                    return
                vector, error, address = self._beyond(vcpu, error, address)
        record = self._xen.recorder
        if record is not None:
            frame, now = vcpu.state.frame(), self._cpu.instructions
            record((now, _TRAP, vcpu.domid, vector, max(error, 0), address, frame[:8], frame[8], frame[9] & 3))
        if error == SOFTWARE:
            vector, error = self._traps.software_interrupt(vcpu, vector)
        elif vector == PROTECTION:
            if error == 0 and self._emulate(vcpu):
                return
        elif vector == NO_DEVICE:
            set_task_switched(vcpu, False)
        elif vector == DEBUG:
            vcpu.control["dr6"] |= _SINGLE_STEP
        self._deliver(vcpu, vector, error, address)

    def fpu_taskswitch(self, vcpu: Vcpu, on: int, *_: int) -> int:
        """Have the next floating-point instruction raise #NM, or not, as a kernel wants that switches applications."""
        set_task_switched(vcpu, bool(on))
        return 0

    def _deliver(self, vcpu: Vcpu, vector: int, error: int, address: int) -> None:
        try:
            done = self._traps.deliver(vcpu, vector, error, address)
        except Undeliverable as reason:
            self._xen.crash(vcpu, str(reason))
            return
        record = self._xen.recorder
        if record is not None:
            record((self._cpu.instructions, _DELIVER, vcpu.domid, vector, *done))
        # A handler that cannot be fetched either would fault for ever while no time passes.
        if address and vcpu.fetch_fault(self._cpu.instructions) == _TRIPLE:
            self._xen.crash(vcpu, f"triple fault: not even the handler at {vcpu.state.eip:#010x} could be fetched")

    def _beyond(self, vcpu: Vcpu, error: int, address: int) -> tuple[int, int, int]:
        """What a touch of the hypervisor's range is to the guest: vector, error code and address.

        The CPU's own look into an LDT that is not there is a page fault at the guest's address.  Anything else
        the segment limits of the paper's machines stop before paging sees it.
        """
        offset, (base, entries) = address - LDT_BASE, vcpu.ldt
        if error & _USER_ACCESS == 0 and 0 <= offset < entries << 3:
            return PAGE_FAULT, error, base + offset & _U32
        return PROTECTION, 0, address

    def _refused_store(self, vcpu: Vcpu, error: int, address: int) -> None:
        """A store to a page table was not allowed after all: the guest gets its page fault."""
        self._deliver(vcpu, PAGE_FAULT, error, address)
        while self._xen.pick_needed:
            self._xen.switch()

    def _emulate(self, vcpu: Vcpu) -> bool:
        xen = self._xen
        code, eip = xen.guest_memory.read_code(vcpu, _LONGEST_INSTRUCTION), vcpu.state.eip
        try:
            changes = carry_out(xen.emulator, vcpu, code, xen.now, self._load_base) if code else None
        except Preempted:
            return True  # the guest executes its instruction again, and the check of the tables goes on
        if changes is None:
            return False
        if "cr0" in changes:
            set_task_switched(vcpu, bool(changes["cr0"] & CR0_TS))
        xen.record(Kind.EMULATE, vcpu.domid, code, eip, tuple(sorted(changes.items())))
        return True

    def _load_base(self, vcpu: Vcpu, cr3: int) -> None:
        """A move to CR3, in which frame numbers of more than 20 bits are turned round (xen.h, xen_cr3_to_pfn)."""
        self._xen.allowance.begin()
        self._xen.mmu.load_base(vcpu, cr3 >> PAGE_SHIFT | cr3 << 32 - PAGE_SHIFT & _U32)


def set_task_switched(vcpu: Vcpu, on: bool) -> None:
    """CR0.TS, the guest's own flag, in the virtual register and in the one that the CPU looks at."""
    vcpu.control["cr0"] = vcpu.control["cr0"] & ~CR0_TS | (CR0_TS if on else 0)
    vcpu.state.set_task_switched(on)
