"""The floor: what a trap into Python costs when the hook does nothing with it.

A bare Unicorn, without paging, in ring 0, runs the same loop as the `hypercall` benchmark:

    again: xor ebx, ebx
           xor ecx, ecx
           mov eax, 17
           int 0x82
           jmp again

Its interrupt hook is a raw ctypes callback that saves the context, reads the eight general
registers and EIP out of it with one ``struct`` call, and restores the context.  Nothing is
decided, nothing written.  The library is called the way ctypes code plainly calls it, by
typed prototypes; that xenlab's own CPU uses the engine's registers in place is part of what
is measured, and lets its hypercall cost less than a floor.  The engine counts instructions, as it
does under the hypervisor.
A sample is the CPU time of one ``uc_emu_start`` of `TRAPS` rounds, divided by `TRAPS`.
"""

from __future__ import annotations

import ctypes
import sys
import time
from dataclasses import dataclass
from struct import Struct

from unicorn.unicorn_py3.unicorn import uclib

from xenlab.cli.benchmarks import Sample
from xenlab.machine.assembler import assemble
from xenlab.machine.engine import Context, Engine
from xenlab.machine.layout import probe
from xenlab.machine.memory import Memory

TRAPS = 2000
CODE = 0x1000
ROUND = """
again: xor ebx, ebx
    xor ecx, ecx
    mov eax, 17
    int 0x82
    jmp again
"""
ROUND_INSTRUCTIONS = 5
# CPU time leaves out what other programs on this host take.  On Windows it moves in steps of 15 ms.
clock_ns = time.perf_counter_ns if sys.platform == "win32" else time.thread_time_ns
_plain = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_context_save, _context_restore = _plain(("uc_context_save", uclib)), _plain(("uc_context_restore", uclib))
_REGISTERS = Struct("<8Q64xQ")  # eight general registers, and EIP at 128


def bare_engine(source: str) -> Engine:
    """A Unicorn of its own with ``source`` assembled at `CODE`."""
    engine = Engine(Memory(1))
    engine.memory.write(CODE, assemble(source, CODE).code)
    return engine


def _install_plain_hook(engine: Engine, context: Context) -> None:
    handle, pointer, raw, general = engine.handle, context.pointer, context.raw, probe().general
    read = _REGISTERS.unpack_from

    def on_interrupt(_engine: int, _vector: int, _data: int) -> None:
        _context_save(handle, pointer)
        read(raw, general)
        _context_restore(handle, pointer)

    engine.on_interrupt(on_interrupt)


@dataclass(frozen=True, slots=True)
class _Floor:
    """Holds the context too: the hook knows only its address."""

    engine: Engine
    context: Context

    def sample(self) -> float:
        begin = clock_ns()
        self.engine.uc.emu_start(CODE, 0, count=TRAPS * ROUND_INSTRUCTIONS)
        return (clock_ns() - begin) / TRAPS


def floor() -> Sample:
    """Nanoseconds a trap of the plain hook; see the head of this file."""
    engine = bare_engine(ROUND)
    context = Context(engine)
    _install_plain_hook(engine, context)
    return _Floor(engine, context).sample
