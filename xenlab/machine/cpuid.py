"""What CPUID answers: one fixed processor, whatever the host and the emulator are.

CPUID does not trap on x86 in the paper's time, one of the holes of lesson 01, so a guest sees
the machine's own answer.  Runs are only repeatable if that answer is a constant of ours.
"""

from __future__ import annotations

_VENDOR = b"GenuineIntel"
_BRAND = b"xenlab teaching processor, one instruction at a time"[:48].ljust(48, b"\0")
# Feature bits, Intel SDM volume 2, CPUID leaf 1, EDX.
_FPU, _DE, _TSC, _MSR, _PAE, _CX8, _SEP, _CMOV, _MMX, _FXSR, _SSE, _SSE2 = (
    1 << bit for bit in (0, 2, 4, 5, 6, 8, 11, 15, 23, 24, 25, 26)
)
_FEATURES = _FPU | _DE | _TSC | _MSR | _PAE | _CX8 | _CMOV | _MMX | _FXSR | _SSE | _SSE2
_NX = 1 << 20
_MAX_EXTENDED = 0x8000_0008
ADDRESS_BITS = 36


def cpuid(leaf: int, _subleaf: int) -> tuple[int, int, int, int]:
    """EAX, EBX, ECX and EDX for a leaf; zeros for a leaf that does not exist."""
    if leaf == 0:
        return 1, *(int.from_bytes(_VENDOR[at : at + 4], "little") for at in (0, 8, 4))  # type: ignore[return-value]
    if leaf == 1:
        return 0x6F6, 0, 0, _FEATURES
    if leaf == 0x8000_0000:
        return _MAX_EXTENDED, 0, 0, 0
    if leaf == 0x8000_0001:
        return 0, 0, 0, _NX
    if 0x8000_0002 <= leaf <= 0x8000_0004:
        part = _BRAND[(leaf - 0x8000_0002) * 16 :][:16]
        a, b, c, d = (int.from_bytes(part[at : at + 4], "little") for at in (0, 4, 8, 12))
        return a, b, c, d
    if leaf == _MAX_EXTENDED:
        return ADDRESS_BITS | 32 << 8, 0, 0, 0
    return 0, 0, 0, 0
