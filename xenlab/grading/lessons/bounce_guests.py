"""Guests of exercise 07: a kernel that reads frames by the agreement, and pages memory in on demand.

A window of addresses has no pages at first.  The page-fault handler takes one from a store of pages, each with a
letter in it, maps it where the fault was, and the instruction is executed again.  After any other exception, and after
a fault elsewhere, the handler goes on behind the instruction.  What a step read goes to the console at the end, so a
page in the wrong place, or a return to the wrong one, shows.

Each entry first makes a frame of Xen's order out of the one that it found, which IRETD takes down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xenlab.abi.structures import StartInfo
from xenlab.grading.lessons.agreement import IN_FRAME, Agreement
from xenlab.machine.vectors import PAGE_FAULT, WITH_ERROR_CODE

LETTERS = "bounce!xyz"
WINDOW, WINDOW_PAGES, NOWHERE = 0xC020_0000, 64, 0x1000
# The page at the end of the window is where the kernel of some guests keeps what it needs in its handler.
KERNELS_OWN = WINDOW + (WINDOW_PAGES - 1) * 4096
NOTHING, KERNEL, APPLICATION = ".", 1, 3
VECTORS = (0, 1, 3, 4, 5, 6, 11, 12, 13, 14, 0x81)
# The last step of a guest: by a software interrupt, or by a page fault where there must be no other exception.
LEAVE, LEAVE_AT = 0x90, 0x2000
_DEBUG, _LAST_EXCEPTION = 1, 31


@dataclass(frozen=True, slots=True)
class Touch:
    """One step of a guest.

    Attributes:
        code: what it executes.
        ring: where.
        letter: what it leaves in AL, `NOTHING` if nothing that counts.
        setup: what is executed before it.
    """

    code: str
    ring: int = APPLICATION
    letter: str = NOTHING
    setup: str = ""


@dataclass(frozen=True, slots=True)
class Kernel:
    """What differs between the guests' kernels.

    Attributes:
        prepare: executed before the first step.
        stack: the stack for entries from ring 3: selector and pointer, as operands.
        gates: other flags or selectors for some vectors: ``{vector: (flags, selector)}``.
        faults_in_handler: whether its page-fault handler touches a page that is not there yet.
        broken: whether its page-fault handler faults again each time, once there is a page in the window.
        only_faults: whether the guest leaves by a page fault.
    """

    prepare: str = ""
    stack: tuple[str, str] = ("FLAT_RING1_SS", "offset kernel_stack")
    gates: tuple[tuple[int, int, str], ...] = ()
    faults_in_handler: bool = False
    broken: bool = False
    only_faults: bool = False

    def gate(self, vector: int) -> tuple[int, str]:
        """Flags and selector of a gate."""
        ordinary = (3 if vector > _LAST_EXCEPTION else 0, "FLAT_RING1_CS")
        return next(((flags, selector) for other, flags, selector in self.gates if other == vector), ordinary)

    def ring(self, vector: int) -> int:
        """Where the handler of a vector runs."""
        return APPLICATION if "RING3" in self.gate(vector)[1] else KERNEL


def source(agreement: Agreement, steps: Sequence[Touch], kernel: Kernel) -> str:
    """The assembly of a guest that takes ``steps``, those of the kernel first, and shuts down."""
    inner = [step for step in steps if step.ring == KERNEL]
    outer = [step for step in steps if step.ring == APPLICATION]
    lines = [_START.format(mfn_list=StartInfo.mfn_list.offset, ss=kernel.stack[0], esp=kernel.stack[1])]
    lines += [kernel.prepare, *_steps(inner, "k", 0), _TO_APPLICATION if outer else "jmp finish"]
    lines += _entries(agreement, kernel, KERNEL)
    lines += [_page_in(kernel), _FINISH.format(steps=len(steps)), *_table(kernel)]
    lines += [".align 4096", "store:"] + [f'.ascii "{letter}"\n.align 4096' for letter in LETTERS]
    lines += [".skip 4096", "kernel_stack:", ".align 4096", "user_start:"]
    lines += [*_steps(outer, "u", len(inner)), f"mov eax, [{LEAVE_AT}]" if kernel.only_faults else f"int {LEAVE:#x}"]
    lines += [*_entries(agreement, kernel, APPLICATION), _USER_DATA.format(dots=NOTHING * len(steps))]
    return "\n".join(lines)


def _entries(agreement: Agreement, kernel: Kernel, ring: int) -> list[str]:
    return [line for vector in VECTORS if kernel.ring(vector) == ring for line in _entry(agreement, vector, ring)]


def _steps(steps: Sequence[Touch], prefix: str, first: int) -> list[str]:
    lines = []
    for number, step in enumerate(steps, first):
        behind = f"{prefix}{number}"
        lines += [step.setup, f"mov dword ptr [resume], offset {behind}", step.code, f"{behind}:"]
        if step.letter != NOTHING:
            lines += [f"mov [seen + {number}], al"]
    return lines


def _entry(agreement: Agreement, vector: int, ring: int) -> list[str]:
    """An entry: from the agreement's frame to one that IRETD understands, and back to the guest.

    EBX: the new frame.  ESI: the address of a page fault.  EDI: the event mask from before.
    """
    trap = {"vector": vector} | ({"error": 0} if vector in WITH_ERROR_CODE else {})
    trap |= {"address": 0} if vector == PAGE_FAULT else {}
    names = agreement.names(trap, outer=False)
    spare = len(names) - 3
    at = {name: 32 + 4 * place for place, name in enumerate(names)}
    lines = [f"entry_{vector}: pushad"]
    if vector == PAGE_FAULT:
        inside = agreement.address == IN_FRAME
        lines += [f"mov esi, [esp + {at['address']}]" if inside else f"mov esi, [shared_info + {agreement.address}]"]
    lines += [f"mov {register}, [esp + {at[name]}]" for register, name in _KEPT]
    lines += [f"lea ebx, [esp + {32 + 4 * spare}]", f"mov edi, {_REGISTER_OF[agreement.mask_word]}"]
    lines += [f"shr edi, {agreement.mask_bit}", "and edi, 1", "and ecx, 0xffff", "and edx, 0x3fffff"]
    # Single steps end with the first.
    lines += [f"and edx, {~0x100 & 0xFFFF_FFFF:#x}"] if vector == _DEBUG else []
    lines += ["mov [ebx], eax", "mov [ebx + 4], ecx", "mov [ebx + 8], edx"]
    if agreement.outer[0] != "esp":
        turn = f"straight_{vector}"
        lines += ["test cl, 2", f"jz {turn}", "mov eax, [ebx + 12]", "xchg eax, [ebx + 16]", "mov [ebx + 12], eax"]
        lines += [f"{turn}:"]
    lines += ["call page_in", f"jnc done_{vector}"] if vector == PAGE_FAULT else []
    lines += ["mov eax, [resume]", "mov [ebx], eax", f"done_{vector}:"]
    # The shared page is the kernel's.
    lines += ["mov eax, edi", "mov [shared_info + 1], al"] if ring == KERNEL else []
    return [*lines, "popad", f"lea esp, [esp + {4 * spare}]", "iretd"]


_KEPT = (("eax", "eip"), ("ecx", "cs"), ("edx", "eflags"))
_REGISTER_OF = {"cs": "ecx", "eflags": "edx"}


def _page_in(kernel: Kernel) -> str:
    """Map a page of the store at ESI; carry set if that is not in the window."""
    first = f"cmp dword ptr [taken], 0\n je own\n mov eax, [{NOWHERE}]\nown:" if kernel.broken else ""
    if kernel.faults_in_handler:
        first = f"cmp esi, {KERNELS_OWN}\n jae own\n mov eax, [{KERNELS_OWN}]\nown:"
    return _PAGE_IN.format(first=first, leave=LEAVE_AT, window=WINDOW, end=WINDOW + 4096 * WINDOW_PAGES)


def _table(kernel: Kernel) -> list[str]:
    lines = [".align 8", "trap_table:"]
    for vector in VECTORS:
        flags, selector = kernel.gate(vector)
        lines += [f".byte {vector}, {flags}", f".word {selector}", f".long entry_{vector}"]
    return [*lines, f".byte {LEAVE}, 3", ".word FLAT_RING1_CS", ".long finish", ".long 0, 0"]


_START = """
start: mov eax, [esi + {mfn_list}]
 mov [mfn_list], eax
 mov ebx, offset trap_table
 mov eax, __HYPERVISOR_set_trap_table
 int 0x82
 mov ebx, {ss}
 mov ecx, {esp}
 mov eax, __HYPERVISOR_stack_switch
 int 0x82
 mov eax, FLAT_RING3_DS
 mov ds, eax
 mov es, eax
 mov byte ptr [shared_info + 1], 0
"""
_TO_APPLICATION = """
 push FLAT_RING3_SS
 push offset user_stack
 push 0x202
 push FLAT_RING3_CS
 push offset user_start
 iretd
"""
_PAGE_IN = """
page_in: cmp esi, {leave}
 je finish
 {first}
 cmp esi, {window}
 jb elsewhere
 cmp esi, {end}
 jae elsewhere
 push ebx
 mov eax, [taken]
 inc dword ptr [taken]
 mov ebx, offset store - 0xc0000000
 shr ebx, 12
 add ebx, eax
 mov eax, [mfn_list]
 mov ecx, [eax + 4 * ebx]
 shl ecx, 12
 or ecx, 0x67
 mov ebx, esi
 and ebx, 0xfffff000
 xor edx, edx
 xor esi, esi
 mov eax, __HYPERVISOR_update_va_mapping
 int 0x82
 pop ebx
 test eax, eax
 jnz elsewhere
 clc
 ret
elsewhere: stc
 ret
"""
_FINISH = """
finish: mov ebx, CONSOLEIO_write
 mov ecx, {steps}
 mov edx, offset seen
 mov eax, __HYPERVISOR_console_io
 int 0x82
 mov ebx, SCHEDOP_shutdown
 mov ecx, offset reason
 mov eax, __HYPERVISOR_sched_op
 int 0x82
reason: .long SHUTDOWN_poweroff
mfn_list: .long 0
taken: .long 0
"""
_USER_DATA = """
.align 4
resume: .long 0
seen: .ascii "{dots}"
.align 16
.skip 512
user_stack:
.align 4096
user_end:
"""


__all__ = ["APPLICATION", "KERNEL", "KERNELS_OWN", "NOTHING", "NOWHERE", "WINDOW", "Kernel", "Touch", "source"]
