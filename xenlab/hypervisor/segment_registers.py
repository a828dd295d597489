"""Segment registers whose descriptors change under them, and the failsafe callback (paper 2.1.1).

The problem: a segment register has a hidden part, loaded from a descriptor once.  Xen loads the registers of a vCPU
anew when it returns to it, and that faults if the guest has meanwhile changed or taken away a descriptor that one of
them was loaded from.  It is the hypervisor that faults, but the guest that is to blame, and that has to mend it.

Here a vCPU's hidden parts are kept with it, so the registers are looked at where descriptors change: each is loaded
anew, and a vCPU with one that cannot be loaded goes on in its failsafe callback.  That is entered as a handler is, with
four words more, from the top of its stack down; the data segment registers themselves are empty::

    [SS  ESP]  EFLAGS   saved event mask << 16 | CS   EIP   GS   FS   ES   DS

A code or stack segment that cannot be loaded is an exception instead, as in the return of Xen's; the handler of a
stack segment has to be in an inner ring, or there is no stack for it.  A kernel that has
registered no such callback finds the lost data segments empty, and goes on.

The invariant: no vCPU runs with a hidden part that its guest's tables do not say.  What breaks without it: a segment
that was taken away goes on being used, or it stops a domain that only changed its mind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from struct import pack
from typing import TYPE_CHECKING

from xenlab.errors import HypercallError
from xenlab.hypervisor.domain import Domain, Gate, Vcpu
from xenlab.hypervisor.trace import Kind
from xenlab.hypervisor.traps import Undeliverable
from xenlab.machine.engine import SEGMENTS
from xenlab.machine.segments import flat_code, flat_data
from xenlab.machine.state import VM
from xenlab.machine.vectors import NOT_PRESENT, PROTECTION, STACK_FAULT

if TYPE_CHECKING:
    from xenlab.hypervisor.core import Hypervisor

_DATA = ("ds", "es", "fs", "gs")
_U32 = 0xFFFF_FFFF


class SegmentRegisters:
    """Keeps them to what the descriptors say.

    Args:
        xen: whose.
        deliver: hands an exception to a guest: vCPU, vector, error code, address.
    """

    def __init__(self, xen: Hypervisor, deliver: Callable[[Vcpu, int, int, int], None]) -> None:
        self._xen, self._traps, self._segments, self._deliver = xen, xen.traps, xen.traps.segments, deliver

    def reload(self, domain: Domain) -> None:
        """Descriptors of ``domain`` have changed."""
        for vcpu in (vcpu for vcpu in domain.vcpus if vcpu.initialised):
            for name, selector in zip(SEGMENTS, vcpu.state.selectors(), strict=True):
                if selector >= 4 and selector not in vcpu.flat_data and selector not in vcpu.flat_code:
                    self._load(vcpu, name, selector)
            if vcpu.failing:
                self._xen.reschedule()

    def load_first(self, vcpu: Vcpu, selectors: Mapping[str, int]) -> None:
        """Give ``vcpu``, which has never run, its segment registers; what cannot be loaded fails when it first runs.

        Until then its code and stack are flat ones: it is in the ring that its code segment asks for, whatever that is.
        """
        state, ring, limit = vcpu.state, selectors["cs"] & 3, vcpu.address_limit - 1
        state.load_segment("ss", selectors["ss"], flat_data(ring, limit))
        state.load_segment("cs", selectors["cs"], flat_code(ring, limit))
        for name, selector in selectors.items():
            if name in _DATA:
                state.load_segment(name, selector, None)
            if selector >= 4:
                self._load(vcpu, name, selector)
            elif name not in _DATA:
                vcpu.failing = True

    def _load(self, vcpu: Vcpu, name: str, selector: int) -> None:
        state = vcpu.state
        if name == "cs":
            found = self._segments.descriptor(vcpu, selector) if self._segments.code(vcpu, selector) else None
        elif name == "ss":
            usable = self._segments.stack(vcpu, selector, state.cpl)
            found = self._segments.descriptor(vcpu, selector) if usable else None
        else:
            found = self._segments.loadable(vcpu, selector)
            if found is not None and not found.is_conforming and found.dpl < state.cpl:
                state.load_segment(name, 0, None)  # as on any return outwards
                return
        if found is None:
            vcpu.failing = True
        else:
            state.load_segment(name, selector, found)

    def go_on(self, vcpu: Vcpu) -> None:
        """``vcpu``, which is `failing`, is about to run."""
        vcpu.failing = False
        selectors = dict(zip(SEGMENTS, vcpu.state.selectors(), strict=True))
        lost = [name for name in _DATA if self._is_lost(vcpu, selectors[name])]
        no_stack = self._segments.stack(vcpu, selectors["ss"], vcpu.state.cpl) is None
        if lost and vcpu.failsafe_callback is not None:
            if not self._has_no_stack(vcpu, vcpu.failsafe_callback, no_stack):
                self._fail_safe(vcpu, vcpu.failsafe_callback, tuple(selectors[name] for name in _DATA))
            return
        for name in lost:
            vcpu.state.load_segment(name, 0, None)
        if self._segments.code(vcpu, selectors["cs"]) is None:
            self._raise(vcpu, selectors["cs"], NOT_PRESENT, no_stack)
        elif no_stack:
            self._raise(vcpu, selectors["ss"], STACK_FAULT, no_stack)

    def _has_no_stack(self, vcpu: Vcpu, gate: Gate | None, no_stack: bool) -> bool:
        """Whether a gate leads to the same ring and so to the stack segment that cannot be loaded; that ends the guest.

        On an x86 each return to the handler would fault again, further and further down the stack.
        """
        found = no_stack and gate is not None and gate.cs & 3 == vcpu.state.cpl
        if found:
            self._xen.crash(vcpu, "a stack segment that cannot be loaded, and its handler in the same ring")
        return found

    def _raise(self, vcpu: Vcpu, selector: int, absent: int, no_stack: bool) -> None:
        vector = absent if self._segments.is_absent(vcpu, selector) else PROTECTION
        if not self._has_no_stack(vcpu, vcpu.traps[vector], no_stack):
            self._deliver(vcpu, vector, selector & 0xFFFC, 0)

    def _is_lost(self, vcpu: Vcpu, selector: int) -> bool:
        return selector >= 4 and selector not in vcpu.flat_data and self._segments.loadable(vcpu, selector) is None

    def _fail_safe(self, vcpu: Vcpu, gate: Gate, data: tuple[int, ...]) -> None:
        try:
            done = self._enter(vcpu, gate, data)
        except Undeliverable as reason:
            self._xen.crash(vcpu, f"a segment register that cannot be loaded: {reason}")
            return
        self._xen.record(Kind.FAILSAFE, vcpu.domid, *done)

    def _enter(self, vcpu: Vcpu, gate: Gate, data: tuple[int, ...]) -> tuple[int, int, int, int, tuple[int, ...]]:
        state, code = vcpu.state, self._traps.entry_code(vcpu, gate.cs)
        if code is None:
            raise Undeliverable(f"the failsafe callback has the unusable code selector {gate.cs:#x}")
        esp, eip, flags, ring, cs, ss = state.interrupted()
        to_ring = code.selector & 3
        if to_ring > ring or flags & VM:
            raise Undeliverable(f"the failsafe callback's ring {to_ring} is less privileged than ring {ring}")
        words: tuple[int, ...] = (*data, eip, *self._traps.saved(vcpu, cs, flags))
        if to_ring < ring:
            stack = self._traps.entry_stack(vcpu, to_ring)
            words, esp, base = (*words, esp, ss), vcpu.kernel_esp, stack.base
        else:
            stack, base = None, state.segment("ss").base
        frame = esp - 4 * len(words) & _U32
        try:
            self._xen.guest_memory.write(vcpu, base + frame & _U32, pack(f"<{len(words)}I", *words))
        except HypercallError:
            raise Undeliverable(f"the failsafe callback's frame at {frame:#010x} is not on writable memory") from None
        for name in _DATA:
            state.load_segment(name, 0, None)
        self._traps.go_to(vcpu, gate, code, frame, stack)
        return ring, to_ring, gate.eip, frame, words


__all__ = ["SegmentRegisters"]
