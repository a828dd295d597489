"""Breakpoints that a guest has set in its debug registers: where they are hit (paper 2.1.2).

The problem: the debug registers watch four addresses, for execution, for stores or for any access, and raise #DB.
The emulated CPU watches execution only, and only what its own ring 0 has set.  So a guest that has switched a
breakpoint on (`debug_registers`) is run instruction by instruction, with each access reported, until it switches it
off.  That is a thousand times slower, for that guest, and for nobody else.

What is reported is a machine address, so the watched ones are translated too, by the page table as it is.  Whether
an access happened counts, not whether it was the guest's own: a frame that the hypervisor builds hits nothing.

The invariant: an execution breakpoint comes before its instruction, with the flag that lets a return get past it;
a data breakpoint comes after its instruction, and behind a load of SS one instruction later, since nothing
may come between that and the load of ESP.  What breaks without it: a debugger stops at the same place for ever.

An instruction that faults hits nothing; it does when it is executed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import unicorn

from xenlab.hypervisor.debug_registers import ENABLED
from xenlab.hypervisor.domain import Vcpu
from xenlab.machine.paging import READ, PageFault, walk
from xenlab.machine.state import RF
from xenlab.machine.vectors import DEBUG

if TYPE_CHECKING:
    from xenlab.hypervisor.core import Hypervisor

EXECUTION, STORE, ACCESS = 0, 1, 3
_LENGTHS = (1, 2, 8, 4)
_PREFIXES = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67))
_POP_SS, _LOAD_SEGMENT, _SS = 0x17, 0x8E, 2
_LONGEST = 15
_EXCEPTIONS = 32
_U32 = 0xFFFF_FFFF


class Breakpoints:
    """Runs guests, those with breakpoints one instruction at a time.

    Attributes:
        raised: whether the exception that is being handled is one of these, and not the end of a single step.
    """

    def __init__(self, xen: Hypervisor) -> None:
        self._xen, self._cpu, self._memory = xen, xen.cpu, xen.memory
        self._end: Callable[[], None] | None = None
        self._seen: list[tuple[int, int, bool]] = []
        self._trapped, self._hits = False, 0
        self.raised = False

    def note(self, vcpu: Vcpu) -> None:
        """Its DR7 was written."""
        vcpu.watched = bool(vcpu.control["dr7"] & ENABLED)
        if vcpu.watched:
            self._cpu.stop()

    def advance(self, end: int) -> None:
        """Let the current vCPU run until ``end``, or for one instruction if it has breakpoints."""
        vcpu = self._xen.current
        assert vcpu is not None
        if vcpu.watched:
            self._step(vcpu)
            return
        if self._end is not None:
            self._end()
            self._end = None
        self._cpu.run_until(end)

    def _step(self, vcpu: Vcpu) -> None:
        state = vcpu.state
        flags, linear = state.eflags, state.segment("cs").base + state.eip & _U32
        hits = 0 if flags & RF else _hits_at(vcpu, linear)
        if hits:
            state.eflags = flags | RF
            self._raise(vcpu, hits)
            return
        if self._end is None:
            self._end = self._cpu.engine.observe(lambda *_: None, self._accessed)
        shadow = loads_stack_segment(self._xen.guest_memory.read_code(vcpu, _LONGEST))
        # Those that wait for the instruction behind a load of SS.
        held, vcpu.held_hits = vcpu.held_hits, 0
        self._execute(vcpu, held, list(self._watched(vcpu)))
        if self._trapped:
            return
        if flags & RF:
            state.eflags &= ~RF
        if self._hits and shadow:
            vcpu.held_hits = self._hits
        elif self._hits:
            self._raise(vcpu, self._hits)

    def _execute(self, vcpu: Vcpu, held: int, watched: list[tuple[int, int, int, int]]) -> None:
        """One instruction, and what it hits, with ``held`` from before; nothing if it traps.

        If the guest steps through its code, that trap comes behind the instruction, and says of hits too.  Behind a
        software interrupt those from before go on waiting; a fault loses them.  A fault at fetching takes no time,
        and ends the run: what its handler begins with may be watched as well.
        """
        handler, begun = self._cpu.handler, self._xen.now

        def trap(vector: int, error: int, address: int) -> None:
            self._trapped = True
            if vector == DEBUG:
                vcpu.control["dr6"] |= held | self._hit(watched)
            vcpu.held_hits = held if vector >= _EXCEPTIONS else 0
            if self._xen.now == begun:
                self._cpu.stop()
            handler(vector, error, address)

        self._trapped = False
        self._seen.clear()
        self._cpu.handler = trap
        try:
            self._cpu.run_until(begun + 1)
        finally:
            self._cpu.handler = handler
        self._hits = held | self._hit(watched)

    def _hit(self, watched: list[tuple[int, int, int, int]]) -> int:
        return sum(1 << number for number, kind, machine, size in watched if self._touched(kind, machine, size))

    def _raise(self, vcpu: Vcpu, hits: int) -> None:
        vcpu.control["dr6"] |= hits
        self.raised = True
        self._cpu.handler(DEBUG, 0, 0)

    def _accessed(self, _engine: int, kind: int, machine: int, size: int, _value: int, _data: int) -> None:
        self._seen.append((machine, size, kind == unicorn.UC_MEM_WRITE))

    def _touched(self, kind: int, machine: int, size: int) -> bool:
        """Whether the last instruction stored to these bytes, or read them where that counts."""
        of_kind = (seen for seen in self._seen if seen[2] or kind == ACCESS)
        return any(at < machine + size and machine < at + length for at, length, _store in of_kind)

    def _watched(self, vcpu: Vcpu) -> Iterator[tuple[int, int, int, int]]:
        """Number, kind, machine address and size of each data breakpoint that is on and whose page is there."""
        for number, kind, address, size in _switched_on(vcpu):
            if kind in (STORE, ACCESS):
                found = walk(self._memory, vcpu.state.mode, vcpu.state.cr3, address & -size & _U32, READ, update=False)
                if not isinstance(found, PageFault):
                    yield number, kind, found.machine, size


def _switched_on(vcpu: Vcpu) -> Iterator[tuple[int, int, int, int]]:
    """Number, kind, linear address and size of each breakpoint that is on."""
    control = vcpu.control["dr7"]
    for number in range(4):
        if control >> 2 * number & 3:
            bits = control >> 16 + 4 * number
            yield number, bits & 3, vcpu.control[f"dr{number}"], _LENGTHS[bits >> 2 & 3]


def _hits_at(vcpu: Vcpu, linear: int) -> int:
    """Which execution breakpoints the instruction at ``linear`` hits, as bits."""
    numbers = (number for number, kind, address, _size in _switched_on(vcpu) if (kind, address) == (EXECUTION, linear))
    return sum(1 << number for number in numbers)


def loads_stack_segment(code: bytes) -> bool:
    """Whether the instruction is MOV or POP to SS, behind which nothing comes in between."""
    rest = code.lstrip(bytes(_PREFIXES))
    if rest[:1] == bytes((_LOAD_SEGMENT,)):
        return len(rest) > 1 and rest[1] >> 3 & 7 == _SS
    return rest[:1] == bytes((_POP_SS,))
