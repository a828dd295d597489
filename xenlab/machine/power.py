"""Switching a CPU on: control registers, and the instructions that Unicorn lets a hook replace.

The invariant: every vCPU starts from the same state, on each CPU of ours.  What breaks without it: two runs of one
guest that differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from unicorn import x86_const as x86

from xenlab.machine.cpuid import cpuid
from xenlab.machine.engine import Engine
from xenlab.machine.paging import PAE, PagingMode
from xenlab.machine.vectors import INVALID_OPCODE, PROTECTION

CR0 = 0x8005_0033  # PG, AM, WP, NE, ET, MP, PE
CR0_PG = 0x8000_0000
CR4_TSD, CR4_PAE, CR4_OSFXSR, CR4_OSXMMEXCPT = 0x4, 0x20, 0x200, 0x400
_EFER, _EFER_NXE = 0xC000_0080, 0x800
_FPCW, _MXCSR = 0x37F, 0x1F80  # as after FNINIT, and at reset


def power_on(engine: Engine) -> None:
    """Put the engine's CPU into the state that all vCPUs start from."""
    engine.uc.msr_write(_EFER, _EFER_NXE)
    # The library leaves both zero, with a rounding precision that does not match.
    engine.uc.reg_write(x86.UC_X86_REG_FPCW, _FPCW)
    engine.uc.reg_write(x86.UC_X86_REG_FPTAG, 0xFFFF)
    engine.uc.reg_write(x86.UC_X86_REG_MXCSR, _MXCSR)
    engine.write("cr0", CR0)


def set_paging(engine: Engine, mode: PagingMode) -> None:
    """Choose the page-table format; time-stamp reads trap outside ring 0."""
    pae = CR4_PAE if mode is PAE else 0
    engine.write("cr4", CR4_TSD | CR4_OSFXSR | CR4_OSXMMEXCPT | pae)


def install_instruction_hooks(engine: Engine, leave: Callable[[int], None]) -> None:
    """CPUID answers from our table; IN, OUT, SYSCALL and SYSENTER leave the engine as faults.

    ``leave(vector)`` is called with the machine as it was before the instruction.
    """

    def on_cpuid(uc: Any, _data: Any) -> int:
        answers = cpuid(uc.reg_read(x86.UC_X86_REG_EAX), uc.reg_read(x86.UC_X86_REG_ECX))
        for register, value in zip(("eax", "ebx", "ecx", "edx"), answers, strict=True):
            engine.write(register, value)
        return 1

    def on_in(uc: Any, _port: int, _size: int, _data: Any) -> int:
        leave(PROTECTION)
        value: int = uc.reg_read(x86.UC_X86_REG_EAX)
        return value

    def on_out(_uc: Any, _port: int, _size: int, _value: int, _data: Any) -> None:
        leave(PROTECTION)

    def on_syscall(_uc: Any, _data: Any) -> None:
        leave(INVALID_OPCODE)

    def on_sysenter(_uc: Any, _data: Any) -> None:
        leave(PROTECTION)

    engine.on_instruction(x86.UC_X86_INS_CPUID, on_cpuid)
    engine.on_instruction(x86.UC_X86_INS_IN, on_in)
    engine.on_instruction(x86.UC_X86_INS_OUT, on_out)
    engine.on_instruction(x86.UC_X86_INS_SYSCALL, on_syscall)
    engine.on_instruction(x86.UC_X86_INS_SYSENTER, on_sysenter)
