"""Where things stand inside Unicorn's CPU state, found by experiment at start-up.

The problem: changing ring, writing flags and reading a page fault's error code have no
function in Unicorn's public API, but they have fixed places in QEMU's ``CPUX86State``.  The engine
keeps one for the CPU that runs, and ``uc_context_save`` copies it out.  Where exactly depends on how the
library was built.

The invariant: an offset is used only after known values were seen at it.  A probe puts
patterns into registers and provokes known faults in a CPU of its own, and looks where they
appear; distances inside the leading part of QEMU's ``CPUX86State`` (general registers,
flags, segment caches, control registers: all of fixed width) are then checked one by one.
What breaks without it: a library of another build would silently corrupt guests.  When a
probe fails, `probe` says which, and `PortableCpu` gives the same results more slowly.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

from unicorn.x86_const import UC_X86_REG_GDTR, UC_X86_REG_ST7, UC_X86_REG_XMM7

from xenlab.errors import MachineError
from xenlab.machine.engine import GENERAL, Context, Engine
from xenlab.machine.memory import Memory
from xenlab.machine.peek import Peek, peeking

# Distances in bytes from the first general register, in QEMU's struct CPUX86State.
EIP, EFLAGS, CC_SRC, CC_OP, DF, HFLAGS = 128, 136, 152, 168, 172, 176
SEGMENT_CACHES, SEGMENT_STRIDE, CONTROL = 184, 24, 424
CC_OP_EFLAGS = 1
HF_CPL, HF_CS32, HF_SS32, HF_ADDSEG, HF_PE, HF_TS = 0x3, 0x10, 0x20, 0x40, 0x80, 0x800
_ENGINE_BYTES_SEARCHED, _CPU_BYTES_SEARCHED = 3072, 1 << 16
_LOWEST_ADDRESS, _HIGHEST_ADDRESS = 1 << 16, 1 << 56
_PATTERN = 0x5EED_A000
_PROTECTED, _TASK_SWITCHED = 0x11, 0x19  # CR0: ET and PE, and TS too


class ProbeError(MachineError):
    """A probe did not find what it looked for; the portable CPU has to be used."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Byte offsets in a saved context, and in the engine's structure.

    Attributes:
        general: the first general register (EAX) in a context.
        error_code: 32-bit error code of the last exception.
        old_exception: 32-bit vector of the exception being delivered, -1 when none is.
        span: so many bytes from the first general register on are all that a guest can change of its CPU.
        counter: 64-bit count of instructions begun in this run, in the engine; the limit follows it.
        running: where a pointer in the engine may be, and how far behind it the first general register of the CPU
            that runs then is.  In one engine all are right; in another some may be, and `running_registers` says.
    """

    general: int
    error_code: int
    old_exception: int
    span: int
    counter: int
    running: tuple[tuple[int, int], ...]


@cache
def probe() -> Layout:
    """Find the layout of the library that is loaded.  Raises ProbeError naming what failed."""
    engine = Engine(Memory(1))
    general = _probe_general(engine)
    running = _probe_running(engine)
    _check_head(engine, general)
    span = _probe_span(engine, general)
    error_code, old_exception = _probe_fault(engine)
    return Layout(general, error_code, old_exception, span, _probe_counter(engine), running)


def _find(raw: memoryview, value: int, width: int = 4) -> set[int]:
    wanted = value.to_bytes(width, "little")
    return {at for at in range(0, len(raw) - width + 1, 4) if raw[at : at + width] == wanted}


def _probe_general(engine: Engine) -> int:
    _registers(engine, _PATTERN)
    raw = Context(engine).raw
    starts = _find(raw, _PATTERN)
    for number in range(1, len(GENERAL)):
        starts &= {at - 8 * number for at in _find(raw, _PATTERN + number)}
    if len(starts) != 1:
        raise ProbeError(f"general registers: expected one place in the context, found {len(starts)}")
    return starts.pop()


def _probe_running(engine: Engine) -> tuple[tuple[int, int], ...]:
    """Look behind every number in the engine that could be an address for the registers, which have known values.

    The right pointer leads to the CPU.  Others lead to what happens to lie just before it, in this engine.
    """
    found = []
    with peeking() as peek:
        for place, address in enumerate(_numbers(engine)):
            if address % 8 or not _LOWEST_ADDRESS < address < _HIGHEST_ADDRESS:
                continue
            distance = peek(address, _CPU_BYTES_SEARCHED).find(_registers(engine, _PATTERN))
            if distance >= 0 and _follow(engine, peek, address + distance):
                found.append((8 * place, distance))
    if not found:
        raise ProbeError("the registers of the running CPU: found behind no pointer of the engine")
    return tuple(found)


def running_registers(engine: Engine, layout: Layout) -> int:
    """The host's address of the first general register of the CPU that runs.  All general registers are overwritten.

    Raises:
        ProbeError: it is not where the probe of another engine has found it.
    """
    numbers = _numbers(engine)
    with peeking() as peek:
        for place, distance in layout.running:
            address = numbers[place // 8] + distance
            if _follow(engine, peek, address):
                return address
    raise ProbeError("the registers of the running CPU: not where they are in another engine")


def _numbers(engine: Engine) -> list[int]:
    return list((ctypes.c_uint64 * (_ENGINE_BYTES_SEARCHED // 8)).from_address(engine.handle))


def _follow(engine: Engine, peek: Peek, address: int) -> bool:
    """Whether these are the registers themselves.  A copy, such as a context, does not follow when they change."""
    return all(_registers(engine, first) == peek(address, 8 * len(GENERAL)) for first in (_PATTERN, _PATTERN + 0x100))


def _registers(engine: Engine, first: int) -> bytes:
    """Give the general registers known values; how they look in the CPU's state."""
    for number, name in enumerate(GENERAL):
        engine.write(name, first + number)
    return b"".join((first + number).to_bytes(8, "little") for number in range(len(GENERAL)))


def _probe_span(engine: Engine, general: int) -> int:
    """The last SSE register is the last of all that a guest can change; behind it model-specific registers begin."""
    engine.uc.reg_write(UC_X86_REG_XMM7, _PATTERN << 64 | _PATTERN + 8)
    engine.uc.reg_write(UC_X86_REG_ST7, _PATTERN + 16 << 32)
    raw = Context(engine).raw
    last = {at for at in _find(raw, _PATTERN, 16 - 8) if raw[at - 8 : at] == (_PATTERN + 8).to_bytes(8, "little")}
    floating = _find(raw, _PATTERN + 16 << 32, 8)
    if len(last) != 1 or len(floating) != 1:
        raise ProbeError(f"XMM7 and ST7: expected one place each in the context, found {len(last)} and {len(floating)}")
    end = last.pop() + 8 - general
    if not general < floating.pop() < general + end:
        raise ProbeError("the floating-point registers: expected before the last SSE register")
    return end


def _check_head(engine: Engine, general: int) -> None:
    engine.write("eip", _PATTERN)
    engine.write("cr2", _PATTERN + 2)
    engine.write("cr0", _TASK_SWITCHED)
    engine.uc.reg_write(UC_X86_REG_GDTR, (0, _PATTERN + 4, 0xFFFF, 0))
    engine.write("eflags", 0x0ED7 & ~0x300)
    raw = Context(engine).raw
    expected = {
        "EIP": (EIP, _PATTERN),
        "CR0": (CONTROL, _TASK_SWITCHED),
        "CR2": (CONTROL + 16, _PATTERN + 2),
        "GDT base behind six segment caches": (SEGMENT_CACHES + 8 * SEGMENT_STRIDE + 8, _PATTERN + 4),
        "condition codes": (CC_SRC, 0x8D5),
        "condition code operation": (CC_OP, CC_OP_EFLAGS),
        "direction flag": (DF, 0xFFFF_FFFF),
    }
    for name, (distance, value) in expected.items():
        at = general + distance
        if int.from_bytes(raw[at : at + 4], "little") != value:
            raise ProbeError(f"{name}: not at byte {at} of the context")
    hflags = int.from_bytes(raw[general + HFLAGS : general + HFLAGS + 4], "little")
    if hflags & (HF_CPL | HF_CS32 | HF_SS32 | HF_PE | HF_TS) != HF_CS32 | HF_SS32 | HF_PE | HF_TS:
        raise ProbeError(f"hidden flags: found {hflags:#x} for 32-bit ring 0 with CR0.TS")
    engine.write("cr0", _PROTECTED)
    engine.write("eflags", 2)
    engine.uc.reg_write(UC_X86_REG_GDTR, (0, 0, 0, 0))


def _probe_fault(engine: Engine) -> tuple[int, int]:
    """Load two selectors that do not exist: #GP with that selector as its error code."""
    before = Context(engine)
    idle = _find(before.raw, 0xFFFF_FFFF)
    codes: set[int] | None = None
    contexts: list[Context] = []

    def on_interrupt(_engine: int, vector: int, _data: int) -> None:
        if vector == 13:
            contexts.append(Context(engine))
        engine.stop()

    engine.on_interrupt(on_interrupt)
    for selector in (0x1230, 0x5678):
        # mov eax, selector; mov ds, eax
        code = b"\xb8" + selector.to_bytes(4, "little") + b"\x8e\xd8"
        engine.memory.write(0x1000, code)
        engine.uc.ctl_remove_cache(0x1000, 0x2000)
        engine.uc.context_restore(before._owner)
        engine.start(0x1000, 2)
        if not contexts:
            raise ProbeError("a load of selector 0x1230 without a descriptor table raised no #GP")
        found = _find(contexts[-1].raw, selector)
        codes = found if codes is None else codes & found
    idle &= _find(contexts[0].raw, 13) & _find(contexts[1].raw, 13)
    registers = set(range(_probe_general(engine), _probe_general(engine) + 8 * len(GENERAL)))
    codes = (codes or set()) - registers
    if len(codes) != 1 or len(idle) != 1:
        raise ProbeError(f"fault state: expected one place each, found {len(codes)} and {len(idle)}")
    return codes.pop(), idle.pop()


def _probe_counter(engine: Engine) -> int:
    """Count a known run: the pair (count + 1, count) stands in the engine afterwards."""
    engine.memory.write(0x2000, b"\xeb\xfe")  # jmp to itself
    candidates: set[int] | None = None
    for count in (0x3A7, 0x2C5):
        engine.start(0x2000, count)
        seen = _numbers(engine)
        found = {at for at in range(len(seen) - 1) if seen[at : at + 2] == [count + 1, count]}
        candidates = found if candidates is None else candidates & found
    if not candidates or len(candidates) != 1:
        raise ProbeError(f"instruction counter: expected one place in the engine, found {len(candidates or ())}")
    return candidates.pop() * 8
