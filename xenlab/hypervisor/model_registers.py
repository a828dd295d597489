"""Model-specific registers as a guest sees them (paper 2.1.2).

The problem: RDMSR and WRMSR reach everything that a processor's maker did not put elsewhere: clocks, caches, power,
microcode, the way into the kernel.  Kernels read many of them without asking whether they exist.

The answer is a list, in three parts: registers that have a value for guests; those that read as 0 and take any
write without effect, so that kernels that only wish to measure go on; all others, which fault.

The invariant: a write changes nothing but the guest's own.  What breaks without it: a guest moves the
hypervisor's entry point.

The one write that does something is the hypervisor's own register: it has a page of the guest's filled with the stubs
for hypercalls.  The list is that of Xen's arch/x86/msr.c and arch/x86/pv/emul-priv-op.c for a 32-bit guest on
a processor of Intel's.
"""

from __future__ import annotations

from collections.abc import Mapping

from xenlab.abi.numbers import CPUID_FIRST

EFER, EFER_NXE = 0xC000_0080, 0x800
HYPERCALL_PAGE = CPUID_FIRST
_TIME_STAMP, _PLATFORM_ID, _APIC_BASE, _FEATURE_CONTROL, _MICROCODE = 0x10, 0x17, 0x1B, 0x3A, 0x8B
_PLATFORM_INFO, _MISC_FEATURES, _PERFORMANCE_STATUS, _PERFORMANCE_CONTROL = 0xCE, 0x140, 0x198, 0x199
_MISC_ENABLE, _PERFORMANCE_CAPABILITIES = 0x1A0, 0x345
_ACTUAL_CLOCKS, _THERMAL, _ENERGY = (0xE7, 0xE8), 0x19A, 0x1B0
_APIC_AT, _APIC_ENABLED, _APIC_FIRST = 0xFEE0_0000, 0x800, 0x100
_LOCKED = 1
# Fast strings; branch traces, precise events and the bus's task priority not available.
_MISC_VALUE = 0x1 | 0x800 | 0x1000 | 0x80_0000
# Counters of events, their selectors and controls: the guest has none of its own.
_COUNTERS = frozenset((*range(0xC1, 0xC9), *range(0x186, 0x18A), *range(0x309, 0x30C), *range(0x38D, 0x391)))
_ZEROS = _COUNTERS | {
    _PLATFORM_ID,
    _MICROCODE,
    _PLATFORM_INFO,
    _MISC_FEATURES,
    _PERFORMANCE_STATUS,
    _PERFORMANCE_CONTROL,
    _PERFORMANCE_CAPABILITIES,
    HYPERCALL_PAGE,
}
_WITHOUT_EFFECT = _COUNTERS | {_MICROCODE, _MISC_ENABLE, *_ACTUAL_CLOCKS, _PERFORMANCE_CONTROL, _THERMAL, _ENERGY}


def read_register(number: int, system: Mapping[str, int]) -> int | None:
    """The 64 bits of a register, None where reading it faults; ``system`` as in `Emulator.emulate`."""
    values = {
        EFER: EFER_NXE,
        _TIME_STAMP: system["tsc"],
        _APIC_BASE: _APIC_AT | _APIC_ENABLED | (_APIC_FIRST if not system.get("vcpu", 0) else 0),
        _FEATURE_CONTROL: _LOCKED,
        _MISC_ENABLE: _MISC_VALUE,
    }
    return 0 if number in _ZEROS else values.get(number)


def write_register(number: int, value: int) -> dict[str, int] | None:
    """What a write changes, None where it faults."""
    if number == HYPERCALL_PAGE:
        # The lowest 12 bits say which of the pages it is; there is one.
        return {"hypercall_page": value} if value & 0xFFE == 0 else None
    # Kernels write back what they have read.
    same = (number, value) in ((EFER, EFER_NXE), (_MISC_FEATURES, 0))
    return {} if same or number in _WITHOUT_EFFECT else None
