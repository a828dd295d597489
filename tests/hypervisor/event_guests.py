"""Guests for the tests of event channels: one that takes events and counts them, one that sends."""

from __future__ import annotations

# `upcalls` counts entries, `served` the events of ports 0 to 7.  BODY runs in ring 1 with the callback registered.
RECEIVER = """
        .macro call_xen number, first=0, second=0
        mov ebx, \\first
        mov ecx, \\second
        mov eax, \\number
        int 0x82
        .endm
start:  mov byte ptr [shared_info + 1], 1
        mov esp, offset stack
        mov ebp, esi
        mov edx, FLAT_RING1_CS
        mov esi, offset callback
        mov ebx, FLAT_RING1_CS
        mov ecx, offset callback
        mov eax, __HYPERVISOR_set_callbacks
        int 0x82
        mov edi, 0
{body}
finish: call_xen __HYPERVISOR_sched_op, SCHEDOP_block
        inc dword ptr [woken]
        jmp finish
callback:
        push eax
        push ebx
        push ecx
        inc dword ptr [upcalls]
        inc dword ptr [depth]
        mov eax, [depth]
        cmp eax, [deepest]
        jbe shallow
        mov [deepest], eax
shallow:
        mov byte ptr [shared_info], 0
        mov dword ptr [shared_info + 4], 0
        mov ebx, 0
next:   mov eax, [shared_info + 2176]
        not eax
        and eax, [shared_info + 2048]
        bt eax, ebx
        jnc not_this
        btr dword ptr [shared_info + 2048], ebx
        inc dword ptr [served + ebx * 4]
{inside}
not_this:
        inc ebx
        cmp ebx, 8
        jb next
        dec dword ptr [depth]
        pop ecx
        pop ebx
        pop eax
        jmp hypercall_page + 32 * __HYPERVISOR_iret
        .align 4
upcalls: .long 0
depth:  .long 0
deepest: .long 0
woken:  .long 0
reason: .long SHUTDOWN_poweroff
served: .skip 32
argument: .long {port}
        .skip 4096
stack:
"""
# Masks all upcalls, then one port, and takes each mask away again, while it computes with registers and flags.
MASKS = """
        mov byte ptr [shared_info + 1], 0
        call_xen __HYPERVISOR_xen_version
        inc edi
        mov byte ptr [shared_info + 1], 1
        inc edi
        call_xen __HYPERVISOR_xen_version
        mov byte ptr [shared_info + 1], 0
        call_xen __HYPERVISOR_xen_version
        bts dword ptr [shared_info + 2176], 1
        inc edi
        call_xen __HYPERVISOR_xen_version
        call_xen __HYPERVISOR_event_channel_op, EVTCHNOP_unmask, "offset argument"
        inc edi
"""
SENDER = """
start:  mov byte ptr [shared_info + 1], 1
again:  mov ebx, EVTCHNOP_send
        mov ecx, offset port
        mov eax, __HYPERVISOR_event_channel_op
        int 0x82
        inc esi
        jmp again
        .align 4
port:   .long 1
"""


# Has an upcall pending when it stores to its first l1 table, which is opened for that one instruction.
STORES_TO_A_TABLE = """
        call_xen __HYPERVISOR_vm_assist, VMASST_CMD_enable, VMASST_TYPE_writable_pagetables
        mov edx, [ebp + 60]
        add edx, {tables_before}
        mov eax, [edx]
        or eax, 0x200
        mov byte ptr [shared_info + 1], 0
        mov byte ptr [shared_info], 1
        mov [edx], eax
stored: call_xen __HYPERVISOR_xen_version
"""


def receiver(body: str = "", inside: str = "", port: int = 1) -> str:
    """A guest that serves events; ``body`` runs before it sleeps, ``inside`` behind each event that was served."""
    return RECEIVER.format(body=body, inside=inside, port=port)
