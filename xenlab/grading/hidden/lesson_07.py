"""Further guests for exercise 07: faults in the kernel and its handler, all kinds of frames, flags, stacks that end."""

from __future__ import annotations

from xenlab.abi.structures import StartInfo
from xenlab.grading.lessons.base import Guest
from xenlab.grading.lessons.bounce_guests import KERNEL, NOWHERE, WINDOW, Kernel, Touch
from xenlab.grading.lessons.lesson_07 import PageFaultBounce, ended, mask, on_stack, read

_IN_RING_3 = "FLAT_RING3_CS"
_ON_A_PAGE_TABLE = f"""
 mov ecx, [esi + {StartInfo.pt_base.offset}]
 add ecx, 4096
 mov ebx, FLAT_RING1_SS
 mov eax, __HYPERVISOR_stack_switch
 int 0x82
"""
_NULL = "mov eax, 0x10b"  # a selector whose descriptor is empty


def guests(lesson: PageFaultBounce) -> list[Guest]:
    """What the judge runs besides the guests of the self-checks."""
    return [*_faults(lesson), *_others(lesson), *_flags(lesson), *_ends(lesson)]


def _faults(lesson: PageFaultBounce) -> list[Guest]:
    store = Touch(f"mov dword ptr [{WINDOW + 0x5123:#x}], 'z'")
    return [
        lesson.guest("07.1", "pager-of-the-kernel", (read(9, "b", KERNEL), read(2, "o", KERNEL), read(9, "b"))),
        lesson.guest(
            "07.1", "fault-in-the-handler", (read(2, "o"), read(4, "u"), read(2, "o")), Kernel(faults_in_handler=True)
        ),
        lesson.guest(
            "07.1",
            "error-codes",
            (
                Touch(f"mov eax, [{NOWHERE}]", KERNEL),
                Touch("mov eax, [start]"),
                Touch("mov [start], eax"),
                Touch("jmp eax", setup=f"mov eax, {NOWHERE + 0x123:#x}"),
                store,
                Touch(f"mov eax, [{WINDOW + 0x5123:#x}]", letter="z"),
            ),
        ),
        lesson.guest("07.1", "across-two-pages", (Touch(f"mov eax, [{WINDOW + 0x1FFE:#x}]"), read(2, "o"))),
    ]


def _others(lesson: PageFaultBounce) -> list[Guest]:
    divide = Touch("div ecx", KERNEL, setup="xor ecx, ecx")
    return [
        lesson.guest("07.2", "in-the-kernel", (divide, Touch("int3", KERNEL), Touch("hlt", KERNEL), read(1, "b"))),
        lesson.guest(
            "07.2",
            "with-error-codes",
            (
                Touch("mov es, eax", KERNEL, setup=_NULL),
                Touch("mov es, eax", setup=_NULL),
                Touch("int 14"),
                Touch("ud2"),
            ),
        ),
        lesson.guest(
            "07.2",
            "handlers-in-ring-3",
            (Touch("ud2"), Touch("cli"), Touch("int 0x81"), read(0, "b")),
            Kernel(gates=((6, 0, _IN_RING_3), (13, 0, _IN_RING_3))),
        ),
    ]


def _flags(lesson: PageFaultBounce) -> list[Guest]:
    step = "pushfd\n or dword ptr [esp], 0x100\n popfd\n nop"
    masking = tuple((vector, 4 | dpl, "FLAT_RING1_CS") for vector, dpl in ((6, 0), (13, 0), (0x81, 3)))
    return [
        lesson.guest(
            "07.3",
            "gates-that-mask",
            (Touch("ud2", KERNEL), Touch("ud2", KERNEL, setup=mask(1)), Touch("int 0x81"), Touch("cli")),
            Kernel(gates=masking),
        ),
        lesson.guest("07.3", "masked-application", (Touch("ud2"), read(3, "b"), Touch("cli")), Kernel(prepare=mask(1))),
        lesson.guest("07.3", "direction", (Touch("ud2", setup="std"), Touch("ud2", setup="cld"))),
        lesson.guest("07.3", "single-steps", (Touch(step, KERNEL), Touch(step), Touch(step))),
        lesson.guest(
            "07.3", "other-flags", (Touch("ud2", setup=_set(0x4000)), Touch("ud2", setup=_set(0x200000 | 0xD5)))
        ),
    ]


def _set(flags: int) -> str:
    return f"pushfd\n or dword ptr [esp], {flags:#x}\n popfd"


def _ends(lesson: PageFaultBounce) -> list[Guest]:
    first, gates = read(0, "b", KERNEL), ((6, 0, _IN_RING_3),)
    words = len(lesson.agreement.names({"vector": 6}, outer=True))
    short, enough = (f"{WINDOW + 4 * room:#x}" for room in (words - 1, words))
    return [
        lesson.guest("07.4", "stack-a-word-too-short", (first, ended("ud2")), on_stack(short)),
        # The frame fits, and then the handler has nothing left.
        lesson.guest("07.4", "stack-full", (first, ended("ud2")), on_stack(enough)),
        lesson.guest("07.4", "read-only-stack", (first, ended("ud2")), Kernel(prepare=_ON_A_PAGE_TABLE)),
        lesson.guest("07.4", "stack-of-the-hypervisor", (first, ended("ud2")), on_stack("0xff000800")),
        lesson.guest("07.4", "stack-of-ring-3", (first, ended("ud2")), on_stack("offset user_stack", "FLAT_RING3_SS")),
        lesson.guest("07.4", "handler-further-out", (first, ended("ud2", KERNEL)), Kernel(gates=gates)),
        lesson.guest(
            "07.4",
            "stack-of-the-kernel",
            (first, ended("ud2", setup="mov esp, offset kernel_stack")),
            Kernel(gates=gates),
        ),
        lesson.guest(
            "07.4",
            "faults-for-ever",
            (first, ended(f"mov eax, [{NOWHERE}]")),
            on_stack(f"{WINDOW + 0x100:#x}", broken=True),
        ),
    ]
