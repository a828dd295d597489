# Works, and sleeps: what a scheduler has to do with.
#
# The command line says how many instructions the work takes that follows a wake-up.  The guest sleeps, is woken, works
# so long and sleeps again.  With an empty line, or 0, it works without end.  EDI counts what it has done.

        .set CMD_LINE, 80                    # in start_info

start:  lea esi, [esi + CMD_LINE]
        xor eax, eax
        xor edi, edi
digit:  movzx ecx, byte ptr [esi]
        sub ecx, '0'
        jb  known
        lea eax, [eax + eax * 4]
        lea eax, [ecx + eax * 2]
        inc esi
        jmp digit
known:  test eax, eax
        jz  always
        shr eax, 1                           # a round takes two instructions
        inc eax
        mov edx, eax

rest:   mov ebx, SCHEDOP_block
        xor ecx, ecx
        mov eax, __HYPERVISOR_sched_op
        int 0x82
        mov ecx, edx
work:   dec ecx
        jnz work
        inc edi
        jmp rest

always: inc edi
        jmp always
