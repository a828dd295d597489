"""CPUID as the hypervisor answers it: the forced-emulation prefix (paper 2.1.2).

The problem: CPUID does not trap, so a guest that executes it asks the machine behind the hypervisor's back, and is told
of features that a guest does not have, and nothing of the hypervisor.  A ported kernel therefore
puts five bytes in front of it that fault as an invalid opcode, UD2 and the letters "xen"; the hypervisor
knows them, answers in the processor's place, and goes on behind.

The answer is the machine's own (`machine.cpuid`), with two differences: a bit says that there is a
hypervisor, and leaves from 0x40000000 on say which::

    +0  the last of these leaves, and the name           +3  time: its frequency and how it is scaled
    +1  version                                          +4  nothing for guests like these
    +2  pages of hypercalls: how many, and the           +5  bits of a machine address
        register that fills one; features

The invariant: what the bits of features promise works.  What breaks without it: a kernel uses global pages.
Leaves and bits are those of arch-x86/cpuid.h.
"""

from __future__ import annotations

from xenlab.abi.numbers import CPUID_FIRST, CPUID_LAST, CPUID_PRESERVES_AD, CPUID_SIGNATURE
from xenlab.hypervisor.model_registers import HYPERCALL_PAGE
from xenlab.hypervisor.version import XEN_MAJOR, XEN_MINOR
from xenlab.machine.cpuid import ADDRESS_BITS, cpuid

PREFIX, CPUID = b"\x0f\x0bxen", b"\x0f\xa2"
Leaf = tuple[int, int, int, int]
_NOTHING: Leaf = (0, 0, 0, 0)
_HYPERVISOR_PRESENT = 1 << 31
_FEATURES_LEAF, _KHZ = 1, 100_000
# The time stamp is emulated always, and counts instructions: ten nanoseconds each, as 0.625 * 2^4.
_EMULATED, _MODE_EMULATED, _SCALE, _SHIFT = 1, 1, 0xA000_0000, 4


def guest_cpuid(leaf: int, subleaf: int) -> Leaf:
    """EAX, EBX, ECX and EDX for a guest."""
    if leaf in range(CPUID_FIRST, CPUID_LAST + 1):
        return _own(leaf - CPUID_FIRST, subleaf)
    a, b, c, d = cpuid(leaf, subleaf)
    return (a, b, c | _HYPERVISOR_PRESENT, d) if leaf == _FEATURES_LEAF else (a, b, c, d)


def _own(leaf: int, subleaf: int) -> Leaf:
    if leaf == 0:
        b, c, d = (int.from_bytes(CPUID_SIGNATURE[at : at + 4], "little") for at in (0, 4, 8))
        return CPUID_LAST, b, c, d
    if leaf == 3:
        times = {0: (_EMULATED, _MODE_EMULATED, _KHZ, 0), 1: (0, 0, _SCALE, _SHIFT), 2: (_KHZ, 0, 0, 0)}
        return times.get(subleaf, _NOTHING)
    answers = {
        1: (XEN_MAJOR << 16 | XEN_MINOR, 0, 0, 0),
        2: (1, HYPERCALL_PAGE, CPUID_PRESERVES_AD, 0),
        5: (0, 0 if subleaf else ADDRESS_BITS, 0, 0),
    }
    return answers.get(leaf, _NOTHING)
