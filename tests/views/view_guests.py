"""Guests for the views' tests: one that talks, one that goes round all rings, one that never ends."""

from __future__ import annotations

TALKER = """
start:  mov ebx, CONSOLEIO_write
        mov ecx, length
        mov edx, offset message
        mov eax, __HYPERVISOR_console_io
        int 0x82
        mov ebx, SCHEDOP_shutdown
        mov ecx, offset reason
        mov eax, __HYPERVISOR_sched_op
        int 0x82
reason: .long SHUTDOWN_poweroff
message: .ascii "{message}"
length = . - message
"""

ROUND_TRIPS = """
start:  mov ebx, offset table
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
        mov ebx, FLAT_RING1_SS
        mov ecx, offset kstack
        mov eax, __HYPERVISOR_stack_switch
        int 0x82
        push FLAT_RING3_SS
        push offset ustack
        push 0x202
        push FLAT_RING3_CS
        push offset user_start
        push eax
        mov eax, __HYPERVISOR_iret
        int 0x82
handler:
        mov eax, cr2
        inc dword ptr [count]
        call back
back_point:
        push eax
        mov eax, __HYPERVISOR_iret
        int 0x82
back:   ret
count: .long 0
table:  .byte 0x80, 7
        .short FLAT_RING1_CS
        .long handler
        .long 0, 0
        .skip 256
kstack:
        .align 4096
user_start:
        mov ecx, 20
spin:   loop spin
        int 0x80
        jmp user_start
        .align 4096
ustack_low: .skip 4096
ustack:
user_end:
"""

ENDLESS = "start: jmp start"


def talker(message: str) -> str:
    """A guest that writes ``message``, escaped as for the assembler, and shuts down."""
    return TALKER.format(message=message)
