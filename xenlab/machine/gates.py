"""A gate of the interrupt table: from one ring to another without the hypervisor (paper 3.1).

The problem: every system call of an application would cost two passages through ring 0, one to the hypervisor and one
on to the guest's kernel.  But the CPU's interrupt table may name a handler in ring 1 as well.  So for the one
software interrupt by which applications call their kernel, the hypervisor writes the guest's own handler into
the table, and the CPU goes there by itself.

Unicorn has no interrupt table; each software interrupt arrives in our hook.  What the CPU would do with the
gate is done there, before anybody in the hypervisor hears of it: look up the code segment, take the inner
stack from the task state segment, push the frame that hardware pushes, go on at the handler.

The invariant: a gate leads to ring 1, 2 or 3, by descriptors that stand in the guest's tables at that moment, and
the frame goes where the new ring may write.  Wherever the CPU would fault, nothing has been changed, and the
interrupt goes the slow way through the hypervisor.  What breaks without it: a system call into ring 0.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct, pack
from typing import NamedTuple

from xenlab.machine.memory import PAGE_SIZE, Memory
from xenlab.machine.paging import READ, USER_WRITE, WRITE, PageFault, walk
from xenlab.machine.segments import Descriptor
from xenlab.machine.state import NT, RF, TF, VM, CpuState, Segment

_TABLE_INDICATOR = 4
USER_RING = 3
_KEPT = ~(TF | NT | RF | VM)
_U32 = 0xFFFF_FFFF
_PAGE, _OFFSET = ~(PAGE_SIZE - 1), PAGE_SIZE - 1
_FRAMES = {count: Struct(f"<{count}I").pack_into for count in (3, 5)}
_LAST_IN_PAGE = PAGE_SIZE - 20


class TrapGate(NamedTuple):
    """An entry of the interrupt table, with the inner stack that the task state segment holds beside it.

    Attributes:
        vector: the software interrupt.
        selector, eip: where the handler is; the selector's own privilege level does not count.
        dpl: the outermost ring that may use it.
        stack_selector, stack_pointer: SS and ESP for the handler's ring.
        code, stack: what these selectors load, where the descriptor cannot change; else None, and it is looked up.
    """

    vector: int
    selector: int
    eip: int
    dpl: int
    stack_selector: int
    stack_pointer: int
    code: Segment | None = None
    stack: Segment | None = None


def descriptor_of(memory: Memory, state: CpuState, selector: int) -> Descriptor | None:
    """The descriptor behind ``selector``, present or not; None where the CPU would find none."""
    base, limit = state.ldt if selector & _TABLE_INDICATOR else state.gdt
    if selector < 4 or selector | 7 > limit & 0xFFFF:
        return None
    found = walk(memory, state.mode, state.cr3, base + (selector & ~7) & _U32, READ, update=False)
    if isinstance(found, PageFault):
        return None
    return Descriptor.decode(memory.qwords[found.machine >> 3])


class Gates:
    """Takes vCPUs through their gates.

    Attributes:
        taken: how often.
        watcher: told of each passage, None for nobody: of the vector, the rings before and after, the handler's
            address, the frame's address and its words from the lowest address up.
    """

    watcher: Callable[[int, int, int, int, int, tuple[int, ...]], None] | None

    def __init__(self, memory: Memory, forget_code: Callable[[int, int], None]) -> None:
        self._memory, self._bytes, self._forget_code = memory, memory.bytes, forget_code
        self.taken = 0
        self.watcher = None
        # Machine addresses of pages that frames were pushed to, good until the TLB is flushed.
        self._pages: dict[int, int] = {}
        self._seen_at = -1
        # All that were pushed to since `forget_written`.
        self._written: set[int] = set()

    def forget_written(self) -> None:
        """Have the CPU translate code anew in all pages that frames were pushed to since the last time."""
        for page in self._written:
            self._forget_code(page, page + PAGE_SIZE)
        self._written.clear()

    def enter(self, state: CpuState, gate: TrapGate, flushes: int) -> bool:
        """Go through ``gate``, if the CPU would not fault; else nothing has happened.

        Args:
            state: the registers, with EIP behind the instruction.
            gate: which.
            flushes: how often the TLB has been emptied.
        """
        esp, eip, flags, ring, cs, ss = state.interrupted()
        if gate.dpl < ring or flags & VM:
            return False
        code = gate.code or self._code(state, gate.selector, ring)
        if code is None:
            return False
        to_ring = code.selector & 3
        if to_ring == ring:
            words: tuple[int, ...] = (eip, cs, flags)
            frame, stack, base = esp - 12 & _U32, None, state.segment("ss").base
        else:
            stack = gate.stack or self._stack(state, gate.stack_selector, to_ring)
            if stack is None or stack.selector & 3 != to_ring:
                return False
            words = (eip, cs, flags, esp, ss)
            frame, base = gate.stack_pointer - 20 & _U32, stack.base
        if self._seen_at != flushes:
            self._pages.clear()
            self._seen_at = flushes
        address = base + frame & _U32
        page, offset = self._pages.get(address & _PAGE | to_ring), address & _OFFSET
        if page is not None and offset <= _LAST_IN_PAGE:
            _FRAMES[len(words)](self._bytes, page + offset, *words)
        elif not self._push(state, address, words, to_ring):
            return False
        state.enter_handler(code, gate.eip, frame, stack, _KEPT)
        self.taken += 1
        if self.watcher is not None:
            self.watcher(gate.vector, ring, to_ring, gate.eip, frame, words)
        return True

    def _code(self, state: CpuState, selector: int, ring: int) -> Segment | None:
        """What CS becomes, its level included, by a gate from ``ring`` to ``selector``."""
        found = descriptor_of(self._memory, state, selector)
        if found is None or not (found.is_code and found.present and 0 < found.dpl <= ring):
            return None
        to_ring = ring if found.is_conforming else found.dpl
        return Segment.of(selector & ~3 | to_ring, found)

    def _stack(self, state: CpuState, selector: int, ring: int) -> Segment | None:
        found = descriptor_of(self._memory, state, selector)
        usable = found is not None and found.is_writable_data and found.present and found.dpl == ring == selector & 3
        return Segment.of(selector, found) if usable else None

    def _push(self, state: CpuState, address: int, words: tuple[int, ...], ring: int) -> bool:
        """Store a frame as ``ring`` would; false, and nothing stored, where it may not."""
        data, room = pack(f"<{len(words)}I", *words), PAGE_SIZE - (address & _OFFSET)
        pieces = [(address, data[:room]), (address + room & _U32, data[room:])]
        places = [self._page(state, at & _PAGE, ring) for at, piece in pieces if piece]
        if -1 in places:
            return False
        for (at, piece), page in zip(pieces, places, strict=False):
            self._memory.write(page + (at & _OFFSET), piece)
        return True

    def _page(self, state: CpuState, address: int, ring: int) -> int:
        """Machine address of the page at ``address`` if ``ring`` may write to it, or -1."""
        page = self._pages.get(address | ring)
        if page is None:
            found = walk(self._memory, state.mode, state.cr3, address, USER_WRITE if ring == USER_RING else WRITE)
            if isinstance(found, PageFault):
                return -1
            page = self._pages[address | ring] = found.machine
            self._written.add(page)
            self._forget_code(page, page + PAGE_SIZE)
        return page
