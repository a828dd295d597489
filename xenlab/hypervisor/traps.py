"""Exceptions handed to the guest: the virtual trap table, frames, and the way back.

Paper 2.1.2 and 3.1.  The problem: hardware delivers every exception to ring 0, but it is the
guest's kernel in ring 1 that has to handle it.  So a guest registers a table of handlers
with the hypervisor, and the hypervisor builds on the guest's stack exactly the frame that
the hardware would have built, then resumes the guest at the handler ("bouncing").

A frame, from the top of the handler's stack down; the first two only if the ring changes::

      SS        ESP       EFLAGS      saved event mask << 16 | CS      EIP      [error code]

The one difference is the page fault: only ring 0 can read CR2, so the address is left in the
domain's shared-information page.

The invariant: a handler runs in the ring that its registered selector says, never ring 0, on
a stack that the guest itself could have written.  What breaks without it: a guest names a
handler in ring 0, or has the hypervisor push a frame over memory that is not its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from xenlab.errors import HypercallError
from xenlab.hypervisor.descriptors import code_for, lookup, stack_for
from xenlab.hypervisor.domain import Gate, Vcpu
from xenlab.hypervisor.guest_memory import GuestMemory
from xenlab.machine.cpu import PAGE_FAULT, SOFTWARE, WITH_ERROR_CODE
from xenlab.machine.memory import PAGE_SHIFT, Memory
from xenlab.machine.segments import Descriptor
from xenlab.machine.state import AC, ARITHMETIC, DF, ID, IF, IOPL, NT, RF, TF, VM

KERNEL_RING, USER_RING = 1, 3
_SAVED_MASK_SHIFT = 16
# What a guest may set by a return: neither I/O privilege nor virtual-8086 mode nor reserved bits.
_RETURNED_FLAGS = ARITHMETIC | TF | DF | RF | AC | ID
# Offsets of a vCPU's flags in the shared-information page (xen.h, struct vcpu_info).
_VCPU_INFO_BYTES, _UPCALL_MASK, _CR2 = 64, 1, 8


class Undeliverable(Exception):
    """The guest cannot be given this exception; it has to be ended.  The text says why."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """What a delivery did, for the trace.

    Attributes:
        from_ring, to_ring: the privilege levels before and in the handler.
        handler: linear address at which the guest goes on.
        frame: linear address of the frame.
        words: the frame's words, lowest address first.
    """

    from_ring: int
    to_ring: int
    handler: int
    frame: int
    words: tuple[int, ...]


class TrapDelivery:
    """Builds exception frames and takes them down again."""

    def __init__(self, memory: Memory, guest_memory: GuestMemory) -> None:
        self._memory = memory
        self._guest = guest_memory

    def deliver(self, vcpu: Vcpu, vector: int, error: int, address: int) -> Delivery:
        """Make ``vcpu`` enter its handler for ``vector``; an ``error`` of `SOFTWARE` means by INT, without one.

        Raises:
            Undeliverable: when there is no handler, or its stack or code segment is unusable.
        """
        gate = vcpu.traps[vector]
        if gate is None:
            raise Undeliverable(f"exception {vector} and no handler registered for it")
        code = code_for(self._memory, vcpu, gate.cs)
        if code is None:
            raise Undeliverable(f"the handler for exception {vector} has the unusable code selector {gate.cs:#x}")
        if vector == PAGE_FAULT and error != SOFTWARE:
            self._leave_address(vcpu, address)
        words = (error,) if vector in WITH_ERROR_CODE and error != SOFTWARE else ()
        return self._enter(vcpu, gate, code, words)

    def _enter(self, vcpu: Vcpu, gate: Gate, code: Descriptor, words: tuple[int, ...]) -> Delivery:
        state = vcpu.state
        from_ring, to_ring = state.cpl, gate.cs & 3
        stack, esp = None, state.esp
        flags = state.eflags
        mask = self.event_mask(vcpu)
        words += (state.eip, state.segment("cs").selector | mask << _SAVED_MASK_SHIFT)
        words += ((flags & ~(IF | IOPL) | (0 if mask else IF)),)
        if to_ring < from_ring:
            words += (esp, state.segment("ss").selector)
            stack, esp = stack_for(self._memory, vcpu, vcpu.kernel_ss, to_ring), vcpu.kernel_esp
            if stack is None:
                raise Undeliverable(f"the kernel stack has the unusable selector {vcpu.kernel_ss:#x}")
        elif to_ring > from_ring:
            raise Undeliverable(f"the handler's ring {to_ring} is less privileged than ring {from_ring}")
        frame = esp - 4 * len(words) & 0xFFFF_FFFF
        self._push(vcpu, frame, stack, words)
        if stack is not None:
            state.load_segment("ss", vcpu.kernel_ss, stack)
        state.load_segment("cs", gate.cs, code)
        state.esp, state.eip = frame, gate.eip
        state.eflags = flags & ~(TF | NT | RF | VM | AC)
        if gate.masks_events:
            self.set_event_mask(vcpu, 1)
        return Delivery(from_ring, to_ring, gate.eip, frame, words)

    def _push(self, vcpu: Vcpu, frame: int, stack: Descriptor | None, words: tuple[int, ...]) -> None:
        base = stack.base if stack else vcpu.state.segment("ss").base
        try:
            self._guest.write(vcpu, base + frame & 0xFFFF_FFFF, b"".join(word.to_bytes(4, "little") for word in words))
        except HypercallError:
            raise Undeliverable(f"the exception frame at {frame:#010x} is not on writable memory") from None

    def iret(self, vcpu: Vcpu) -> tuple[int, int]:
        """The ``iret`` hypercall: return from a handler to the frame on the stack.

        The stub in the hypercall page pushed EAX first, so the stack holds EAX, EIP, CS,
        EFLAGS and, when leaving for an outer ring, ESP and SS (xen-x86_32.h).

        Returns:
            The ring returned to and EAX.

        Raises:
            Undeliverable: when the frame cannot be read or names an unusable segment.
        """
        state = vcpu.state
        from_ring, stack_base = state.cpl, state.segment("ss").base
        eax, eip, cs, flags = self._pop(vcpu, stack_base + state.esp, 4)
        cs = cs & 0xFFFF | (0 if cs & 3 else KERNEL_RING)
        ring = cs & 3
        code = code_for(self._memory, vcpu, cs)
        if code is None or ring < from_ring:
            raise Undeliverable(f"iret to the unusable code selector {cs:#x}")
        if ring > from_ring:
            esp, ss = self._pop(vcpu, stack_base + state.esp + 16, 2)
            stack = stack_for(self._memory, vcpu, ss & 0xFFFF, ring)
            if stack is None:
                raise Undeliverable(f"iret to the unusable stack selector {ss & 0xFFFF:#x}")
            state.load_segment("ss", ss & 0xFFFF, stack)
            self._clear_inner_segments(vcpu, ring)
        else:
            esp = state.esp + 16 & 0xFFFF_FFFF
        state.load_segment("cs", cs, code)
        state.esp, state.eip = esp, eip
        state.eflags = flags & _RETURNED_FLAGS | IF
        self.set_event_mask(vcpu, 0 if flags & IF else 1)
        return ring, eax

    def _pop(self, vcpu: Vcpu, address: int, count: int) -> tuple[int, ...]:
        try:
            data = self._guest.read(vcpu, address & 0xFFFF_FFFF, 4 * count)
        except HypercallError:
            raise Undeliverable(f"iret with its frame at {address:#010x}, which cannot be read") from None
        return tuple(int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4))

    def _clear_inner_segments(self, vcpu: Vcpu, ring: int) -> None:
        """On a return outwards the CPU empties data segments that the outer ring may not use."""
        for name in ("es", "ds", "fs", "gs"):
            found = lookup(self._memory, vcpu, vcpu.state.segment(name).selector)
            if found is None or (found.dpl < ring and not found.is_conforming):
                vcpu.state.load_segment(name, 0, None)

    def event_mask(self, vcpu: Vcpu) -> int:
        """The vCPU's ``evtchn_upcall_mask``: 1 while it does not want events."""
        return self._memory.bytes[self._info(vcpu) + _UPCALL_MASK] & 1

    def set_event_mask(self, vcpu: Vcpu, mask: int) -> None:
        """Set ``evtchn_upcall_mask``."""
        self._memory.bytes[self._info(vcpu) + _UPCALL_MASK] = mask

    def _leave_address(self, vcpu: Vcpu, address: int) -> None:
        vcpu.control["cr2"] = address
        self._memory.words[self._info(vcpu) + _CR2 >> 2] = address

    def _info(self, vcpu: Vcpu) -> int:
        number = vcpu.domain.vcpus.index(vcpu)
        return (vcpu.domain.shared_info_mfn << PAGE_SHIFT) + number * _VCPU_INFO_BYTES


def checked_selector(selector: int) -> int:
    """A selector as Xen stores it for a guest: one that asks for ring 0 is moved to ring 1."""
    return selector if selector & 3 else selector | KERNEL_RING


def gates_from_table(entries: list[tuple[int, int, int, int]]) -> dict[int, Gate]:
    """Gates by vector from rows ``(vector, flags, cs, address)``, up to the row with address 0."""
    gates = {}
    for vector, flags, cs, address in entries:
        if not address:
            break
        gates[vector] = Gate(checked_selector(cs), address, flags & 3, bool(flags & 4))
    return gates
