"""Error codes of faults, found without looking into the emulator.

The problem: the CPU pushes an error code for page faults and for faults about a selector, but
Unicorn has no public call that gives it.  It has one that is better than a guess: with the
"virtual" TLB mode it asks us for each translation, and says whether a read, a write or a fetch
needs it.  So after a page fault the instruction is begun once more in that mode.  Each page that
it asks for is looked up by the walk in Python, until the walk refuses one: that is the fault, and
its code.  The instruction makes the accesses that it made the first time, in the same order, and
none after the one that faulted; registers are put back, and what it had stored is stored again.

A fault about a selector has that selector as its code: the instruction is decoded, and the
selector read from where it says.

The invariant: the code is the one that the emulator keeps in its state, where the probed CPU reads
it.  What breaks without it: a guest's page-fault handler would take a write for a read, and the
portable CPU would give other traces than the probed one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import unicorn

from xenlab.machine.engine import SEGMENTS, Engine
from xenlab.machine.memory import PAGE_MASK, PAGE_SIZE, Memory
from xenlab.machine.paging import READ, Access, PageFault, PagingMode, walk
from xenlab.machine.segments import Descriptor
from xenlab.machine.state import NT, VM, Segment

_PERMISSION = {
    unicorn.UC_MEM_READ: unicorn.UC_PROT_READ,
    unicorn.UC_MEM_WRITE: unicorn.UC_PROT_WRITE,
    unicorn.UC_MEM_FETCH: unicorn.UC_PROT_EXEC,
}
LONGEST_INSTRUCTION = 15
_FAR_RETURNS = ("retf", "iret", "iretd")
_CALL_GATE = 0x8C  # present, and of the 32-bit kind
_MEMORY_OPERAND = 3  # capstone.x86.X86_OP_MEM


class Faulting(Protocol):
    """What is asked about the state of a vCPU at its fault."""

    mode: PagingMode
    cr3: int
    eip: int
    gdt: tuple[int, int]
    ldt: tuple[int, int]

    @property
    def cpl(self) -> int: ...

    def segment(self, name: str) -> Segment: ...


class PageFaultCodes:
    """Finds the error code of a page fault by beginning the instruction again.

    Args:
        engine: the CPU that faulted; it gets one more hook, silent in its normal TLB mode.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._state: Faulting
        self._error = 0
        engine.uc.hook_add(unicorn.UC_HOOK_TLB_FILL, self._fill)

    def find(self, state: Faulting, address: int) -> int:
        """The error code of the page fault at ``address`` that the engine has just taken in ``state``.

        The engine's registers are undefined afterwards.
        """
        uc = self._engine.uc
        self._state, self._error = state, 0
        uc.ctl_set_tlb_mode(unicorn.UC_TLB_VIRTUAL)
        self._engine.write_cr3(state.cr3)  # empties the TLB
        self._engine.start(state.eip, 1)
        uc.ctl_set_tlb_mode(unicorn.UC_TLB_CPU)
        return self._error

    def _fill(self, _uc: Any, address: int, kind: int, entry: Any, _data: Any) -> bool:
        state = self._state
        user = state.cpl == 3 and (kind == unicorn.UC_MEM_FETCH or not self._by_cpu_itself(address, kind))
        access = Access(kind == unicorn.UC_MEM_WRITE, user, kind == unicorn.UC_MEM_FETCH)
        found = walk(self._engine.memory, state.mode, state.cr3, address, access, update=False)
        if isinstance(found, PageFault):
            self._error = int(found.error)
            return False
        entry.paddr, entry.perms = found.machine & PAGE_MASK, _PERMISSION[kind]
        return True

    def _by_cpu_itself(self, address: int, kind: int) -> bool:
        """Whether an access is made with the rights of ring 0, whatever ring the instruction is in.

        The emulator does so for descriptors, for the stacks of far returns, and where a far call pushes.
        """
        instruction = decode(self._engine.memory, self._state)
        name = instruction.mnemonic if instruction else ""
        if name in _FAR_RETURNS or (name == "lcall" and kind == unicorn.UC_MEM_WRITE):
            return True
        if name in ("mov", "pop") and instruction.reg_name(instruction.operands[0].reg) not in SEGMENTS:
            return False
        tables = (self._state.gdt, self._state.ldt)
        in_table = any(limit and base & PAGE_MASK <= address <= base + limit for base, limit in tables)
        return name in _READS_DESCRIPTOR and in_table


class SelectorCodes:
    """Finds the error code of a #TS, #NP, #SS or #GP: the selector that could not be loaded, or 0."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def find(self, state: Any) -> int:
        """The error code of the fault at the instruction that ``state`` stands at."""
        if state.eflags & VM:
            return 0
        instruction = decode(self._memory, state)
        if instruction is None:
            return 0
        find = _SELECTOR_OF.get(instruction.mnemonic)
        return find(self, state, instruction) & 0xFFFC if find else 0

    def moved(self, state: Any, instruction: Any) -> int:
        """``mov sreg, r/m16``."""
        to, source = instruction.operands
        if instruction.reg_name(to.reg) not in SEGMENTS:
            return 0
        if source.type == _MEMORY_OPERAND:
            return self._word(state, self._address(state, instruction, source))
        return int(getattr(state, _wide(instruction.reg_name(source.reg)))) & 0xFFFF

    def popped(self, state: Any, instruction: Any) -> int:
        """``pop sreg``."""
        if instruction.reg_name(instruction.operands[0].reg) not in SEGMENTS:
            return 0
        return self._stack(state, 0)

    def far_pointer(self, state: Any, instruction: Any) -> int:
        """``lds`` and its like, ``ljmp``, ``lcall``: at the end of the instruction or in memory."""
        if instruction.opcode[0] in (0x9A, 0xEA):
            selector = int.from_bytes(instruction.bytes[-2:], "little")
        else:
            size = _operand_size(instruction)
            selector = self._word(state, self._address(state, instruction, instruction.operands[-1]) + size)
        return self._behind_gate(state, selector) if instruction.mnemonic in ("ljmp", "lcall") else selector

    def _behind_gate(self, state: Any, selector: int) -> int:
        """Which selector is at fault in a far call to ``selector``: if it is a call gate in order, not its own."""
        gate = self._descriptor(state, selector)
        found = Descriptor.decode(gate)
        if found.access & 0x9F != _CALL_GATE or found.dpl < max(state.cpl, selector & 3):
            return selector
        target = gate >> 16 & 0xFFFF
        code = Descriptor.decode(self._descriptor(state, target))
        reachable = code.is_code and code.present and code.dpl <= state.cpl
        # What is left is the stack for that ring.  There is one for ring 1 only.
        return target if not reachable else state.inner_stack[1] if code.dpl == 1 else 0

    def _descriptor(self, state: Any, selector: int) -> int:
        base, limit = state.ldt if selector & 4 else state.gdt
        if selector < 4 or selector | 7 > limit:
            return 0
        return int.from_bytes(read_linear(self._memory, state, base + (selector & ~7), 8), "little")

    def returned(self, state: Any, instruction: Any) -> int:
        """``retf`` and ``iret``: the code selector, unless that one is right; then the stack's."""
        is_iret = instruction.mnemonic.startswith("iret")
        if is_iret and state.eflags & NT:
            return 0  # to the task before this one, and the task state segment names none
        size = _operand_size(instruction)
        code = self._stack(state, size)
        if not self._is_return_target(state, code):
            return code
        skipped = 0 if is_iret or not instruction.operands else instruction.operands[0].imm
        return self._stack(state, size * (4 if is_iret else 3) + skipped)

    def _is_return_target(self, state: Any, selector: int) -> bool:
        base, limit = state.ldt if selector & 4 else state.gdt
        if selector | 7 > limit or selector & 3 < state.cpl:
            return False
        value = int.from_bytes(read_linear(self._memory, state, base + (selector & ~7), 8), "little")
        found = Descriptor.decode(value)
        level_fits = found.dpl <= selector & 3 if found.is_conforming else found.dpl == selector & 3
        return found.is_code and level_fits and found.present

    def _stack(self, state: Any, offset: int) -> int:
        return self._word(state, state.segment("ss").base + state.esp + offset)

    def _word(self, state: Any, address: int) -> int:
        return int.from_bytes(read_linear(self._memory, state, address & 0xFFFF_FFFF, 2), "little")

    def _address(self, state: Any, instruction: Any, operand: Any) -> int:
        memory = operand.mem
        offset = int(memory.disp)
        if memory.base:
            offset += int(getattr(state, _wide(instruction.reg_name(memory.base))))
        if memory.index:
            offset += int(getattr(state, _wide(instruction.reg_name(memory.index)))) * memory.scale
        stack = memory.base and instruction.reg_name(memory.base) in ("esp", "ebp")
        name = instruction.reg_name(memory.segment) if memory.segment else "ss" if stack else "ds"
        return int(state.segment(name).base) + offset


@cache
def decoder() -> Any:
    """Capstone for 32-bit x86, with operands."""
    import capstone  # 0.15 s: only for guests that fault

    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_32)
    decoder.detail = True
    return decoder


def decode(memory: Memory, state: Faulting) -> Any:
    """The instruction that ``state`` stands at, decoded by Capstone, or None."""
    at = state.segment("cs").base + state.eip & 0xFFFF_FFFF
    # The emulator accepts LOCK before instructions that do not write to memory; Capstone does not.
    code = read_linear(memory, state, at, LONGEST_INSTRUCTION).lstrip(b"\xf0")
    return next(decoder().disasm(code, at, 1), None)


def read_linear(memory: Memory, state: Faulting, address: int, length: int) -> bytes:
    """Bytes at a linear address, as many of ``length`` as are mapped."""
    data = b""
    while length:
        size = min(length, PAGE_SIZE - address % PAGE_SIZE)
        found = walk(memory, state.mode, state.cr3, address, READ, update=False)
        if isinstance(found, PageFault):
            break
        data += memory.bytes[found.machine : found.machine + size]
        address, length = address + size & 0xFFFF_FFFF, length - size
    return data


def _wide(register: str) -> str:
    return register if register.startswith("e") else f"e{register}"


def _operand_size(instruction: Any) -> int:
    return 2 if 0x66 in instruction.prefix else 4


_Finder = Callable[[SelectorCodes, Any, Any], int]
_SELECTOR_OF: dict[str, _Finder] = {
    "mov": SelectorCodes.moved,
    "pop": SelectorCodes.popped,
    **dict.fromkeys(("lds", "les", "lss", "lfs", "lgs", "ljmp", "lcall"), SelectorCodes.far_pointer),
    **dict.fromkeys(_FAR_RETURNS, SelectorCodes.returned),
}
_READS_DESCRIPTOR = {*_SELECTOR_OF, "lar", "lsl", "verr", "verw"}

__all__ = ["LONGEST_INSTRUCTION", "PageFaultCodes", "SelectorCodes", "decoder", "read_linear"]
