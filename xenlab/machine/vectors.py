"""The numbers and names of exceptions (Intel SDM volume 3, 6.3)."""

from __future__ import annotations

DIVIDE, DEBUG, NMI, BREAKPOINT, OVERFLOW, INVALID_OPCODE, NO_DEVICE, DOUBLE_FAULT = 0, 1, 2, 3, 4, 6, 7, 8
INVALID_TSS, NOT_PRESENT, STACK_FAULT, PROTECTION, PAGE_FAULT, ALIGNMENT, MACHINE_CHECK = 10, 11, 12, 13, 14, 17, 18
# In place of an error code: the vector was named by an INT instruction, so no fault happened and there is none.
SOFTWARE = -1
WITH_ERROR_CODE = frozenset((DOUBLE_FAULT, INVALID_TSS, NOT_PRESENT, STACK_FAULT, PROTECTION, PAGE_FAULT, ALIGNMENT))

EXCEPTIONS = {
    0: "#DE divide error",
    1: "#DB debug",
    2: "NMI",
    3: "#BP breakpoint",
    4: "#OF overflow",
    5: "#BR bound",
    6: "#UD invalid opcode",
    7: "#NM no device",
    8: "#DF double fault",
    10: "#TS invalid TSS",
    11: "#NP not present",
    12: "#SS stack fault",
    13: "#GP protection",
    14: "#PF page fault",
    16: "#MF floating point",
    17: "#AC alignment",
    18: "#MC machine check",
    19: "#XM SIMD",
}


def vector_name(vector: int) -> str:
    """``#GP protection`` for 13, ``int 0x80`` for a vector that only software raises."""
    return EXCEPTIONS.get(vector, f"int {vector:#x}")
