"""Further guests for exercise 02: time that wraps, other registers, and guests that want more than they may have."""

from __future__ import annotations

from xenlab.grading.lessons.base import Guest
from xenlab.grading.lessons.lesson_02 import Emulation

# Long enough for the scaled time to pass 2^64, whatever the seed.
_WAIT = "mov ecx, 4500\nwait: nop\nnop\nnop\ndec ecx\njnz wait"


def guests(lesson: Emulation) -> list[Guest]:
    """What the judge runs besides the guests of the self-checks."""
    back = lesson.allowed | lesson.one
    lowest = lesson.allowed & -lesson.allowed
    registers = (lesson.read_cr4(name, lowest) for name in ("edx", "esi", "ebp", "edi", "ebx", "ecx"))
    return [
        lesson.guest("02.1", "time-wraps", (lesson.clock(), lesson.clock(setup=_WAIT))),
        lesson.guest(
            "02.1", "two-clocks", (lesson.clock(setup="mov eax, -1\nmov ecx, 7"), lesson.clock(), lesson.clock())
        ),
        lesson.guest("02.2", "writes-back", (lesson.write_cr4("ebx", back), lesson.read_cr4("ecx", -1))),
        lesson.guest("02.2", "all-registers", (lesson.write_cr4("ecx", lowest), *registers)),
        lesson.guest("02.3", "register-twice", (lesson.read_msr(), lesson.clock(), lesson.read_msr())),
        *_greedy(lesson, lowest),
    ]


def _greedy(lesson: Emulation, lowest: int) -> list[Guest]:
    return [
        lesson.guest(
            "02.4",
            "other-registers",
            (
                lesson.refused("rdmsr", f"mov ecx, {lesson.msr ^ 1:#x}"),
                lesson.refused("rdmsr", "mov ecx, 0xc0000080"),
                lesson.refused("wrmsr", f"mov ecx, {lesson.msr:#x}"),
                lesson.refused("mov eax, cr0"),
                lesson.refused("clts"),
            ),
        ),
        lesson.guest(
            "02.4",
            "one-bit-too-many",
            (
                lesson.write_cr4("eax", lowest),
                *(lesson.refused("mov cr4, edx", f"mov edx, {bit | lowest:#x}") for bit in lesson.forbidden),
                lesson.refused("mov cr4, edx", f"mov edx, {lesson.one | lesson.forbidden[0]:#x}"),
                lesson.refused("mov cr4, edx", "mov edx, 0x80000000"),
                lesson.read_cr4("eax", lowest),
            ),
        ),
        *_applications(lesson),
    ]


def _applications(lesson: Emulation) -> list[Guest]:
    """Ring 3 tries what the kernel did before it: each guest first shows that ring 1 is served."""
    read_msr, users = lesson.read_msr(), lesson.clock(ring=3) if lesson.users else lesson.refused("rdtsc", ring=3)
    cr4 = (lesson.refused("mov eax, cr4", ring=3), lesson.refused("mov cr4, eax", "mov eax, 0", ring=3))
    return [
        lesson.guest("02.4", "application-cr4", (lesson.write_cr4("eax", 0), *cr4)),
        lesson.guest(
            "02.4",
            "application-register",
            (read_msr, lesson.clock(), lesson.refused("rdmsr", read_msr.setup, ring=3), users),
        ),
    ]
