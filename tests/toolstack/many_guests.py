"""Guests that end, sleep, crash, hold tables and talk to each other: what is left of each of them has to be nothing."""

from __future__ import annotations

_MACROS = """
        .macro call_xen number, first=0, second=0, third=0, fourth=0
        mov ebx, \\first
        mov ecx, \\second
        mov edx, \\third
        mov esi, \\fourth
        mov eax, \\number
        int 0x82
        .endm
start:  mov ebp, esi
        mov byte ptr [shared_info + 1], 1
"""
_WRONG = """
wrong:  ud2
"""

COMPUTES = (
    _MACROS
    + """
again:  inc edi
        jmp again
"""
)
BLOCKS = (
    _MACROS
    + """
again:  call_xen __HYPERVISOR_sched_op, SCHEDOP_block
        jmp again
"""
)
CRASHES = _MACROS + "ud2"
SHUTS_DOWN = (
    _MACROS
    + """
        call_xen __HYPERVISOR_sched_op, SCHEDOP_shutdown, "offset reason"
reason: .long SHUTDOWN_poweroff
"""
)
# Makes its page `name` read-only; EAX: its frame.
_READ_ONLY = """
        mov edi, offset {name}
        mov eax, edi
        sub eax, 0xC0000000
        shr eax, 12
        mov edx, [ebp + 68]                     # mfn_list
        mov eax, [edx + 4 * eax]
        mov [frame], eax
        shl eax, 12
        or eax, 0x21
        call_xen __HYPERVISOR_update_va_mapping, edi, eax
        test eax, eax
        jnz wrong
        mov eax, [frame]
"""
_EXTENDED = """
        call_xen __HYPERVISOR_mmuext_op, "offset operation", 1, 0, DOMID_SELF
        test eax, eax
        jnz wrong
"""
# Pins a table of its own, and has a descriptor table of each kind in use.
TABLES = (
    _MACROS
    + _READ_ONLY.format(name="table")
    + "mov dword ptr [operation], MMUEXT_PIN_L1_TABLE\n mov [operation + 4], eax"
    + _EXTENDED
    + _READ_ONLY.format(name="descriptors")
    + """
        call_xen __HYPERVISOR_set_gdt, "offset frame", 16
        test eax, eax
        jnz wrong
"""
    + _READ_ONLY.format(name="locals")
    + """
        mov dword ptr [operation], MMUEXT_SET_LDT
        mov dword ptr [operation + 4], offset locals
        mov dword ptr [operation + 8], 16
"""
    + _EXTENDED
    + """
        mov eax, 8 | 1
        mov fs, ax
        mov eax, 8 | 4 | 1
        mov gs, ax
again:  inc edi
        jmp again
frame:  .long 0
operation: .long 0, 0, 0
"""
    + _WRONG
    + """
        .align 4096
table:  .skip 4096
descriptors: .quad 0, 0x00CFB3000000FFFF
        .align 4096
locals: .quad 0, 0x00CFB3000000FFFF
        .align 4096
"""
)
# Gives 20 frames back that it has mapped no more.
GIVES_BACK = (
    _MACROS
    + """
        mov edi, 20
next:   lea eax, [edi + 150]                    # a pseudo-physical frame that nothing uses
        mov edx, [ebp + 68]
        mov ecx, [edx + 4 * eax]
        mov [frame], ecx
        shl eax, 12
        add eax, 0xC0000000
        call_xen __HYPERVISOR_update_va_mapping, eax, 0, 0, 0
        test eax, eax
        jnz wrong
        call_xen __HYPERVISOR_memory_op, XENMEM_decrease_reservation, "offset reservation"
        cmp eax, 1
        jne wrong
        dec edi
        jnz next
again:  inc edi
        jmp again
        .align 4
reservation: .long frame, 1, 0, 0
        .short DOMID_SELF, 0
frame:  .long 0
"""
    + _WRONG
)
# Opens a port to its peer, one to itself, binds to the one that the peer has opened, and sends or waits there.
_CHANNELS = (
    _MACROS
    + """
        call_xen __HYPERVISOR_event_channel_op, EVTCHNOP_alloc_unbound, "offset unbound"
        test eax, eax
        jnz wrong
        call_xen __HYPERVISOR_event_channel_op, EVTCHNOP_bind_ipi, "offset signal"
        test eax, eax
        jnz wrong
        call_xen __HYPERVISOR_event_channel_op, EVTCHNOP_alloc_unbound, "offset unused"
        test eax, eax
        jnz wrong
again:  call_xen __HYPERVISOR_event_channel_op, EVTCHNOP_bind_interdomain, "offset channel"
        test eax, eax
        jz bound
        call_xen __HYPERVISOR_sched_op, SCHEDOP_yield
        jmp again
bound:
{then}
        jmp bound
        .align 4
unbound: .short DOMID_SELF, {peer}
        .long 0
unused: .short DOMID_SELF, {peer}
        .long 0
channel: .long {peer}, 1
port:   .long 0
signal: .long 0, 0
poll:   .long polled, 1, 0, 0
polled: .long 2
"""
    + _WRONG
)


def sends(peer: int) -> str:
    """A guest that sends to domain ``peer`` as fast as it can."""
    send = 'call_xen __HYPERVISOR_event_channel_op, EVTCHNOP_send, "offset port"'
    return _CHANNELS.format(peer=peer, then=send)


def waits(peer: int) -> str:
    """A guest that is connected with domain ``peer`` and polls a port that nobody sends through."""
    return _CHANNELS.format(peer=peer, then='call_xen __HYPERVISOR_sched_op, SCHEDOP_poll, "offset poll"')


# Has each kind of timer running, far ahead and near, when it polls with a time at which to give up.
TIMERS = (
    _MACROS
    + """
        call_xen __HYPERVISOR_event_channel_op, EVTCHNOP_bind_virq, "offset real"
        call_xen __HYPERVISOR_event_channel_op, EVTCHNOP_bind_virq, "offset virtual"
        call_xen __HYPERVISOR_vcpu_op, 6, 0, "offset period"    # VCPUOP_set_periodic_timer
        test eax, eax
        jnz wrong
        call_xen __HYPERVISOR_set_timer_op, 0, 1000             # 1,000 * 2^32 ns
        test eax, eax
        jnz wrong
again:  call_xen __HYPERVISOR_sched_op, SCHEDOP_poll, "offset poll"
        jmp again
        .align 4
period: .quad 1000000
real:   .long VIRQ_TIMER, 0, 0
virtual: .long 23, 0, 0
poll:   .long polled, 1, 0, 2000
polled: .long 2
"""
    + _WRONG
)
# Told of the end of others, and asleep.
CONTROL = (
    _MACROS
    + """
        call_xen __HYPERVISOR_event_channel_op, EVTCHNOP_bind_virq, "offset virq"
again:  mov dword ptr [shared_info + 2048], 0
        mov dword ptr [shared_info + 4], 0
        mov byte ptr [shared_info], 0
        call_xen __HYPERVISOR_sched_op, SCHEDOP_block
        inc edi
        jmp again
virq:   .long VIRQ_DOM_EXC, 0, 0
"""
)
