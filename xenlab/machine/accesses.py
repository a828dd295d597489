"""Every access that guest code makes to memory, as it makes them: what an instrumented run sees.

The problem: a TLB is asked with linear addresses, but Unicorn's memory hooks give machine addresses, after
the translation.  So each access is traced back: Capstone says which operands the instruction has, the
registers say where they lie, and of the linear addresses that come into question the nearest one counts
that really leads to the machine address, by the page table as it is or as the CPU last used it.

The invariant: what is reported was done by the guest, once, in this order, and the linear address leads to
the memory that the CPU touched; an access for which none is found is counted in ``unexplained``, not made up.  What
breaks without it: hits and misses of a run that never was.

An access that faults is not reported; it is when it is made again.  The CPU's own reads of page tables are none
of the guest's.  Hooks make a run many times slower, so they are in place only within `accesses`; the run itself
stays the same, to the instruction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import unicorn
from unicorn import x86_const as x86

from xenlab.machine.cpu import Cpu
from xenlab.machine.engine import GENERAL, REGISTER_IDS, SEGMENTS
from xenlab.machine.fault_code import LONGEST_INSTRUCTION, decoder, read_linear
from xenlab.machine.memory import PAGE_SHIFT, PAGE_SIZE, Memory
from xenlab.machine.paging import READ, PageFault, walk
from xenlab.machine.register_batch import RegisterBatch
from xenlab.machine.segments import Descriptor

_REGISTERS = (*GENERAL, *SEGMENTS)
_STACK, _FRAME = GENERAL.index("esp"), GENERAL.index("ebp")
_MEMORY_OPERAND = 3  # capstone.x86.X86_OP_MEM
_TABLES = (x86.UC_X86_REG_GDTR, x86.UC_X86_REG_LDTR, x86.UC_X86_REG_TR)
_U32, _IN_PAGE = 0xFFFF_FFFF, PAGE_SIZE - 1


class AccessKind(IntEnum):
    """What is done to memory."""

    READ = 0
    WRITE = 1
    FETCH = 2


Seen = Callable[[AccessKind, int, int, int], None]
UNKNOWN = -1  # in place of a machine address


class _Operand(NamedTuple):
    """Where an operand in memory lies: places in `_REGISTERS`, -1 for none."""

    base: int
    indexed: int
    scale: int
    displacement: int
    segment: int
    mask: int

    def offset(self, registers: list[int]) -> int:
        offset = self.displacement
        if self.base >= 0:
            offset += registers[self.base] & self.mask
        if self.indexed >= 0:
            offset += (registers[self.indexed] & self.mask) * self.scale
        return offset & self.mask


class AccessWatch:
    """What `accesses` gives: how far the watch has come.

    Attributes:
        eip: linear address of the instruction that is being executed.
        time: instructions begun, with that one.
        unexplained: accesses for which no linear address was found.
    """

    def __init__(self, cpu: Cpu, memory: Memory, seen: Seen) -> None:
        self._cpu, self._memory, self._seen = cpu, memory, seen
        self._batch = RegisterBatch(cpu.engine, [(REGISTER_IDS[name], 4) for name in _REGISTERS])
        self.eip = self.time = self.unexplained = 0
        self._places: list[int] | None = None
        # Where pages led when the CPU last used them; right until the TLB is emptied.
        self._frames: dict[int, int] = {}
        self._flushes = cpu.flushes
        self._failure: BaseException | None = None
        self._end = cpu.engine.observe(self._begun, self._accessed)

    def end(self) -> None:
        """Stop watching; raises what went wrong in a callback."""
        self._end()
        if self._failure is not None:
            raise self._failure

    def _begun(self, _engine: int, address: int, length: int, _data: int) -> None:
        time = self._cpu.time_in_guest
        if time >= 0 and self._failure is None:
            try:
                self.eip, self.time, self._places = address, time, None
                # An invalid opcode has no length.
                length = length if length <= LONGEST_INSTRUCTION else 1
                self._seen(AccessKind.FETCH, address, length, UNKNOWN)
            except BaseException as failure:
                # It must not cross into libunicorn, where it would be lost.
                self._failure = failure

    def _accessed(self, _engine: int, kind: int, machine: int, size: int, _value: int, _data: int) -> None:
        if self._cpu.time_in_guest >= 0 and self._failure is None:
            try:
                address = self._linear(machine)
                if address is None:
                    self.unexplained += 1
                else:
                    what = AccessKind.WRITE if kind == unicorn.UC_MEM_WRITE else AccessKind.READ
                    self._seen(what, address, size, machine)
            except BaseException as failure:
                self._failure = failure

    def _linear(self, machine: int) -> int | None:
        """The linear address at which the instruction reached ``machine``."""
        if self._places is None:
            self._places = self._operand_places()
        frame = machine >> PAGE_SHIFT
        steps = sorted((abs(step), place + step) for place in self._places for step in (_step(place, machine),))
        near = (address & _U32 for _distance, address in steps)
        return next(
            (address for address in chain(near, self._table_places(machine)) if self._leads(address, frame)), None
        )

    def _leads(self, address: int, frame: int) -> bool:
        if self._flushes != self._cpu.flushes:
            self._flushes = self._cpu.flushes
            self._frames.clear()
        page = address >> PAGE_SHIFT
        if self._frames.get(page) != frame:
            found = walk(self._memory, self._cpu.state.mode, self._cpu.state.cr3, address, READ, update=False)
            if isinstance(found, PageFault) or found.machine >> PAGE_SHIFT != frame:
                return False
            self._frames[page] = frame
        return True

    def _operand_places(self) -> list[int]:
        """Linear addresses that the instruction may use, but for what lies a little beside them."""
        code = read_linear(self._memory, self._cpu.state, self.eip, LONGEST_INSTRUCTION)
        registers = self._batch.read_integers()
        places = [registers[_STACK], registers[_FRAME]]
        for operand in _operands(code):
            offset, selector = operand.offset(registers), registers[operand.segment]
            places += [offset, self._segment_base(selector) + offset & _U32]
        return places

    def _segment_base(self, selector: int) -> int:
        _selector, base, _limit, _flags = self._cpu.engine.uc.reg_read(x86.UC_X86_REG_GDTR)
        value = read_linear(self._memory, self._cpu.state, base + (selector & ~7) & _U32, 8)
        return Descriptor.decode(int.from_bytes(value, "little")).base if selector >= 4 else 0

    def _table_places(self, machine: int) -> Iterator[int]:
        """Where ``machine`` may lie in the descriptor tables and the task segment, which the CPU reads by itself."""
        for register in _TABLES:
            _selector, base, limit, _flags = self._cpu.engine.uc.reg_read(register)
            for page in range(base >> PAGE_SHIFT, (base + limit >> PAGE_SHIFT) + 1):
                yield (page << PAGE_SHIFT | machine & _IN_PAGE) & _U32


def _step(place: int, machine: int) -> int:
    """How far from ``place`` the nearest address with the same place in its page as ``machine`` is."""
    return (machine - place + PAGE_SIZE // 2 & _IN_PAGE) - PAGE_SIZE // 2


@lru_cache(maxsize=4096)
def _operands(code: bytes) -> tuple[_Operand, ...]:
    instruction = next(decoder().disasm(code.lstrip(b"\xf0"), 0, 1), None)
    if instruction is None:
        return ()
    if instruction.mnemonic == "xlatb":
        return (_Operand(GENERAL.index("ebx"), -1, 1, 0, _REGISTERS.index("ds"), _U32),)
    return tuple(_operand(instruction, item.mem) for item in instruction.operands if item.type == _MEMORY_OPERAND)


def _operand(instruction: Any, memory: Any) -> _Operand:
    def place(number: int) -> int:
        name = instruction.reg_name(number) if number else ""
        return _REGISTERS.index(name if name.startswith("e") or name in SEGMENTS else f"e{name}") if name else -1

    base = place(memory.base)
    segment = place(memory.segment)
    if segment < 0:
        segment = _REGISTERS.index("ss" if base in (_STACK, _FRAME) else "ds")
    mask = 0xFFFF if instruction.addr_size == 2 else _U32
    return _Operand(base, place(memory.index), memory.scale, memory.disp, segment, mask)


@contextmanager
def accesses(cpu: Cpu, memory: Memory, seen: Seen) -> Iterator[AccessWatch]:
    """Report each access that guest code makes within this context, which must begin and end between runs.

    Args:
        cpu: either CPU.
        memory: the machine's.
        seen: called as ``seen(kind, linear address, size, machine address)`` at each, inside the run.  The machine
            address is the one that the CPU used, `UNKNOWN` for a fetch; an access may go on in the next page.

    Raises:
        whatever ``seen`` raised, at the end of the context; from then on nothing was reported.
    """
    watch = AccessWatch(cpu, memory, seen)
    try:
        yield watch
    finally:
        watch.end()


__all__ = ["UNKNOWN", "AccessKind", "AccessWatch", "accesses"]
