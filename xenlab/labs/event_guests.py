"""Guests of lesson 08: one that takes events and counts them, one that sends, and some that get it wrong.

They share the names of the bits, `NAMES`, and a macro for hypercalls.  Only the first word of ports is used.
"""

from __future__ import annotations

NAMES = """
        .set UPCALL, shared_info                # vcpu_info[0].evtchn_upcall_pending
        .set CLOSED, shared_info + 1            #             .evtchn_upcall_mask
        .set SELECTOR, shared_info + 4          #             .evtchn_pending_sel
        .set PENDING, shared_info + 2048        # evtchn_pending, the first word
        .set MASK, shared_info + 2176           # evtchn_mask, the first word
        .macro call_xen number, first=0, second=0
        mov ebx, \\first
        mov ecx, \\second
        mov eax, \\number
        int 0x82
        .endm
"""
BEGIN = """
start:  mov esp, offset stack
        xor edx, edx
        xor esi, esi
        call_xen __HYPERVISOR_set_callbacks, FLAT_RING1_CS, "offset callback"
"""
# In the order that loses nothing: first what was told, then what is looked at.
CALLBACK = """
callback:
        push eax
        push ebx
        inc dword ptr [upcalls]
        mov byte ptr [UPCALL], 0                # 1. take away what brought us here
        mov dword ptr [SELECTOR], 0
        mov eax, [MASK]                         # 2. look at all ports that are open
        not eax
        and eax, [PENDING]
next:   bsf ebx, eax
        jz done
        btr eax, ebx
        btr dword ptr [PENDING], ebx            # 3. take the bit away, and then do the work
        inc dword ptr [served + 4 * ebx]
        jmp next
done:   pop ebx
        pop eax
        jmp hypercall_page + 32 * __HYPERVISOR_iret
"""
# Clears what it was told by when it has finished, and with it what came meanwhile.
CALLBACK_THAT_TIDIES_UP = """
callback:
        push eax
        push ebx
        inc dword ptr [upcalls]
        mov eax, [MASK]
        not eax
        and eax, [PENDING]
next:   bsf ebx, eax
        jz done
        btr eax, ebx
        btr dword ptr [PENDING], ebx
        inc dword ptr [served + 4 * ebx]
        jmp next
done:   mov dword ptr [SELECTOR], 0             # "all done, tidy up"
        mov byte ptr [UPCALL], 0
        pop ebx
        pop eax
        jmp hypercall_page + 32 * __HYPERVISOR_iret
"""
DATA = """
        .align 4
upcalls: .long 0
work:   .long 0
served: .skip 4 * 32
virq:   .long VIRQ_DEBUG, 0, 0                  # what bind_virq is told, and the port that it answers
unbound: .word DOMID_SELF, {remote}             # what alloc_unbound is told, and the port that it answers
port:   .long 0
to_unmask: .long 1
reason: .long SHUTDOWN_poweroff
        .skip 512
stack:
"""
OPEN_AND_SLEEP = """
again:  call_xen __HYPERVISOR_sched_op, SCHEDOP_block    # opens upcalls, and sleeps unless one is due
        jmp again
"""
OPEN_AND_COMPUTE = """
        mov byte ptr [CLOSED], 0                # upcalls from now on
spin:   inc edi
        jmp spin
"""
_ALLOCATE = """
        call_xen __HYPERVISOR_event_channel_op, EVTCHNOP_alloc_unbound, "offset unbound"
"""
_SENDER = (
    NAMES
    + """
start:  call_xen __HYPERVISOR_event_channel_op, EVTCHNOP_bind_interdomain, "offset bind"
        test eax, eax
        jz bound
        call_xen __HYPERVISOR_sched_op, SCHEDOP_yield
        jmp start                               # the other has no port for us yet
bound:  mov eax, [ours]
        mov [port], eax
        mov edi, {count}
again:  mov esi, {pause}
wait:   dec esi
        jnz wait
send:   call_xen __HYPERVISOR_event_channel_op, EVTCHNOP_send, "offset port"
        dec edi
        jnz again
        call_xen __HYPERVISOR_sched_op, SCHEDOP_shutdown, "offset reason"
        .align 4
bind:   .word 0, 0                              # the receiver is domain 0
        .long {theirs}                          # and this is its port
ours:   .long 0
port:   .long 0
reason: .long SHUTDOWN_poweroff
"""
)
# One that hears of every domain that ends, and prints a letter each time that it is told.
TOOLS = (
    NAMES
    + BEGIN
    + """
        call_xen __HYPERVISOR_event_channel_op, EVTCHNOP_bind_virq, "offset virq"
"""
    + OPEN_AND_SLEEP
    + CALLBACK.replace(
        "        jmp next\n",
        """        push ecx
        push edx
        push eax
        push ebx
        mov edx, offset letter
        call_xen __HYPERVISOR_console_io, CONSOLEIO_write, 1
        pop ebx
        pop eax
        pop edx
        pop ecx
        jmp next
""",
    )
    + """
        .align 4
letter: .ascii "E"
"""
    + DATA.format(remote=0).replace("VIRQ_DEBUG", "VIRQ_DOM_EXC")
)
MORTAL = "start: mov ecx, {instructions}\nlive: dec ecx\n jnz live\n mov [0], ecx\n"


def receiver(body: str = OPEN_AND_SLEEP, *, senders: int = 1, callback: str = CALLBACK) -> str:
    """Domain 0: it allocates a port for each of so many senders, which are the next domains, and does ``body``."""
    ports = "".join(f" mov word ptr [unbound + 2], {number}\n" + _ALLOCATE for number in range(1, senders + 1))
    return NAMES + BEGIN + ports + body + callback + DATA.format(remote=1)


def sender(count: int, *, pause: int = 1, theirs: int = 1) -> str:
    """It binds to port ``theirs`` of domain 0 and sends so often, with a pause of twice so many instructions before."""
    return _SENDER.format(count=count, pause=pause, theirs=theirs)


def alone(body: str, *, callback: str = CALLBACK) -> str:
    """A guest without a partner: its port 1 is for events from outside, as of a device."""
    bind = ' call_xen __HYPERVISOR_event_channel_op, EVTCHNOP_bind_virq, "offset virq"\n'
    return NAMES + BEGIN + bind + body + callback + DATA.format(remote=0)


def mortal(instructions: int) -> str:
    """A guest that lives for so many rounds of its loop and then stores to where it has no page."""
    return MORTAL.format(instructions=instructions)


# Ways to open a port that was closed, and what each is to be followed by.
WAYS_TO_OPEN = {
    "a store": " btr dword ptr [MASK], 1\n",
    "a store, and a look": """
        btr dword ptr [MASK], 1
        btr dword ptr [PENDING], 1              # has something come meanwhile?
        jnc nothing
        inc dword ptr [served + 4]
nothing:
""",
    "the hypercall": ' call_xen __HYPERVISOR_event_channel_op, EVTCHNOP_unmask, "offset to_unmask"\n',
}
# The same for all upcalls together.
WAYS_TO_OPEN_ALL = {
    "a store": " mov byte ptr [CLOSED], 0\n",
    "a store, and a look": """
        mov byte ptr [CLOSED], 0
        cmp byte ptr [UPCALL], 0                # has something come meanwhile?
        je nothing
        call_xen __HYPERVISOR_xen_version       # any hypercall will do: the way back from it is an upcall
nothing:
""",
}
_WAIT = """
        mov ecx, 40
{label}: dec ecx
        jnz {label}
"""


def closes_a_port(way: str) -> str:
    """It closes port 1 for a while, opens it again in one of `WAYS_TO_OPEN`, and sleeps."""
    close = " bts dword ptr [MASK], 1\n mov byte ptr [CLOSED], 0\n"
    return alone(close + _WAIT.format(label="busy") + "open:\n" + WAYS_TO_OPEN[way] + OPEN_AND_SLEEP)


def closes_all(way: str) -> str:
    """It keeps all upcalls closed for a while, opens them in one of `WAYS_TO_OPEN_ALL`, and computes without a trap."""
    return alone(_WAIT.format(label="busy") + "open:\n" + WAYS_TO_OPEN_ALL[way] + "spin: inc edi\n jmp spin\n")


# A kernel's idle loop: is there work that the callback has put down?  If not, sleep.
_IDLE = """
again:  mov byte ptr [CLOSED], {closed}
        mov eax, [served + 4]
        cmp eax, [work]
        jne serve
        call_xen __HYPERVISOR_sched_op, SCHEDOP_block
        jmp again
serve:  mov [work], eax                         # the work is done
        jmp again
"""
LOOKS_WITH_UPCALLS_OPEN, LOOKS_WITH_UPCALLS_CLOSED = _IDLE.format(closed=0), _IDLE.format(closed=1)
POLLS = """
again:  call_xen __HYPERVISOR_sched_op, SCHEDOP_poll, "offset poll"
        btr dword ptr [PENDING], 1
        jnc again
        inc dword ptr [served + 4]
        jmp again
        .align 4
poll:   .long polled, 1, 0, 0                   # the ports, how many, no time limit
polled: .long 1
"""
_MASKS = """
start:  mov ebp, {rounds}
again:
{body}
        dec ebp
        jnz again
over:   jmp over
"""
# What a kernel does to be left alone for a moment, without a hypervisor and on one.
TO_BE_LEFT_ALONE = {
    "cli and sti": " cli\n sti\n",
    "two stores": " mov byte ptr [CLOSED], 1\n mov byte ptr [CLOSED], 0\n",
}


def left_alone(way: str, rounds: int) -> str:
    """It asks to be left alone, and not any more, so often."""
    return NAMES + _MASKS.format(body=TO_BE_LEFT_ALONE[way], rounds=rounds)
