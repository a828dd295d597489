"""The guests of lesson 07: a kernel with any trap table, and instructions that raise each exception."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xenlab.abi.structures import StartInfo
from xenlab.machine.vectors import PAGE_FAULT, WITH_ERROR_CODE

MASKS_EVENTS, ANYONE = 4, 3
SYSTEM_CALL, SLOW_CALL = 0x80, 0x81
NOWHERE = 0x1000
LEAVE = 0x8F
KERNEL, APPLICATION = 1, 3
_FIRST_INTERRUPT = 32
# What raises a vector.  Each stands alone: neither registers nor memory have to be set up.
CAUSES: dict[int, str] = {
    0: "xor ecx, ecx; div ecx",
    1: "pushfd; or dword ptr [esp], 0x100; popfd; nop",
    3: "int3",
    4: "mov al, 127; add al, 1; into",
    6: "ud2",
    7: "fninit",
    13: "cli",
    PAGE_FAULT: f"mov [{NOWHERE:#x}], ebx",
    SYSTEM_CALL: f"int {SYSTEM_CALL:#x}",
    SLOW_CALL: f"int {SLOW_CALL:#x}",
}

# Take the page below the kernel's stack away, so that a stack that runs over meets no page, and not the kernel's data.
GUARDED = """
        mov ebx, offset guard
        xor ecx, ecx
        xor edx, edx
        mov esi, UVMF_INVLPG
        mov eax, __HYPERVISOR_update_va_mapping
        int 0x82
"""
# What a kernel has to do before an instruction of `CAUSES`: floating point is to raise #NM next time.
PREPARED = {7: "mov ebx, 1; mov eax, __HYPERVISOR_fpu_taskswitch; int 0x82"}
# A descriptor table of the guest's own, in the page `guard`: its third entry is a call gate to the handler of CALLED.
CALLED = 0x85
CALL_GATE = f"""
        mov eax, offset handler_{CALLED:#x}
        mov [guard + 16], ax
        mov word ptr [guard + 18], FLAT_RING1_CS
        mov word ptr [guard + 20], 0xec00    # present, open to ring 3, a call gate without parameters
        shr eax, 16
        mov [guard + 22], ax
        mov eax, [esi + {StartInfo.mfn_list.offset}]
        mov ecx, offset guard - 0xc0000000
        shr ecx, 12
        mov eax, [eax + 4 * ecx]
        mov [seen], eax
        mov ecx, eax                         # a descriptor table may not be written by the guest
        shl ecx, 12
        or ecx, 0x61
        xor edx, edx
        mov esi, UVMF_INVLPG
        mov ebx, offset guard
        mov eax, __HYPERVISOR_update_va_mapping
        int 0x82
        mov ebx, offset seen
        mov ecx, 512
        mov eax, __HYPERVISOR_set_gdt
        int 0x82
"""
_GUEST = """
start:  mov ebx, offset trap_table
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
        mov ebx, FLAT_RING1_SS
        mov ecx, {stack}
        mov eax, __HYPERVISOR_stack_switch
        int 0x82
        mov byte ptr [shared_info + 1], {masked}
        mov eax, FLAT_RING3_DS
        mov ds, eax
        mov es, eax
        {prepare}
        {kernel}
        push FLAT_RING3_SS
        push offset user_stack
        push 0x202
        push FLAT_RING3_CS
        push offset application
        iretd
{handlers}
finish: mov ebx, SCHEDOP_shutdown
        mov ecx, offset reason
        mov eax, __HYPERVISOR_sched_op
        int 0x82
        .align 8
trap_table:
{rows}
        .long 0, 0
reason: .long SHUTDOWN_poweroff
seen:   .fill 16, 4, 0
        .align 4096
guard:  .fill 4096, 1, 0
        .fill {stack_bytes}, 1, 0
kernel_stack:
        .align 4096
user_start:
application: nop
        {application}
        int {leave:#x}
        .align 16
        .fill 256, 1, 0
user_stack:
        .align 4096
user_end:
"""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a guest's trap table.

    Attributes:
        code: the handler.
        flags: the outermost ring that may use INT, and `MASKS_EVENTS`.
        selector: the handler's code segment, as an operand.
    """

    code: str = "jmp finish"
    flags: int = 0
    selector: str = "FLAT_RING1_CS"


def trapping(
    code: str,
    table: Mapping[int, Row],
    *,
    ring: int = APPLICATION,
    masked: bool = False,
    stack: str = "offset kernel_stack",
    stack_bytes: int = 1024,
    prepare: str = "",
) -> str:
    """The assembly of a guest that executes ``code`` in ``ring``, between the labels ``here`` and ``behind``.

    Args:
        code: instructions, with semicolons or line ends between.
        table: its trap table.
        ring: 1 for its kernel, 3 for its application.
        masked: whether its events are masked meanwhile.
        stack: the stack that it names for entries from ring 3.
        stack_bytes: how much room that has.
        prepare: executed in ring 1 before.
    """
    body = "here:\n" + _lines(code) + "\nbehind:"
    inside, outside = (body + "\n jmp finish", "") if ring == KERNEL else ("", body)
    rows = dict(table) | {LEAVE: Row(flags=ANYONE)}
    handlers = [f"{_name(vector)}:\n{_lines(row.code)}" for vector, row in rows.items()]
    return _GUEST.format(
        stack=stack,
        stack_bytes=stack_bytes,
        masked=int(masked),
        prepare=_lines(prepare),
        kernel=inside,
        application=outside,
        handlers="\n".join(handlers),
        rows="\n".join(_row(vector, row) for vector, row in rows.items()),
        leave=LEAVE,
    )


def _row(vector: int, row: Row) -> str:
    return f" .byte {vector}, {row.flags}\n .word {row.selector}\n .long {_name(vector)}"


def _name(vector: int) -> str:
    return f"handler_{vector}" if vector < _FIRST_INTERRUPT else f"handler_{vector:#x}"


def _lines(code: str) -> str:
    return code.replace(";", "\n")


def skipping(vector: int, size: int) -> str:
    """A handler that goes on behind an instruction of ``size`` bytes; 0 where EIP is behind it already."""
    drop = "add esp, 4;" if vector in WITH_ERROR_CODE else ""
    return f"{drop} add dword ptr [esp], {size}; iretd"


def rows_for(vectors: Sequence[int], flags: int = ANYONE) -> dict[int, Row]:
    """Rows whose handlers end the guest."""
    return {vector: Row("nop; nop; jmp finish", flags) for vector in vectors}
