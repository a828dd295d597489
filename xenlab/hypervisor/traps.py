"""Exceptions handed to the guest: the virtual trap table, frames, and the way back.

Paper 2.1.2 and 3.1.  The problem: hardware delivers every exception to ring 0, but it is the
guest's kernel in ring 1 that has to handle it.  So a guest registers a table of handlers
with the hypervisor, and the hypervisor builds on the guest's stack exactly the frame that
the hardware would have built, then resumes the guest at the handler ("bouncing").

A frame, from the top of the handler's stack down; the first two only if the ring changes::

      SS        ESP       EFLAGS      saved event mask << 16 | CS      EIP      [error code]

System calls do not come here, if the guest registered a handler that the CPU can enter by itself (`set_gate`,
`machine.gates`): that frame is the CPU's own, without the event mask in it.

The one difference is the page fault: only ring 0 can read CR2, so the address is left in the
domain's shared-information page.

The invariant: a handler runs in the ring that its registered selector says, never ring 0, on
a stack that the guest itself could have written.  What breaks without it: a guest names a
handler in ring 0, or has the hypervisor push a frame over memory that is not its own.
"""

from __future__ import annotations

from struct import pack

from xenlab.errors import HypercallError
from xenlab.hypervisor.descriptors import SegmentLookup, checked_selector, gate_may_name
from xenlab.hypervisor.domain import VECTORS, Gate, Vcpu
from xenlab.hypervisor.guest_memory import GuestMemory
from xenlab.hypervisor.physdev import LEVEL_SHIFT, is_architectural, set_level
from xenlab.machine.engine import SEGMENTS
from xenlab.machine.gates import TrapGate
from xenlab.machine.memory import Memory
from xenlab.machine.paging import USER_WRITE
from xenlab.machine.state import AC, ARITHMETIC, DF, ID, IF, IOPL, RF, TF, VM, Segment
from xenlab.machine.vectors import (
    BREAKPOINT,
    NOT_PRESENT,
    OVERFLOW,
    PAGE_FAULT,
    PROTECTION,
    SOFTWARE,
    STACK_FAULT,
    WITH_ERROR_CODE,
    vector_name,
)

KERNEL_RING, USER_RING = 1, 3
# The one software interrupt whose gate the CPU takes itself.
SYSTEM_CALL = 0x80
# In place of a vector: the event callback, which is entered as a handler is.
EVENT = VECTORS
_SAVED_MASK_SHIFT = 16
# INT n without prefixes, which do nothing: where they begin cannot be seen from behind.
_INTERRUPT_BYTES = 2
_SOFTWARE_INTERRUPT_ERROR = 2  # "the selector is an index into the IDT"
# What a guest may set by a return: neither I/O privilege nor virtual-8086 mode nor reserved bits.
_RETURNED_FLAGS = ARITHMETIC | TF | DF | RF | AC | ID
# Beside the arithmetic ones; bit 1 is always set.
_KEPT_ON_ENTRY = IF | ID | 2
_SAVED_FLAGS = ~(IF | IOPL)
# Offsets in struct vcpu_info (xen.h).
_UPCALL_MASK, _CR2 = 1, 8
# What a delivery did: ring before, ring in the handler, the handler's address, the frame's
# address, and the frame's words from the lowest address up.
Delivery = tuple[int, int, int, int, tuple[int, ...]]
# ESP, EIP, EFLAGS, ring, CS and SS.
Interrupted = tuple[int, int, int, int, int, int]


class Undeliverable(Exception):
    """The guest cannot be given this exception; it has to be ended.  The text says why."""


class BadReturn(Exception):
    """The frame of an ``iret`` names a segment that the CPU could not load.

    Attributes:
        vector, error: the exception of the real IRET.
        eax: what EAX becomes.
        interrupted: where it would have gone: to the guest that is what was interrupted.
    """

    def __init__(self, vector: int, error: int, eax: int, interrupted: Interrupted) -> None:
        *_rest, cs, ss = interrupted
        super().__init__(f"iret to cs {cs:#x}, ss {ss:#x} raised {vector_name(vector)} with the code {error:#x}")
        self.vector, self.error, self.eax, self.interrupted = vector, error, eax, interrupted


class TrapDelivery:
    """Builds exception frames and takes them down again."""

    def __init__(self, memory: Memory, guest_memory: GuestMemory) -> None:
        self._memory, self._bytes = memory, memory.bytes
        self._guest = guest_memory
        self.segments = SegmentLookup(memory)

    def deliver(
        self, vcpu: Vcpu, vector: int, error: int, address: int, interrupted: Interrupted | None = None
    ) -> Delivery:
        """Make ``vcpu`` enter its handler for ``vector``; an ``error`` of `SOFTWARE` means by INT, without one.

        Args:
            vcpu: which.
            vector, error, address: the exception.
            interrupted: what its frame says was interrupted, if that is not what the registers say.

        Raises:
            Undeliverable: when there is no handler, or its stack or code segment is unusable.
        """
        gate, with_error = vcpu.event_callback, False
        if vector < EVENT:
            gate, with_error = vcpu.traps[vector], error != SOFTWARE and vector in WITH_ERROR_CODE
        if gate is None:
            where = f" at address {address:#010x}" if vector == PAGE_FAULT and error != SOFTWARE else ""
            raise Undeliverable(f"{_named(vector)}{where} and no handler registered for it")
        # The flat segments stand in a page that no guest can change: they need no looking up.
        flat = vcpu.flat_code.get(gate.cs)
        code = flat or self.segments.code(vcpu, gate.cs)
        if code is None:
            raise Undeliverable(f"the handler for {_named(vector)} has the unusable code selector {gate.cs:#x}")
        state = vcpu.state
        esp, eip, flags, ring, cs, ss = interrupted or state.interrupted()
        if flags & VM:
            # The emulated CPU lets any ring enter this mode by IRET; on an x86 only ring 0 can.
            raise Undeliverable(f"{_named(vector)} in virtual-8086 mode, which no guest may enter")
        to_ring, stack = gate.cs & 3, None
        if self._bytes[vcpu.info + _UPCALL_MASK] & 1:
            cs, saved_flags = cs | 1 << _SAVED_MASK_SHIFT, flags & _SAVED_FLAGS | vcpu.shown_level
        else:
            saved_flags = flags & _SAVED_FLAGS | IF | vcpu.shown_level
        if to_ring < ring:
            if vcpu.kernel_ss & 3 == to_ring:
                stack = vcpu.flat_data.get(vcpu.kernel_ss)
            stack = stack or self.entry_stack(vcpu, to_ring)
            words: tuple[int, ...] = (eip, cs, saved_flags, esp, ss)
            esp, base = vcpu.kernel_esp, stack.base
        elif to_ring > ring:
            raise Undeliverable(f"the handler's ring {to_ring} is less privileged than ring {ring}")
        else:
            if interrupted is not None and ring != state.cpl:
                stack = self._returned_stack(vcpu, ss, ring)
            words = eip, cs, saved_flags
            base = 0 if ss in vcpu.flat_data else (stack or state.segment("ss")).base
            if ring == USER_RING:
                size = 16 if with_error else 12
                self._check_user_stack(vcpu, base + esp - size & 0xFFFF_FFFF, size)
        if with_error:
            words = (error,) + words  # noqa: RUF005  (half the time of unpacking)
            if vector == PAGE_FAULT:
                vcpu.control["cr2"] = self._memory.words[vcpu.info + _CR2 >> 2] = address
        frame = esp - 4 * len(words)
        if frame < 0:
            frame &= 0xFFFF_FFFF
        try:
            self._guest.write_words(vcpu, base + frame & 0xFFFF_FFFF if base else frame, words)
        except HypercallError:
            raise Undeliverable(f"the frame for {_named(vector)} at {frame:#010x} is not on writable memory") from None
        if interrupted is not None:
            state.eflags = flags
        elif flat is not None and cs == gate.cs:
            code = None  # it is loaded already, and cannot have changed
        state.enter_handler(code, gate.eip, frame, stack, _KEPT_ON_ENTRY)
        if gate.masks_events:
            self._bytes[vcpu.info + _UPCALL_MASK] = 1
        return ring, to_ring, gate.eip, frame, words

    def entry_code(self, vcpu: Vcpu, selector: int) -> Segment | None:
        """The code segment of a handler, or None where it cannot be entered."""
        return vcpu.flat_code.get(selector) or self.segments.code(vcpu, selector)

    def entry_stack(self, vcpu: Vcpu, ring: int) -> Segment:
        """The stack segment for entries from outer rings into ``ring``.  Raises Undeliverable."""
        stack = vcpu.flat_data.get(vcpu.kernel_ss) if vcpu.kernel_ss & 3 == ring else None
        stack = stack or self.segments.stack(vcpu, vcpu.kernel_ss, ring)
        if stack is None:
            raise Undeliverable(f"the kernel stack has the unusable selector {vcpu.kernel_ss:#x}")
        return stack

    def _returned_stack(self, vcpu: Vcpu, ss: int, ring: int) -> Segment:
        """The stack of a return to ``ring`` that failed, for a handler there: the CPU is not in that ring yet."""
        stack = (vcpu.flat_data.get(ss) if ss & 3 == ring else None) or self.segments.stack(vcpu, ss, ring)
        if stack is None:
            raise Undeliverable(f"ring {ring} was to handle a return to it with the unusable stack selector {ss:#x}")
        return stack

    def saved(self, vcpu: Vcpu, cs: int, flags: int) -> tuple[int, int]:
        """CS and EFLAGS as they stand in a frame, with the event mask in them."""
        mask = self._bytes[vcpu.info + _UPCALL_MASK] & 1
        return cs | mask << _SAVED_MASK_SHIFT, flags & _SAVED_FLAGS | (0 if mask else IF) | vcpu.shown_level

    def go_to(self, vcpu: Vcpu, gate: Gate, code: Segment, frame: int, stack: Segment | None) -> None:
        """Go on at a gate's handler, with its frame on the stack."""
        vcpu.state.enter_handler(code, gate.eip, frame, stack, _KEPT_ON_ENTRY)
        if gate.masks_events:
            self.set_event_mask(vcpu, 1)

    def iret(self, vcpu: Vcpu) -> tuple[int, int]:
        """The ``iret`` hypercall: return from a handler to the frame on the stack.

        The stub in the hypercall page pushed EAX first, so the stack holds EAX, EIP, CS,
        EFLAGS and, when leaving for an outer ring, ESP and SS (xen-x86_32.h).

        Returns:
            The ring returned to and EAX.

        Raises:
            Undeliverable: when the frame cannot be read, or leads to ring 0.
            BadReturn: when it names a segment that cannot be loaded.
        """
        state = vcpu.state
        from_ring, base, top = state.cpl, state.segment("ss").base, state.esp
        eax, eip, cs, flags = self._pop(vcpu, base + top, 4)
        cs, ring = cs & 0xFFFF, cs & 3
        if flags & VM:
            self._refuse_virtual_8086(vcpu, self._pop(vcpu, base + top + 4, 5) + self._pop(vcpu, base + top + 24, 4))
            return state.cpl, eax
        if ring < from_ring:
            raise Undeliverable(f"iret to ring {ring}, by the code selector {cs:#x}")
        stack, esp, ss = None, top + 16 & 0xFFFF_FFFF, 0
        if ring > from_ring:
            esp, ss = self._pop(vcpu, base + top + 16, 2)
            ss &= 0xFFFF
            stack = vcpu.flat_data.get(ss) if ss & 3 == ring else None
            stack = stack or self.segments.stack(vcpu, ss, ring)
        if is_architectural(vcpu):
            set_level(vcpu, flags >> LEVEL_SHIFT & 3)
        self.set_event_mask(vcpu, 0 if flags & IF else 1)
        code = vcpu.flat_code.get(cs) or self.segments.code(vcpu, cs)
        if code is None or (stack is None and ring > from_ring):
            fault = self._return_fault(vcpu, cs, ss, code is None)
            raise BadReturn(*fault, eax, (esp, eip, flags & _RETURNED_FLAGS | IF, ring, cs, ss))
        if ring > from_ring:
            self._clear_inner_segments(vcpu, ring)
        state.transfer(code, eip, flags & _RETURNED_FLAGS | IF, esp, stack)
        return ring, eax

    def _return_fault(self, vcpu: Vcpu, cs: int, ss: int, by_code: bool) -> tuple[int, int]:
        """Vector and error code of an IRET that cannot load CS, or SS."""
        selector, absent = (cs, NOT_PRESENT) if by_code else (ss, STACK_FAULT)
        return absent if self.segments.is_absent(vcpu, selector) else PROTECTION, selector & 0xFFFC

    def _refuse_virtual_8086(self, vcpu: Vcpu, words: tuple[int, ...]) -> None:
        """A return to virtual-8086 mode is #GP at its first instruction, on the kernel's stack."""
        gate, flags, frame = vcpu.traps[PROTECTION], words[2], vcpu.kernel_esp - 40 & 0xFFFF_FFFF
        code, stack = self.entry_code(vcpu, gate.cs) if gate else None, self.entry_stack(vcpu, KERNEL_RING)
        if gate is None or code is None or code.selector & 3 != KERNEL_RING:
            raise Undeliverable("iret to virtual-8086 mode, and no handler of #GP that can be entered")
        try:
            self._guest.write(vcpu, stack.base + frame & 0xFFFF_FFFF, pack("<10I", 0, *words))
        except HypercallError:
            raise Undeliverable(f"the frame for an iret to virtual-8086 mode at {frame:#010x}") from None
        vcpu.state.transfer(code, gate.eip, flags & (_KEPT_ON_ENTRY | ARITHMETIC | DF) | IF, frame, stack)
        self.set_event_mask(vcpu, 0 if flags & IF and not gate.masks_events else 1)

    def software_interrupt(self, vcpu: Vcpu, vector: int) -> tuple[int, int]:
        """Vector and error code for ``int n``: its gate's if the privilege allows, else #GP at the instruction."""
        gate = vcpu.traps[vector]
        # Xen's own gates for these two are open to every ring, and it asks no further.
        if vector in (BREAKPOINT, OVERFLOW) or (gate is not None and gate.dpl >= vcpu.state.cpl):
            return vector, SOFTWARE
        vcpu.state.eip = vcpu.state.eip - _INTERRUPT_BYTES & 0xFFFF_FFFF
        return PROTECTION, vector << 3 | _SOFTWARE_INTERRUPT_ERROR

    def _check_user_stack(self, vcpu: Vcpu, address: int, size: int) -> None:
        """A frame for a handler in ring 3 goes only where ring 3 could have pushed it."""
        try:
            self._guest.check_writable(vcpu, address, size, USER_WRITE)
        except HypercallError:
            raise Undeliverable(f"ring 3 may not write the exception frame at {address:#010x}") from None

    def _pop(self, vcpu: Vcpu, address: int, count: int) -> tuple[int, ...]:
        try:
            return self._guest.read_words(vcpu, address & 0xFFFF_FFFF, count)
        except HypercallError:
            raise Undeliverable(f"iret with its frame at {address:#010x}, which cannot be read") from None

    def _clear_inner_segments(self, vcpu: Vcpu, ring: int) -> None:
        """On a return outwards the CPU empties data segments that the outer ring may not use."""
        for name, selector in zip(SEGMENTS, vcpu.state.selectors(), strict=True):
            if name not in ("cs", "ss") and selector and not self.segments.usable_in(vcpu, selector, ring):
                vcpu.state.load_segment(name, 0, None)

    def set_event_mask(self, vcpu: Vcpu, mask: int) -> None:
        """Set ``evtchn_upcall_mask``: 1 while the vCPU does not want events."""
        self._bytes[vcpu.info + _UPCALL_MASK] = mask


def returned_flags(flags: int) -> int:
    """EFLAGS of a guest that asks for ``flags``: neither I/O privilege nor virtual-8086 mode nor reserved bits."""
    return flags & _RETURNED_FLAGS | IF


def _named(vector: int) -> str:
    return "an event" if vector == EVENT else f"exception {vector} ({vector_name(vector)})"


def set_gate(vcpu: Vcpu) -> None:
    """Let the CPU itself take system calls to the handler that the guest registered, if a real gate may name it.

    Not one that masks events on entry, nor for a guest that wants to see its I/O privilege level in frames: the CPU
    can do neither.
    """
    gate = vcpu.traps[SYSTEM_CALL]
    if gate is None or gate.masks_events or is_architectural(vcpu) or not gate_may_name(gate.cs):
        vcpu.state.gate = None
        return
    code, stack = vcpu.flat_code.get(gate.cs), vcpu.flat_data.get(vcpu.kernel_ss)
    vcpu.state.gate = TrapGate(
        SYSTEM_CALL, gate.cs, gate.eip, gate.dpl, vcpu.kernel_ss, vcpu.kernel_esp, code=code, stack=stack
    )


def gates_from_table(entries: list[tuple[int, int, int, int]]) -> dict[int, Gate]:
    """Gates by vector from rows ``(vector, flags, cs, address)``, up to the row with address 0."""
    gates = {}
    for vector, flags, cs, address in entries:
        if not address:
            break
        gates[vector] = Gate(checked_selector(cs), address, flags & 3, bool(flags & 4))
    return gates
