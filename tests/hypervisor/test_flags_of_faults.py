"""The flags that an exception finds: those of the instruction before it, however the run was cut.

Unicorn counts instructions, computes the flags for that, and at a fault marks them as not computed again; read by its
own mark they would have a wrong carry.  The portable CPU, which has nothing but the library's own reading, still finds
that one (ARCHITECTURE, "Where the emulated CPU is not an x86").
"""

from __future__ import annotations

import pytest

from xenlab import Hypervisor, Machine, boot
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.machine.state import ARITHMETIC

GUEST = """
start:  mov ebx, offset table
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
        mov ebx, 0
        {before}
        {fault}
after:  jmp after
table:  {rows}
        .long 0, 0
"""
ROWS = "\n".join(f".byte {vector}, 0\n .short FLAT_RING1_CS\n .long after" for vector in (0, 4, 5, 6, 11, 12, 13, 14))
CF, PF, AF, ZF, SF, OF = 0x1, 0x4, 0x10, 0x40, 0x80, 0x800
# What runs before the fault, and the flags that it leaves.
BEFORE = {
    "mov ecx, 0x100\n mov eax, -38\n add ecx, eax": CF,
    "mov ecx, 0x100\n mov eax, -38\n add edx, 1\n add ecx, eax": CF,
    "mov ecx, 1\n sub ecx, 2": CF | PF | AF | SF,
    "mov ecx, 0xC0000000\n shl ecx, 1": CF | PF | SF,
    "stc\n mov ecx, -1\n adc ecx, 0": CF | PF | AF | ZF,
    "mov ecx, -1\n and ecx, -1": PF | SF,
    "xor ecx, ecx\n add ecx, 4\n add ecx, 4": 0,
    "mov ecx, 0x7fffffff\n add ecx, 1": PF | AF | SF | OF,
}
FAULTS = ("mov edi, [0x1000]", "mov [0x1000], edi", "mov edi, [0xff100000]", "ud2", "hlt", "in al, dx", "push [0x1000]")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("cut", [False, True])
def test_flags_are_those_of_the_instruction_before(before: str, fault: str, cut: bool) -> None:
    xen = Hypervisor(Machine(memory_mib=2), trace=Trace())
    boot(xen, GUEST.format(before=before, fault=fault, rows=ROWS))
    for _ in range(16):
        xen.run(1 if cut else 16)
    assert xen.trace is not None
    first = xen.trace.events(Kind.DELIVER)[0]
    assert first.words[-1] & ARITHMETIC == BEFORE[before]
