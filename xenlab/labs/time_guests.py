"""Guests of lesson 09 with clocks of their own: one that reads the time record in two halves, one with two processes.

The routines ``real_time`` and ``virtual_time`` are those of the guest ``clocks``.
"""

from __future__ import annotations

from xenlab import guests

# Half of the record is read, then it sleeps for 20 ms, and then the other half is read.
TORN = """
        .set VERSION, shared_info + 32
        .set TSC_STAMP, shared_info + 40
        .set SYSTEM_TIME, shared_info + 48
start:  mov edi, [VERSION]
        mov ebx, [TSC_STAMP]        # the first half of the record: when it was written, by the counter
        cmp dword ptr [slept], 0
        jne second                  # only the first time through
        inc dword ptr [slept]
        mov ebx, SCHEDOP_poll
        mov ecx, offset poll
        mov eax, __HYPERVISOR_sched_op
        push [TSC_STAMP]
        int 0x82                    # ... and here somebody else has the CPU for 20 ms
        pop ebx
second: mov ecx, [SYSTEM_TIME]      # the second half: what real time it was then
        rdtsc
        sub eax, ebx
        imul eax, eax, 10           # every instruction takes 10 ns
        add eax, ecx
{check}
        mov [read], eax
finish: mov ebx, SCHEDOP_shutdown
        mov ecx, offset reason
        mov eax, __HYPERVISOR_sched_op
        int 0x82
        .align 4
slept:  .long 0
read:   .long 0
rounds: .long 0
poll:   .long poll, 0, 20000000, 0
reason: .long SHUTDOWN_poweroff
"""
CHECK = """        inc dword ptr [rounds]
        cmp edi, [VERSION]
        jne start                   # the record was written meanwhile: read it again"""

# A kernel with two processes.  Each gets 3 ms of the time that the domain really has, by the alarm on virtual time.
TWO_PROCESSES = """
start:  mov ebx, FLAT_RING1_CS
        mov ecx, offset callback
        mov edx, FLAT_RING1_CS
        mov esi, offset callback
        mov eax, __HYPERVISOR_set_callbacks
        int 0x82
        mov ebx, EVTCHNOP_bind_virq
        mov ecx, offset bind
        mov eax, __HYPERVISOR_event_channel_op
        int 0x82
        call next_turn
        mov byte ptr [shared_info + 1], 0
process:                            # both processes do the same: they count
        mov eax, [who]
        inc dword ptr [counted + 4 * eax]
        jmp process

callback:                           # the alarm on virtual time: the turn is over
        pushad
        mov byte ptr [shared_info], 0
        mov dword ptr [shared_info + 4], 0
        mov dword ptr [shared_info + 2048], 0
        call real_time              # charge the process, once by each clock
        mov ebx, [who]
        sub eax, [real_before]
        add [by_real + 4 * ebx], eax
        call virtual_time
        mov ebx, [who]
        sub eax, [virtual_before]
        add [by_virtual + 4 * ebx], eax
        mov eax, [counted + 4 * ebx]
        mov [done + 4 * ebx], eax
        xor dword ptr [who], 1
        inc dword ptr [turns]
        call next_turn
        popad
        push eax
        mov eax, __HYPERVISOR_iret
        int 0x82

next_turn:
        call real_time
        mov [real_before], eax
        call virtual_time
        mov [virtual_before], eax
        mov ebx, eax
        mov ecx, edx
        add ebx, 3000000
        adc ecx, 0
        mov eax, __HYPERVISOR_set_virtual_timer
        int 0x82
        ret
{clocks}
        .align 4
bind:   .long VIRQ_VIRTUAL_TIMER, 0, 0
who:    .long 0
turns:  .long 0
counted: .long 0, 0
done:   .long 0, 0
by_real: .long 0, 0
by_virtual: .long 0, 0
real_before: .long 0
virtual_before: .long 0
runstate: .skip 44
"""


def listing(first: str, behind: str) -> str:
    """The source of the guest ``clocks`` from the label ``first`` up to the label ``behind``."""
    lines = guests.source("clocks").splitlines()
    start, end = (next(at for at, line in enumerate(lines) if line.startswith(f"{name}:")) for name in (first, behind))
    return "\n".join(lines[start:end]).rstrip()


def torn(*, careful: bool) -> str:
    """A guest that is interrupted in the middle of the record, with or without a look at its version."""
    return TORN.format(check=CHECK if careful else "")


def two_processes() -> str:
    """A kernel with two processes that charges them by two clocks."""
    source = guests.source("clocks")
    names = "\n".join(line for line in source.splitlines() if ".set" in line)
    routines = source.split("# ---- the clocks", 1)[1].split("\n", 1)[1].split("# ---- events", 1)[0]
    return TWO_PROCESSES.format(clocks=f"{names}\n{routines}")
