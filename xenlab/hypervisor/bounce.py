"""The bounce as a part: exception frames built by somebody else's rules (paper 2.1.2, 3.1).

The problem: what a frame looks like is an agreement between a hypervisor and its guests' kernels, and other
agreements than Xen's are possible: the words in another order, the address of a page fault in the frame itself,
as the paper has it.  `traps` builds Xen's frames and nothing else, fast.  Here a part says in plain values
what is pushed and where the guest goes on, and what it says is carried out.

The invariant: whatever the part says, the guest goes on in a ring that is no more privileged than its handler may be,
never in ring 0, and every word lands where the guest could have stored it.  What breaks without it: a
mistake in a frame builder, or a wish of the guest's that it passes on, gives the machine away.

`XenBounce` says what `traps` does.  Tests hold the two to the same frames; it is there to be read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from struct import pack
from typing import TYPE_CHECKING, Any, Protocol

from xenlab.errors import HypercallError, XenlabError
from xenlab.hypervisor.domain import Gate, Vcpu
from xenlab.hypervisor.parts import is_mapping, wrong
from xenlab.hypervisor.traps import EVENT, Delivery, Interrupted, Undeliverable
from xenlab.machine.paging import USER_WRITE
from xenlab.machine.state import AC, ARITHMETIC, DF, ID, IF, IOPL, RF, TF, VM, Segment
from xenlab.machine.vectors import PAGE_FAULT, SOFTWARE, WITH_ERROR_CODE, vector_name

if TYPE_CHECKING:
    from xenlab.hypervisor.core import Hypervisor

Values = Mapping[str, int]
Writable = Callable[[int, int], bool]

REGISTERS = ("eip", "cs", "eflags", "esp", "ss")
# Of struct vcpu_info (xen.h): the event mask, CR2, and the words of it that are left for the page-fault handler.
_EVENT_MASK, CR2_OFFSET = 1, 8
SHARED = range(CR2_OFFSET, 32, 4)
MOST_WORDS = 16
_U32, _USER_RING, _WORD = 0xFFFF_FFFF, 3, 4
_FLAGS = ARITHMETIC | TF | DF | RF | AC | ID


class Bounce(Protocol):
    """The slot for the builder of exception frames."""

    def frame(
        self, trap: Values, registers: Values, gate: Values, kernel: Values, writable: Writable
    ) -> Mapping[str, Any] | None:
        """Decide how the guest enters its handler.

        Args:
            trap: ``vector``; ``error`` where the exception has an error code; ``address`` for a page fault.
            registers: ``eip cs eflags esp ss`` as they were; the two lowest bits of ``cs`` are the ring.
            gate: ``cs`` and ``eip`` of the handler, and ``masks_events``, 1 if it is entered with events masked.
            kernel: ``ss`` and ``esp``, the stack for entries from an outer ring, and ``event_mask``.
            writable: ``writable(address, bytes)`` says whether the handler's ring may store there.

        Returns:
            None if the exception cannot be delivered, which ends the guest; else a mapping of

            * ``words``: what is stored from the new ESP upwards, 32 bits each;
            * ``registers``: the five of them in the handler;
            * ``shared``: words for the shared page by their offset there, may be absent;
            * ``event_mask``: its new value, may be absent.
        """
        ...


class XenBounce:
    """Xen's frames, which are the hardware's."""

    def frame(
        self, trap: Values, registers: Values, gate: Values, kernel: Values, writable: Writable
    ) -> Mapping[str, Any] | None:
        ring, to_ring = registers["cs"] & 3, gate["cs"] & 3
        masked, esp, ss = kernel["event_mask"], registers["esp"], registers["ss"]
        saved = registers["eflags"] & ~IF | (0 if masked else IF)
        words = [registers["eip"], registers["cs"] | masked << 16, saved]
        if to_ring < ring:
            words += [esp, ss]
            esp, ss = kernel["esp"], kernel["ss"]
        if to_ring > ring or ss & 3 != to_ring:
            return None
        if "error" in trap:
            words.insert(0, trap["error"])
        esp = esp - 4 * len(words) & _U32
        if not writable(esp, 4 * len(words)):
            return None
        flags = registers["eflags"] & (ARITHMETIC | DF | IF | ID)
        return {
            "words": words,
            "registers": {"eip": gate["eip"], "cs": gate["cs"], "eflags": flags, "esp": esp, "ss": ss},
            "shared": {CR2_OFFSET: trap["address"]} if "address" in trap else {},
            "event_mask": masked | gate["masks_events"],
        }


class BounceDelivery:
    """Delivers exceptions as a `Bounce` says."""

    def __init__(self, xen: Hypervisor, part: Bounce) -> None:
        self._xen, self._part = xen, part
        self._memory, self._guest = xen.memory, xen.guest_memory

    def deliver(
        self, vcpu: Vcpu, vector: int, error: int, address: int, interrupted: Interrupted | None = None
    ) -> Delivery:
        """As `TrapDelivery.deliver`, which is asked where no part can help.

        Raises:
            Undeliverable: the part gives the guest up, or asked for what the guest may not have.
            PartError: what it said is not an answer.
        """
        gate, state = (vcpu.traps[vector] if vector < EVENT else None), vcpu.state
        esp, eip, flags, ring, cs, ss = interrupted or state.interrupted()
        if gate is None or flags & VM:
            return self._xen.traps.deliver(vcpu, vector, error, address, interrupted)
        trap = {"vector": vector}
        if error != SOFTWARE and vector in WITH_ERROR_CODE:
            trap["error"] = error
            if vector == PAGE_FAULT:
                trap["address"] = vcpu.control["cr2"] = address
        if interrupted is not None and ring == state.cpl:
            ss = state.segment("ss").selector  # a return within a ring has no other
        registers = {"eip": eip, "cs": cs, "eflags": flags & ~IOPL, "esp": esp, "ss": ss}
        found = self._ask(vcpu, trap, registers, gate)
        if found is None:
            raise Undeliverable(f"exception {vector} ({vector_name(vector)}), which its bounce cannot deliver")
        return self._enter(vcpu, ring, found)

    def _ask(self, vcpu: Vcpu, trap: Values, registers: Values, gate: Gate) -> Mapping[str, Any] | None:
        handler = {"cs": gate.cs, "eip": gate.eip, "masks_events": int(gate.masks_events)}
        mask = self._memory.bytes[vcpu.info + _EVENT_MASK] & 1
        kernel = {"ss": vcpu.kernel_ss, "esp": vcpu.kernel_esp, "event_mask": mask}
        did = f"frame for {vector_name(trap['vector'])} at {registers['eip']:#010x}"
        try:
            found = self._part.frame(trap, registers, handler, kernel, self._writable(vcpu, gate.cs & 3))
        except XenlabError:
            raise
        except Exception as problem:
            raise wrong(self._part, did, "None or a mapping", problem) from problem
        problem_found = "" if found is None else unusable(found)
        if problem_found:
            raise wrong(self._part, did, problem_found, found)
        return found

    def _writable(self, vcpu: Vcpu, ring: int) -> Writable:
        def writable(address: int, size: int) -> bool:
            try:
                self._check(vcpu, address, size, ring)
            except HypercallError:
                return False
            return True

        return writable

    def _check(self, vcpu: Vcpu, address: int, size: int, ring: int) -> None:
        access = (USER_WRITE,) if ring == _USER_RING else ()
        self._guest.check_writable(vcpu, address, size, *access)

    def _enter(self, vcpu: Vcpu, ring: int, found: Mapping[str, Any]) -> Delivery:
        """Carry out what the part said, if the guest may have it."""
        state, words, registers = vcpu.state, tuple(found["words"]), found["registers"]
        code, stack = self._segments(vcpu, ring, registers["cs"] & 0xFFFF, registers["ss"] & 0xFFFF)
        to_ring, esp = registers["cs"] & 3, registers["esp"]
        base = state.segment("ss").base if stack is None else stack.base
        at, data = base + esp & _U32, pack(f"<{len(words)}I", *words)
        try:
            self._check(vcpu, at, len(data), to_ring)
            self._guest.write(vcpu, at, data)
        except HypercallError:
            raise Undeliverable(f"the frame at {esp:#010x} is not on memory that ring {to_ring} may write") from None
        for offset, value in found.get("shared", {}).items():
            self._memory.words[vcpu.info + offset >> 2] = value
        state.transfer(code, registers["eip"], registers["eflags"] & _FLAGS | IF, esp, stack)
        if "event_mask" in found:
            self._xen.traps.set_event_mask(vcpu, found["event_mask"])
        return ring, to_ring, registers["eip"], esp, words

    def _segments(self, vcpu: Vcpu, ring: int, cs: int, ss: int) -> tuple[Segment, Segment | None]:
        """The segments behind the selectors; no stack where the guest keeps the one it has."""
        to_ring = cs & 3
        if to_ring == 0 or to_ring > ring:
            raise Undeliverable(f"its bounce asks for ring {to_ring}, from ring {ring}")
        code = vcpu.flat_code.get(cs) or self._xen.traps.segments.code(vcpu, cs)
        if code is None:
            raise Undeliverable(f"its bounce asks for the unusable code selector {cs:#x}")
        if to_ring == ring == vcpu.state.cpl and ss == vcpu.state.segment("ss").selector:
            return code, None
        stack = self._xen.traps.segments.stack(vcpu, ss, to_ring)
        if stack is None:
            raise Undeliverable(f"its bounce asks for the unusable stack selector {ss:#x}")
        return code, stack


def unusable(found: Any) -> str:
    """What was expected of a part's answer that is not None, empty if it is as it should be."""
    if not isinstance(found, Mapping) or not {"words", "registers"} <= set(found) <= _NAMES:
        return (
            f"None, or a mapping with words, registers, and if need be shared and event_mask; no other name: {_NAMES}"
        )
    words = found["words"]
    if not isinstance(words, list | tuple) or not 0 < len(words) <= MOST_WORDS or not all(map(_is_word, words)):
        return f"words: a list of 1 to {MOST_WORDS} whole numbers of 32 bits"
    registers, shared = found["registers"], found.get("shared", {})
    if not is_mapping(registers, REGISTERS, int) or len(registers) != len(REGISTERS):
        return f"registers: all of {' '.join(REGISTERS)}"
    if not all(map(_is_word, registers.values())):
        return "registers: whole numbers of 32 bits"
    if not is_mapping(shared, SHARED, int) or not all(map(_is_word, shared.values())):
        return f"shared: whole numbers of 32 bits, by offsets from {SHARED.start} to {SHARED[-1]} in steps of {_WORD}"
    mask = found.get("event_mask", 0)
    return "" if type(mask) is int and mask in (0, 1) else "event_mask: 0 or 1"


_NAMES = {"words", "registers", "shared", "event_mask"}


def _is_word(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _U32


__all__ = ["CR2_OFFSET", "REGISTERS", "SHARED", "Bounce", "BounceDelivery", "XenBounce", "unusable"]
