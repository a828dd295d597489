"""A vCPU's registers: a typed view over the engine's own, or over a copy of them.

The problem: the hypervisor works on the state of a vCPU that is not running, as a register
frame on its stack was for Xen.  The registers of the vCPU that was interrupted stand in the engine, and the view
reads and writes them in place; those of all others are copies of so many bytes as a guest can change.
A domain switch copies one set out and another one in (`ContextState.enter`).

Three things in it are not what they seem, and the view hides them:

* QEMU computes flags lazily.  The flags word is only right when the last flag-setting
  operation is marked as "flags are explicit", so reading asks the library and writing
  makes them explicit.  At an exception Unicorn has computed them, since it counts
  instructions, and has then put back the operation before: there they are marked anew (`cpu`).
* The current privilege level is no register.  It is kept in hidden flags, and follows the
  stack segment when one is loaded.
* Hidden flags also say how wide code and stack are; they follow the segment caches.

The invariant: after any write through the view, hidden flags, segment caches and flags agree
as if the CPU had executed it.  What breaks without it: a guest that comes back in ring 0.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

from xenlab.machine import layout as at
from xenlab.machine.engine import GENERAL, SEGMENTS
from xenlab.machine.floating_point import from_image
from xenlab.machine.paging import PagingMode
from xenlab.machine.registers import EngineRegisters, view_over
from xenlab.machine.segments import Descriptor

if TYPE_CHECKING:
    from xenlab.machine.gates import TrapGate

CF, PF, AF, ZF, SF, TF, IF, DF, OF = 0x1, 0x4, 0x10, 0x40, 0x80, 0x100, 0x200, 0x400, 0x800
IOPL, NT, RF, VM, AC, ID = 0x3000, 0x4000, 0x1_0000, 0x2_0000, 0x4_0000, 0x20_0000
CR0_TS = 0x8
ARITHMETIC = CF | PF | AF | ZF | SF | OF

# Indices of 32-bit words, counted from the first general register.
_EIP, _EFLAGS, _CC_SRC, CC_OP, _DF, _HFLAGS = (
    offset // 4 for offset in (at.EIP, at.EFLAGS, at.CC_SRC, at.CC_OP, at.DF, at.HFLAGS)
)
_CACHES, _STRIDE = at.SEGMENT_CACHES // 4, at.SEGMENT_STRIDE // 4
_CR0 = at.CONTROL // 4
CR2 = _CR0 + 4
_EXTRA, _CODE, _STACK, _DATA = (_CACHES + _STRIDE * number for number in range(4))
_LDT = _CACHES + _STRIDE * len(SEGMENTS)
_GDT = _LDT + 2 * _STRIDE  # the task register stands between them
_PRESENT_LDT = 0x8200  # the attributes that LLDT would load
_ESP = 8
_BIG = 1 << 22  # D/B in the second word of a descriptor
_FOLLOWING = at.HF_CS32 | at.HF_SS32 | at.HF_ADDSEG
_CACHE = struct.Struct("<I4xI4xII")
_pack_cache, _unpack_cache = _CACHE.pack_into, _CACHE.unpack_from
_CS_AND_SS = slice(4 * _CODE, 4 * (_STACK + _STRIDE))
_CODE_BYTE = 4 * _CODE
_CPL, _CC_OP_EFLAGS, _FLAT = at.HF_CPL, at.CC_OP_EFLAGS, at.HF_CS32 | at.HF_SS32
_GENERAL = struct.Struct("<" + 8 * "I4x")


class Segment(NamedTuple):
    """What a segment register holds: the visible selector and the hidden cache.

    Attributes:
        selector: the 16-bit value that the guest sees.
        base, limit: from the descriptor at the time it was loaded.
        attributes: the descriptor's second word.
    """

    selector: int
    base: int
    limit: int
    attributes: int

    @classmethod
    def of(cls, selector: int, descriptor: Descriptor | None) -> Segment:
        """The cache after loading ``selector`` with ``descriptor`` (None for a null selector)."""
        if descriptor is None:
            return cls(selector, 0, 0, 0)
        return cls(selector, descriptor.base, descriptor.limit, descriptor.encode() >> 32)


class CpuState(Protocol):
    """The registers of one vCPU, readable and writable while it is not running.

    All values are 32-bit unsigned integers.  ``mode`` and ``cr3`` say which page tables it
    runs on; a new ``cr3`` takes effect when the state is next loaded into the CPU.  ``gate`` is the one entry of
    the interrupt table that does not lead to the hypervisor, and ``inner_stack`` ESP and SS for ring 1, as
    `Cpu.set_inner_stack` sets them.
    """

    mode: PagingMode
    cr3: int
    gate: TrapGate | None
    inner_stack: tuple[int, int]
    eax: int
    ecx: int
    edx: int
    ebx: int
    esp: int
    ebp: int
    esi: int
    edi: int
    eip: int
    eflags: int

    @property
    def cpl(self) -> int:
        """Current privilege level: the ring, 0 to 3."""
        ...

    @property
    def cr2(self) -> int:
        """Address of the last page fault."""
        ...

    def segment(self, name: str) -> Segment:
        """The segment register ``name``, one of es cs ss ds fs gs."""
        ...

    def load_segment(self, name: str, selector: int, descriptor: Descriptor | None) -> None:
        """Load a segment register without any check; loading ``ss`` sets the ring."""
        ...

    @property
    def gdt(self) -> tuple[int, int]:
        """Linear address and limit of the descriptor table."""
        ...

    @property
    def ldt(self) -> tuple[int, int]:
        """Linear address and limit of the local descriptor table."""
        ...

    def set_ldt(self, base: int, limit: int) -> None:
        """Let the CPU look for local descriptors at linear address ``base``, up to offset ``limit``."""
        ...

    def set_task_switched(self, on: bool) -> None:
        """Set CR0.TS, with which the next floating-point or SSE instruction raises #NM, or clear it."""
        ...

    def set_floating_point(self, image: bytes) -> None:
        """Load the x87 and SSE registers from an image as FXSAVE stores it."""
        ...

    def general(self) -> tuple[int, int, int, int, int, int, int, int]:
        """EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI."""
        ...

    def frame(self) -> tuple[int, ...]:
        """The eight general registers, EIP, and a word whose two lowest bits are the ring."""
        ...

    def set_eax(self, value: int) -> None:
        """Set EAX: what a hypercall does last."""
        ...

    def selectors(self) -> tuple[int, ...]:
        """ES, CS, SS, DS, FS and GS as the guest sees them."""
        ...

    def interrupted(self) -> tuple[int, int, int, int, int, int]:
        """ESP, EIP, EFLAGS, ring, CS and SS: what an exception frame is made of."""
        ...

    def transfer(self, cs: Segment, eip: int, eflags: int, esp: int, ss: Segment | None) -> None:
        """Go on at ``cs:eip`` with these flags and ESP; with an ``ss``, in its ring."""
        ...

    def enter_handler(self, cs: Segment | None, eip: int, esp: int, ss: Segment | None, kept: int) -> None:
        """Go on as an exception does: arithmetic flags and DF stay, and of the others those in ``kept``.

        Without a ``cs`` or ``ss`` that segment stays; with an ``ss``, the ring becomes its ring.
        """
        ...

    def save(self) -> bytes:
        """Everything, as bytes that `restore` of the same process takes."""
        ...

    def restore(self, saved: bytes) -> None:
        """Take over what `save` gave."""
        ...

    def architectural(self) -> Mapping[str, int]:
        """All registers that a program can observe, by name: what a machine hash is made of."""
        ...


class _Word:
    """A register that is one 32-bit word of the context."""

    __slots__ = ("_index",)

    def __init__(self, index: int) -> None:
        self._index = index

    def __get__(self, state: ContextState, _owner: type[ContextState]) -> int:
        return state.words[self._index]

    def __set__(self, state: ContextState, value: int) -> None:
        state.words[self._index] = value


class ContextState:
    """`CpuState` over registers whose layout was probed: the engine's own while it has been entered, else a copy.

    Args:
        registers: the engine's, whose present values it begins with.
        mode, cr3: see `CpuState`.
        entered: whether it is the engine's own from the start, as one is at any time.

    Attributes:
        words: the registers as 32-bit words, from EAX on.
    """

    eax, ecx, edx, ebx = _Word(0), _Word(2), _Word(4), _Word(6)
    esp, ebp, esi, edi = _Word(8), _Word(10), _Word(12), _Word(14)
    eip = _Word(_EIP)

    def __init__(self, registers: EngineRegisters, mode: PagingMode, cr3: int, *, entered: bool = False) -> None:
        self._registers = registers
        self._own = view_over(memoryview(bytearray(registers.view[0])))
        self._view = registers.view if entered else self._own
        self._raw, self.words, self.frame, self.set_eax, self.selectors, self._unpack_interrupted = self._view
        self.mode, self.cr3 = mode, cr3
        self.gate: TrapGate | None = None
        self.inner_stack = (0, 0)
        # What `transfer` packed last: mostly the kernel's segments, each time.
        self._entry: tuple[Segment | None, Segment | None, bytes, bool, int] = (None, None, b"", False, 0)

    def enter(self, before: ContextState) -> None:
        """These become the engine's registers instead of those of ``before``, which are a copy from now on."""
        live, own = before._view, before._own
        own[0][:] = live[0]
        before._view = own
        # Spelled out as attributes, since a trap reads them more often than a switch sets them.
        before._raw, before.words, before.frame, before.set_eax, before.selectors, before._unpack_interrupted = own
        own = self._own
        live[0][:] = own[0]
        self._view = live
        self._raw, self.words, self.frame, self.set_eax, self.selectors, self._unpack_interrupted = live

    @property
    def cpl(self) -> int:
        return self.words[_HFLAGS] & at.HF_CPL

    @property
    def cr2(self) -> int:
        return self.words[CR2]

    @property
    def eflags(self) -> int:
        words = self.words
        if words[CC_OP] != at.CC_OP_EFLAGS:
            return self._lazy_flags()
        return words[_EFLAGS] & ~(ARITHMETIC | DF) | words[_CC_SRC] & ARITHMETIC | words[_DF] & DF | 2

    @eflags.setter
    def eflags(self, value: int) -> None:
        words = self.words
        words[_EFLAGS] = value & ~(ARITHMETIC | DF) | 2
        words[_CC_SRC] = value & ARITHMETIC
        words[CC_OP] = at.CC_OP_EFLAGS
        words[_DF] = 0xFFFF_FFFF if value & DF else 1

    def _lazy_flags(self) -> int:
        entered = self._view is not self._own
        return self._registers.eflags() if entered else self._registers.eflags_of(self._raw)

    def has_stopped(self) -> None:
        """The engine is not running any more.

        Between two runs it keeps all flags in one word; during a run it keeps most of them
        beside it, which is the form that traps need.
        """
        self.eflags = self._registers.eflags()

    def starts(self) -> None:
        """The engine is about to run: the other way round."""
        self.words[_EFLAGS] = self.eflags

    def segment(self, name: str) -> Segment:
        start = _CACHES + _STRIDE * SEGMENTS.index(name)
        cache = self.words[start : start + _STRIDE]
        return Segment(cache[0], cache[2], cache[4], cache[5])

    def load_segment(self, name: str, selector: int, descriptor: Descriptor | None) -> None:
        segment = Segment.of(selector, descriptor)
        start = _CACHES + _STRIDE * SEGMENTS.index(name)
        words = self.words
        words[start], words[start + 2] = segment.selector, segment.base
        words[start + 4], words[start + 5] = segment.limit, segment.attributes
        if name == "ss" and descriptor is not None:
            words[_HFLAGS] = words[_HFLAGS] & ~at.HF_CPL | descriptor.dpl
        words[_HFLAGS] = words[_HFLAGS] & ~_FOLLOWING | self._following()

    @property
    def gdt(self) -> tuple[int, int]:
        return self.words[_GDT + 2], self.words[_GDT + 4]

    @property
    def ldt(self) -> tuple[int, int]:
        return self.words[_LDT + 2], self.words[_LDT + 4]

    def set_ldt(self, base: int, limit: int) -> None:
        self.words[_LDT + 2], self.words[_LDT + 4], self.words[_LDT + 5] = base, limit, _PRESENT_LDT

    def set_task_switched(self, on: bool) -> None:
        words = self.words
        words[_CR0] = words[_CR0] & ~CR0_TS | (CR0_TS if on else 0)
        words[_HFLAGS] = words[_HFLAGS] & ~at.HF_TS | (at.HF_TS if on else 0)

    def transfer(self, cs: Segment, eip: int, eflags: int, esp: int, ss: Segment | None) -> None:
        self.eflags = eflags
        self.enter_handler(cs, eip, esp, ss, ~0)

    def enter_handler(self, cs: Segment | None, eip: int, esp: int, ss: Segment | None, kept: int) -> None:
        words = self.words
        words[_EIP], words[_ESP] = eip, esp
        flags = words[_EFLAGS]
        if flags & ~kept:
            words[_EFLAGS] = flags & kept
        if ss is None:
            if cs is not None and _unpack_cache(self._raw, _CODE_BYTE) != cs:
                _pack_cache(self._raw, _CODE_BYTE, *cs)
                words[_HFLAGS] = words[_HFLAGS] & ~_FOLLOWING | self._following()
            return
        kept_cs, kept_ss, raw, flat, ring = self._entry
        if cs is not kept_cs or ss is not kept_ss:
            assert cs is not None
            raw = _CACHE.pack(*cs) + _CACHE.pack(*ss)
            flat, ring = not ss.base and bool(cs.attributes & ss.attributes & _BIG), ss.attributes >> 13 & 3
            self._entry = cs, ss, raw, flat, ring
        self._raw[_CS_AND_SS] = raw
        following = _FLAT if flat and not (words[_EXTRA + 2] or words[_DATA + 2]) else self._following()
        words[_HFLAGS] = words[_HFLAGS] & ~(_FOLLOWING | _CPL) | following | ring

    def interrupted(self) -> tuple[int, int, int, int, int, int]:
        esp, eip, flags, arithmetic, operation, direction, hidden, cs, ss = self._unpack_interrupted()
        if operation == _CC_OP_EFLAGS:
            flags |= arithmetic | direction & DF  # each has none of the others' bits
        else:
            flags = self._lazy_flags()
        return esp, eip, flags, hidden & 3, cs, ss

    def _following(self) -> int:
        """The hidden flags that depend on segment caches, computed as QEMU does on a load."""
        words = self.words
        flags = at.HF_CS32 if words[_CODE + 5] & _BIG else at.HF_ADDSEG
        if words[_STACK + 5] & _BIG:
            flags |= at.HF_SS32
        if words[_EXTRA + 2] or words[_STACK + 2] or words[_DATA + 2]:
            flags |= at.HF_ADDSEG
        return flags

    def general(self) -> tuple[int, int, int, int, int, int, int, int]:
        registers: tuple[int, int, int, int, int, int, int, int] = _GENERAL.unpack_from(self._raw)
        return registers

    def save(self) -> bytes:
        return bytes(self._raw) + self.cr3.to_bytes(4, "little")

    def restore(self, saved: bytes) -> None:
        self._raw[:] = saved[:-4]
        self.cr3 = int.from_bytes(saved[-4:], "little")

    def set_floating_point(self, image: bytes) -> None:
        self._registers.set_floating_point_of(self._raw, from_image(image))

    def architectural(self) -> Mapping[str, int]:
        return architectural(self, self._registers.floating_point_of(self._raw))


def architectural(state: CpuState, floating_point: Mapping[str, int]) -> dict[str, int]:
    """All registers that a program can observe, by name."""
    values = dict(zip(GENERAL, state.general(), strict=True))
    values |= {"eip": state.eip, "eflags": state.eflags, "cpl": state.cpl, "cr2": state.cr2, "cr3": state.cr3}
    for name in SEGMENTS:
        segment = state.segment(name)
        values |= {name: segment.selector, f"{name}.base": segment.base, f"{name}.limit": segment.limit}
    return values | dict(floating_point)
