"""Further guests for exercise 03: edges of every rule, several rules broken at once, hostile pointers."""

from __future__ import annotations

from xenlab.abi.numbers import Errno
from xenlab.grading.lessons.base import Guest
from xenlab.grading.lessons.lesson_03 import SOURCE, TARGET, ArgumentChecks, Step

_END_OF_MEMORY, _HYPERVISOR = 0xC010_0000, 0xFC00_0000


def guests(lesson: ArgumentChecks) -> list[Guest]:
    """What the judge runs besides the guests of the self-checks."""
    return [
        lesson.guest("03.1", "shortest", (lesson.good(1), lesson.good(2, SOURCE + 7, TARGET + 16))),
        lesson.guest("03.1", "longest", (lesson.good(lesson.limit),)),
        lesson.guest("03.1", "nothing", (lesson.good(0), lesson.good(3))),
        lesson.guest("03.1", "neighbours", (lesson.good(16, TARGET - 16), lesson.good(16, TARGET + 48, TARGET + 32))),
        lesson.guest("03.2", "misaligned", _misaligned(lesson)),
        lesson.guest("03.2", "overlapping", _overlapping(lesson)),
        lesson.guest("03.2", "order", _order(lesson)),
        lesson.guest("03.3", "wrap-around", _wrapping(lesson)),
        lesson.guest("03.3", "edges", _edges(lesson)),
        lesson.guest("03.3", "targets", _targets(lesson)),
    ]


def _misaligned(lesson: ArgumentChecks) -> tuple[Step, ...]:
    half = lesson.align // 2
    return (
        lesson.bad("a target one byte off", lesson.misaligned, target=TARGET + 1),
        lesson.bad("a target half an alignment off", lesson.misaligned, target=TARGET + half),
        lesson.good(9),
    )


def _overlapping(lesson: ArgumentChecks) -> tuple[Step, ...]:
    return (
        lesson.bad("source and target are the same", lesson.overlap, TARGET, 16),
        lesson.bad("the source's last byte is the target's first", lesson.overlap, TARGET - 15, 16),
        lesson.bad("the target's last byte is the source's first", lesson.overlap, TARGET + 15, 16),
        lesson.good(16, TARGET - 16),
    )


def _order(lesson: ArgumentChecks) -> tuple[Step, ...]:
    long = lesson.limit + 16
    return (
        lesson.bad("too long and misaligned", lesson.too_long, length=long, target=TARGET + 1),
        lesson.bad("too long and not there", lesson.too_long, "0x10", long),
        lesson.bad("misaligned and not there", lesson.misaligned, "0x10", target=TARGET + 1),
        lesson.bad("four thousand million bytes", lesson.too_long, length=0xFFFF_FFFF),
    )


def _wrapping(lesson: ArgumentChecks) -> tuple[Step, ...]:
    return (
        lesson.bad("a source that runs over the end of 32 bits", Errno.EFAULT, "0xfffffff8", 16),
        lesson.bad("a source at the last byte of 32 bits", Errno.EFAULT, "0xffffffff", 2),
        lesson.good(16),
    )


def _edges(lesson: ArgumentChecks) -> tuple[Step, ...]:
    return (
        lesson.bad("a source that runs off the guest's memory", Errno.EFAULT, f"{_END_OF_MEMORY - 8:#x}", 16),
        lesson.bad("a source in the hypervisor", Errno.EFAULT, f"{_HYPERVISOR:#x}", 16),
        lesson.good(16),
    )


def _targets(lesson: ArgumentChecks) -> tuple[Step, ...]:
    return (
        lesson.bad("a target that is not there", Errno.EFAULT, target="0x1000"),
        lesson.bad("a target in the hypervisor", Errno.EFAULT, target=f"{_HYPERVISOR:#x}"),
        lesson.bad("a target that is a page table, read-only", Errno.EFAULT, target="[page_table]"),
        lesson.bad(
            "a target that runs off the guest's memory", Errno.EFAULT, length=24, target=f"{_END_OF_MEMORY - 16:#x}"
        ),
        lesson.good(16),
    )
