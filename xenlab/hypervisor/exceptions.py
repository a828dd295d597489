"""What becomes of an exception (paper 2.1.2, 3.1).

An exception that is not a hypercall is one of these, in this order of asking:

* a store to a page table, which is carried out under supervision (`writable_tables`);
* the CPU's own look into a page of the LDT that it has not been shown yet (`descriptor_tables`);
* a touch of the hypervisor's range, which is a limit violation to the guest;
* a privileged instruction, which is emulated (`emulate`, `port_io`), or CPUID behind a prefix that asks for it
  (`virtual_cpuid`);
* the guest's own affair: it goes to the handler that the guest registered (`traps`), and if there is none, or it
  cannot be entered, the guest is ended with a report.

Two of the last kind change what the guest reads in its virtual registers, as in Xen: after #NM CR0.TS is off, so that
the handler only has to load the floating-point registers of the application that needs them; after #DB DR6 says why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xenlab.abi.numbers import Errno, Hypercall
from xenlab.errors import HypercallError
from xenlab.hypervisor.bounce import BounceDelivery
from xenlab.hypervisor.breakpoints import Breakpoints
from xenlab.hypervisor.debug_registers import SINGLE_STEP
from xenlab.hypervisor.domain import Vcpu
from xenlab.hypervisor.emulate import Values, carry_out
from xenlab.hypervisor.hypercalls import hypercall_page
from xenlab.hypervisor.page_entries import Use
from xenlab.hypervisor.page_types import REFUSED
from xenlab.hypervisor.port_io import Faulted, carry_out_port
from xenlab.hypervisor.preemption import Preempted
from xenlab.hypervisor.segment_registers import SegmentRegisters
from xenlab.hypervisor.trace import Kind
from xenlab.hypervisor.traps import BadReturn, Undeliverable
from xenlab.hypervisor.virtual_cpuid import CPUID, PREFIX, guest_cpuid
from xenlab.hypervisor.writable_tables import STORE, WritableTables
from xenlab.machine.memory import PAGE_SHIFT, PAGE_SIZE
from xenlab.machine.state import CR0_TS, TF
from xenlab.machine.vectors import DEBUG, INVALID_OPCODE, NMI, NO_DEVICE, PAGE_FAULT, PROTECTION, SOFTWARE

if TYPE_CHECKING:
    from xenlab.hypervisor.core import Hypervisor

_U32 = 0xFFFF_FFFF
_LONGEST_INSTRUCTION = 15
# So many faults at an address, with no instruction begun in between, end a guest: all but the first are at fetching,
# or at a breakpoint on the first instruction of #DB's own handler.
_TRIPLE = 3
_OF_FETCHES = frozenset((PAGE_FAULT, PROTECTION, DEBUG))
_USER_ACCESS = 4  # in a page fault's error code
_USER_RING = 3
_READ_COUNTER = b"\x0f\x33"  # RDPMC
_LOOKED_AT, _LAST_LOOKED_AT = 3, PAGE_SIZE - 3  # bytes of an invalid opcode, and where in a page all are in it
_SECOND, _THIRD = _READ_COUNTER[1], PREFIX[2]
_DONE = -1  # in place of a vector: nothing is left to hand to the guest
_TRAP, _DELIVER = int(Kind.TRAP), int(Kind.DELIVER)


class Exceptions:
    """Takes every exception of a guest that is not a hypercall."""

    def __init__(self, xen: Hypervisor) -> None:
        self._xen, self._traps, self._cpu = xen, xen.traps, xen.cpu
        self._guest, self._bytes = xen.guest_memory, xen.memory.bytes
        self.breakpoints = Breakpoints(xen)
        self._orders = {"cr3": self._load_base, "hypercall_page": self._fill_page}
        self._enter = xen.traps.deliver if xen.bounce is None else BounceDelivery(xen, xen.bounce).deliver
        self._open = WritableTables(xen, self._refused_store).open
        self.segment_registers = SegmentRegisters(xen, self._deliver)
        xen.hypercalls.register(Hypercall.fpu_taskswitch, self.fpu_taskswitch)

    def handle(self, vcpu: Vcpu, vector: int, error: int, address: int) -> None:
        """Vector, error code and address are the CPU's."""
        if vector >= 32:
            error = SOFTWARE
        elif vector == PAGE_FAULT:
            if error == STORE and self._open(vcpu, error, address):
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
        elif vector != PAGE_FAULT and (vector != INVALID_OPCODE or not self._is_plain(vcpu)):
            vector, error, address = self._looked_into(vcpu, vector, error, address)
            if vector == _DONE:
                return
        self._deliver(vcpu, vector, error, address)

    def _looked_into(self, vcpu: Vcpu, vector: int, error: int, address: int) -> tuple[int, int, int]:
        """What is left for the guest of an exception that may be the hypervisor's affair: vector, error and address."""
        if vector == PROTECTION and error == 0:
            left = self._emulate(vcpu)
            # As it came, if nothing was done: a touch of the hypervisor's range has an address.
            return (vector, error, address) if left[0] == PROTECTION else left
        if vector == INVALID_OPCODE:
            return self._forced(vcpu)
        if vector == NO_DEVICE:
            set_task_switched(vcpu, False)
        elif vector == DEBUG:
            vcpu.control["dr6"] |= 0 if self.breakpoints.raised else SINGLE_STEP
            self.breakpoints.raised = False
        return vector, error, address

    def fpu_taskswitch(self, vcpu: Vcpu, on: int, *_: int) -> int:
        """Have the next floating-point instruction raise #NM, or not, as a kernel wants that switches applications."""
        set_task_switched(vcpu, bool(on))
        return 0

    def refuse_return(self, vcpu: Vcpu, fault: BadReturn) -> None:
        """An ``iret`` to a segment that cannot be loaded: to the guest, its target raised the exception."""
        self._deliver(vcpu, fault.vector, fault.error, 0, fault)

    def go_on(self, vcpu: Vcpu) -> None:
        """``vcpu`` is about to run, and cannot as it is, or has an NMI to take."""
        if vcpu.failing:
            self.segment_registers.go_on(vcpu)
        if not vcpu.domain.ended:
            self.take_nmi(vcpu)

    def take_nmi(self, vcpu: Vcpu) -> None:
        """Let ``vcpu`` enter its handler if an NMI was sent to it and it is not in it; without one the NMI is lost."""
        if vcpu.nmi_pending and not vcpu.nmi_masked:
            vcpu.nmi_pending, vcpu.nmi_masked = False, vcpu.traps[NMI] is not None
            if vcpu.nmi_masked:
                self._deliver(vcpu, NMI, SOFTWARE, 0)

    def _deliver(self, vcpu: Vcpu, vector: int, error: int, address: int, fault: BadReturn | None = None) -> None:
        try:
            done = self._enter(vcpu, vector, error, address, fault.interrupted if fault else None)
        except Undeliverable as reason:
            self._xen.crash(vcpu, f"{fault}; {reason}" if fault else str(reason))
            return
        record = self._xen.recorder
        if record is not None:
            record((self._cpu.instructions, _DELIVER, vcpu.domid, vector, *done))
        # A handler that cannot be fetched either would fault for ever while no time passes.
        if vector in _OF_FETCHES and self._is_triple(vcpu):
            self._xen.crash(vcpu, f"triple fault: not even the handler at {vcpu.state.eip:#010x} could be begun")

    def _is_triple(self, vcpu: Vcpu) -> bool:
        """Note a fault at an address; whether there were too many with no instruction begun in between."""
        time, count = vcpu.fetch_faults
        now = self._cpu.instructions
        vcpu.fetch_faults = now, count + 1 if time == now else 1
        return time == now and count + 1 == _TRIPLE

    def _beyond(self, vcpu: Vcpu, error: int, address: int) -> tuple[int, int, int]:
        """What a touch of the hypervisor's range is to the guest: vector, error code and address.

        The CPU's own look into an LDT that is not there is a page fault at the guest's address.  Anything else
        the segment limits of the paper's machines stop before paging sees it.
        """
        offset, (base, entries) = address - vcpu.ldt_base, vcpu.ldt
        if error & _USER_ACCESS == 0 and 0 <= offset < entries << 3:
            return PAGE_FAULT, error, base + offset & _U32
        return PROTECTION, 0, address

    def _refused_store(self, vcpu: Vcpu, error: int, address: int) -> None:
        """A store to a page table was not allowed after all: the guest gets its page fault."""
        self._deliver(vcpu, PAGE_FAULT, error, address)
        while self._xen.pick_needed:
            self._xen.switch()

    def _emulate(self, vcpu: Vcpu) -> tuple[int, int, int]:
        """Carry out the privileged instruction that raised #GP; what is left for the guest to handle."""
        xen = self._xen
        code, eip = xen.guest_memory.read_code(vcpu, _LONGEST_INSTRUCTION), vcpu.state.eip
        if not code:
            return PROTECTION, 0, 0
        try:
            changes = carry_out(xen.emulator, vcpu, code, xen.now, self._orders)
            if changes is None:
                changes = carry_out_port(xen.guest_memory, vcpu, code)
        except Preempted:
            return _DONE, 0, 0  # the guest executes its instruction again, and the check of the tables goes on
        except Faulted as fault:
            return PAGE_FAULT, fault.error, fault.address
        if changes is None or "exception" in changes:
            return (changes or {}).get("exception", PROTECTION), 0, 0
        return self._carried_out(vcpu, code, eip, changes)

    def _carried_out(self, vcpu: Vcpu, code: bytes, eip: int, changes: Values) -> tuple[int, int, int]:
        """An instruction is done; what follows is single-stepping's exception, if the guest steps."""
        if "cr0" in changes:
            set_task_switched(vcpu, bool(changes["cr0"] & CR0_TS))
        self._xen.record(Kind.EMULATE, vcpu.domid, code, eip, tuple(sorted(changes.items())))
        if "dr7" in changes:
            self.breakpoints.note(vcpu)
        if vcpu.state.eflags & TF and vcpu.state.eip != eip:
            vcpu.control["dr6"] |= SINGLE_STEP
            return DEBUG, 0, 0
        return _DONE, 0, 0

    def _forced(self, vcpu: Vcpu) -> tuple[int, int, int]:
        """CPUID behind the prefix that forces its emulation; what is left for the guest to handle.

        The prefix is looked for wherever an opcode is invalid, and where it cannot be read that is a page fault.
        """
        state, eip = vcpu.state, vcpu.state.eip
        code = self._xen.guest_memory.read_code(vcpu, len(PREFIX) + len(CPUID))
        if code.startswith(_READ_COUNTER):
            return PROTECTION, 0, 0  # what it is on an x86 that lets nobody but ring 0 read its counters
        if not (PREFIX.startswith(code[: len(PREFIX)]) and CPUID.startswith(code[len(PREFIX) :])):
            return INVALID_OPCODE, 0, 0
        if len(code) < len(PREFIX) + len(CPUID):
            address = state.segment("cs").base + eip + len(code) & _U32
            return PAGE_FAULT, _USER_ACCESS if state.cpl == _USER_RING else 0, address
        a, b, c, d = guest_cpuid(state.eax, state.ecx)
        state.eax, state.ebx, state.ecx, state.edx = a, b, c, d
        state.eip = eip + len(code) & _U32
        changes = {"eax": a, "ebx": b, "ecx": c, "edx": d, "eip": state.eip}
        return self._carried_out(vcpu, code, eip, changes)

    def _is_plain(self, vcpu: Vcpu) -> bool:
        """Whether an invalid opcode is surely not what `_forced` looks for, by two of its bytes, mostly without a walk.

        Like Xen, it takes the code segment for flat.
        """
        eip: int = vcpu.state.eip
        page = vcpu.translations.get(eip >> PAGE_SHIFT) if vcpu.translated_at == self._cpu.flushes else None
        offset = eip & PAGE_SIZE - 1
        if page is None or offset > _LAST_LOOKED_AT:
            try:
                page = self._guest.machine_address(vcpu, eip, _LOOKED_AT, False) - offset
            except HypercallError:
                return False
        at, data = page + offset, self._bytes
        return at >= 0 and data[at + 2] != _THIRD and data[at + 1] != _SECOND

    def _load_base(self, vcpu: Vcpu, cr3: int) -> None:
        """A move to CR3, in which frame numbers of more than 20 bits are turned round (xen.h, xen_cr3_to_pfn)."""
        self._xen.allowance.begin()
        self._xen.mmu.load_base(vcpu, cr3 >> PAGE_SHIFT | cr3 << 32 - PAGE_SHIFT & _U32)

    def _fill_page(self, vcpu: Vcpu, address: int) -> None:
        """A page of the guest's, which must be one that it could write, gets the stubs for hypercalls."""
        types, mfn = self._xen.page_tables.types, address >> PAGE_SHIFT
        if self._xen.frames.owner_of(mfn) != vcpu.domid or types.take(mfn, Use.WRITE) == REFUSED:
            raise HypercallError(Errno.EINVAL)
        self._xen.memory.write(mfn << PAGE_SHIFT, hypercall_page())
        types.drop(mfn, Use.WRITE)
        self._cpu.forget_code(mfn << PAGE_SHIFT, mfn + 1 << PAGE_SHIFT)


def set_task_switched(vcpu: Vcpu, on: bool) -> None:
    """CR0.TS, the guest's own flag, in the virtual register and in the one that the CPU looks at."""
    vcpu.control["cr0"] = vcpu.control["cr0"] & ~CR0_TS | (CR0_TS if on else 0)
    vcpu.state.set_task_switched(on)
