"""Guests for the tests of time: each takes timer events and writes down when."""

from __future__ import annotations

# Binds TIMER and VIRTUAL_TIMER; each upcall stores the time-stamp counter, and which ports were pending, in `log`.
KEEPER = """
        .macro call_xen number, first=0, second=0, third=0
        mov edx, \\third
        mov ecx, \\second
        mov ebx, \\first
        mov eax, \\number
        int 0x82
        .endm
start:  mov esp, offset stack
        mov edx, FLAT_RING1_CS
        mov esi, offset callback
        mov ebx, FLAT_RING1_CS
        mov ecx, offset callback
        mov eax, __HYPERVISOR_set_callbacks
        int 0x82
        call_xen __HYPERVISOR_event_channel_op, EVTCHNOP_bind_virq, "offset real"
        call_xen __HYPERVISOR_event_channel_op, EVTCHNOP_bind_virq, "offset virtual"
        call_xen __HYPERVISOR_vcpu_op, 7
        mov byte ptr [shared_info + 1], 0
        mov edi, offset log
{body}
rest:   call_xen __HYPERVISOR_sched_op, SCHEDOP_block
        jmp rest
work:   inc ebp
        jmp work
callback:
        push eax
        push edx
        rdtsc
        mov [edi], eax
        mov eax, [shared_info + 2048]
        mov [edi + 4], eax
        add edi, 8
        mov dword ptr [shared_info + 2048], 0
        mov dword ptr [shared_info + 4], 0
        mov byte ptr [shared_info], 0
        inc dword ptr [upcalls]
{inside}
        pop edx
        pop eax
        jmp hypercall_page + 32 * __HYPERVISOR_iret
        .align 4
upcalls: .long 0
real:   .long 0, 0, 0
virtual: .long 23, 0, 0
nowhere: .long 0
        .skip 2048
stack:
log:    .skip 4096
"""
# Computes the time as a kernel does, from record and time-stamp counter, in 64 bits.
READER = """
start:  mov esi, [shared_info + 32]
        rdtsc
        sub eax, [shared_info + 40]
        sbb edx, [shared_info + 44]
        mov cl, [shared_info + 60]
        shld edx, eax, cl
        shl eax, cl
        mov ebx, edx
        mul dword ptr [shared_info + 56]
        mov edi, edx
        mov eax, ebx
        mul dword ptr [shared_info + 56]
        add eax, edi
        adc edx, 0
        add eax, [shared_info + 48]
        adc edx, [shared_info + 52]
        cmp esi, [shared_info + 32]
        jne start
        mov [answer], eax
        mov [answer + 4], edx
        inc dword ptr [rounds]
        jmp start
        .align 4
answer: .long 0, 0
rounds: .long 0
"""
SPIN = "start: inc eax\n jmp start"


def keeper(body: str, inside: str = "") -> str:
    """A guest that runs ``body`` with its timers bound, ``inside`` at the end of each upcall, and then sleeps."""
    return KEEPER.format(body=body, inside=inside)


def set_real(nanoseconds: int) -> str:
    """Set the alarm on real time."""
    value = nanoseconds & (1 << 64) - 1
    return f"call_xen __HYPERVISOR_set_timer_op, {value & 0xFFFF_FFFF}, {value >> 32}\n"


def set_virtual(nanoseconds: int) -> str:
    """Set the alarm on virtual time."""
    return f"call_xen __HYPERVISOR_set_virtual_timer, {nanoseconds & 0xFFFF_FFFF}, {nanoseconds >> 32}\n"
