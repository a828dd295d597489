# A kernel that does everything by the clock: alarms on real and on virtual time, ticks, sleep (paper 3.3.2).
#
# Its command line is a plan, letters with numbers of instructions behind some of them (one takes 10 ns):
#
#   r N  the alarm on real time: N from now       R N  at N         x  none
#   v N  the alarm on virtual time: N from now    V N  at N         y  none    e  at the end of time
#   t N  a tick every N, 0 for none               w N  work so long            n  note the clocks
#   s    sleep until something has happened       p N  sleep so long           q  power off
#   (    from here ...                            )    ... again and again
#
# At its end the kernel sleeps for ever.

        # the time record in shared_info, and the wall clock's
        .set VERSION, shared_info + 32
        .set TSC_STAMP, shared_info + 40
        .set SYSTEM_TIME, shared_info + 48
        .set MULTIPLIER, shared_info + 56
        .set SHIFT, shared_info + 60
        .set PENDING, shared_info + 2048
        .set CMD_LINE, 80                    # in start_info
        .set MOST_NOTES, 64

start:  lea eax, [esi + CMD_LINE]
        mov [cursor], eax
        mov ebx, FLAT_RING1_CS
        mov ecx, offset callback
        mov edx, FLAT_RING1_CS
        mov esi, offset callback
        mov eax, __HYPERVISOR_set_callbacks
        int 0x82
        mov ecx, offset bind_real
        call bind
        mov ecx, offset bind_virtual
        call bind
        mov byte ptr [shared_info + 1], 0    # a kernel begins with its events masked

step:   call letter
        mov edx, offset steps
find:   cmp dword ptr [edx], 0
        je  rest                             # the plan is done
        cmp [edx], eax
        je  found
        add edx, 8
        jmp find
found:  call [edx + 4]
        jmp step

rest:   call sleep
        jmp rest

bind:   mov ebx, EVTCHNOP_bind_virq
        mov eax, __HYPERVISOR_event_channel_op
        int 0x82
        ret

# ---- what a letter does -----------------------------------------------------------------------

real_from_now:
        call number
        push edx
        push eax
        call real_time
        pop ebx
        pop ecx
        add ebx, eax
        adc ecx, edx
        jmp set_real
real_at:
        call number
        mov ebx, eax
        mov ecx, edx
        jmp set_real
real_none:
        xor ebx, ebx
        xor ecx, ecx
set_real:                                    # EBX, ECX: nanoseconds
        mov eax, __HYPERVISOR_set_timer_op
        int 0x82
        ret

virtual_from_now:
        call number
        push edx
        push eax
        call virtual_time
        pop ebx
        pop ecx
        add ebx, eax
        adc ecx, edx
        jmp set_virtual
virtual_at:
        call number
        mov ebx, eax
        mov ecx, edx
        jmp set_virtual
virtual_end:
        mov ebx, 0xFFFFFFFF
        mov ecx, ebx
        jmp set_virtual
virtual_none:
        xor ebx, ebx
        xor ecx, ecx
set_virtual:
        mov eax, __HYPERVISOR_set_virtual_timer
        int 0x82
        ret

tick:   call number
        mov [period], eax
        mov [period + 4], edx
        mov ebx, VCPUOP_set_periodic_timer
        or  eax, edx
        jnz ask
        mov ebx, VCPUOP_stop_periodic_timer
ask:    xor ecx, ecx
        mov edx, offset period
        mov eax, __HYPERVISOR_vcpu_op
        int 0x82
        ret

work:   call plain_number
        shr eax, 1
        jz  idle
spin:   dec eax
        jnz spin
idle:   ret

sleep:  mov byte ptr [shared_info + 1], 1    # masked, so that nothing happens between the look and the sleep
        mov eax, [happened]
        cmp eax, [noticed]
        jne awake
        mov ebx, SCHEDOP_block               # which takes the mask away
        mov eax, __HYPERVISOR_sched_op
        int 0x82
        jmp sleep
awake:  mov [noticed], eax
        mov byte ptr [shared_info + 1], 0
        ret

pause_for:
        call number
        push edx
        push eax
        call real_time
        pop ebx
        pop ecx
        add ebx, eax
        adc ecx, edx
        mov [poll + 8], ebx
        mov [poll + 12], ecx
        mov ebx, SCHEDOP_poll                # for no port at all, so until its time
        mov ecx, offset poll
        mov eax, __HYPERVISOR_sched_op
        int 0x82
        ret

note:   mov edi, [noted]
        cmp edi, MOST_NOTES
        je  full
        shl edi, 4
        add edi, offset notes
        push edi
        call real_time
        pop edi
        mov [edi], eax
        mov [edi + 4], edx
        call virtual_time
        mov [edi + 8], eax
        mov [edi + 12], edx
        inc dword ptr [noted]
full:   ret

begin:  mov eax, [cursor]
        mov [loop_start], eax
        ret
repeat: mov eax, [loop_start]
        mov [cursor], eax
        ret

power_off:
        mov ebx, SCHEDOP_shutdown
        mov ecx, offset reason
        mov eax, __HYPERVISOR_sched_op
        int 0x82

# ---- the clocks -------------------------------------------------------------------------------

real_time:                                   # EDX:EAX: nanoseconds, from the record and the time-stamp counter
        mov edi, [VERSION]
        test edi, 1
        jnz real_time                        # it is just being written
        rdtsc
        sub eax, [TSC_STAMP]
        sbb edx, [TSC_STAMP + 4]
        mov cl, [SHIFT]
        shld edx, eax, cl
        shl eax, cl
        mov ebx, edx                         # 64 by 32 bits, and the lowest 32 bits of the product are dropped
        mul dword ptr [MULTIPLIER]
        mov ecx, edx
        mov eax, ebx
        mul dword ptr [MULTIPLIER]
        add eax, ecx
        adc edx, 0
        add eax, [SYSTEM_TIME]
        adc edx, [SYSTEM_TIME + 4]
        cmp edi, [VERSION]
        jne real_time                        # it was written meanwhile: begin again
        ret

virtual_time:                                # EDX:EAX: nanoseconds that we have run
        mov ebx, VCPUOP_get_runstate_info
        xor ecx, ecx
        mov edx, offset runstate
        mov eax, __HYPERVISOR_vcpu_op
        int 0x82
        mov eax, [runstate + 12]
        mov edx, [runstate + 16]
        ret

# ---- events -----------------------------------------------------------------------------------

callback:
        push eax
        mov byte ptr [shared_info], 0
        mov dword ptr [shared_info + 4], 0
        xor eax, eax
        xchg eax, [PENDING]
        bt  eax, 1                           # the ports in the order in which they were bound
        jnc no_timer
        inc dword ptr [timer]
        inc dword ptr [happened]
no_timer:
        bt  eax, 2
        jnc no_virtual
        inc dword ptr [virtual]
        inc dword ptr [happened]
no_virtual:
        pop eax
        push eax                             # what iret gives back as EAX
        mov eax, __HYPERVISOR_iret
        int 0x82

# ---- the plan ---------------------------------------------------------------------------------

letter: mov edx, [cursor]                    # EAX: the next one, 0 at the end
        movzx eax, byte ptr [edx]
        test eax, eax
        jz  end
        inc dword ptr [cursor]
        cmp eax, 32
        je  letter
end:    ret

plain_number:                                # EAX: the number at the cursor
        mov esi, [cursor]
        xor eax, eax
        xor edx, edx
digit:  mov dl, [esi]
        cmp dl, 32
        je  blank
        sub dl, 48
        jb  number_end
        cmp dl, 9
        ja  number_end
        imul eax, eax, 10
        add eax, edx
blank:  inc esi
        jmp digit
number_end:
        mov [cursor], esi
        ret

number: call plain_number                    # EDX:EAX: the same in nanoseconds
        mov edx, 10
        mul edx
        ret

        .align 4
steps:  .long 'r', real_from_now, 'R', real_at, 'x', real_none
        .long 'v', virtual_from_now, 'V', virtual_at, 'y', virtual_none, 'e', virtual_end
        .long 't', tick, 'w', work, 'n', note, 's', sleep, 'p', pause_for, 'q', power_off
        .long '(', begin, ')', repeat, 0
bind_real:
        .long VIRQ_TIMER, 0, 0
bind_virtual:
        .long VIRQ_VIRTUAL_TIMER, 0, 0
reason: .long SHUTDOWN_poweroff
poll:   .long poll, 0, 0, 0
period: .long 0, 0
cursor: .long 0
loop_start:
        .long 0
happened:                                    # events so far, and how many of them sleep has seen
        .long 0
noticed:
        .long 0
timer:  .long 0                              # alarms on real time, and ticks
virtual:
        .long 0
noted:  .long 0
runstate:
        .skip 44
        .align 4
notes:  .skip 16 * MOST_NOTES
