# A kernel that gives its application memory only when it touches it, and takes its system calls without the hypervisor.
#
# The window is 16 pages without a frame.  The first touch of a page is a page fault; the kernel's handler takes a
# frame from its pool, maps it there, and returns to the same instruction.  For page tables of two levels.

        .set BASE, 0xc0000000
        .set WINDOW, 0xc0200000
        .set WINDOW_END, 0xc0210000
        .set MFN_LIST, 68                    # offset in start_info
        .set UPCALL_MASK, 1                  # in shared_info: vcpu_info[0].evtchn_upcall_mask
        .set CR2_OFFSET, 8                   # vcpu_info[0].arch.cr2
        .set USER_PAGE, 0x67                 # present, writable, user, accessed, dirty

start:  mov eax, [esi + MFN_LIST]
        mov [mfn_list], eax
        mov ebx, offset trap_table
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
        mov ebx, FLAT_RING1_SS
        mov ecx, offset kernel_stack
        mov eax, __HYPERVISOR_stack_switch
        int 0x82
        mov byte ptr [shared_info + UPCALL_MASK], 0
        mov eax, FLAT_RING3_DS               # data segments that ring 3 may keep
        mov ds, eax
        mov es, eax
        push FLAT_RING3_SS
        push offset user_stack
        push 0x202
        push FLAT_RING3_CS
        push offset application
        iretd

# ---- handlers, in ring 1, on the kernel's stack -----------------------------------------

page_fault:                                  # [esp] is the error code, [esp + 4] EIP
        push eax
        mov eax, [shared_info + CR2_OFFSET]  # before anything here can fault and leave another address
        pushad
        cmp eax, WINDOW
        jb elsewhere
        cmp eax, WINDOW_END
        jae elsewhere
        mov ebx, eax
        and ebx, 0xfffff000
        mov ecx, offset pool - BASE          # the next frame of the pool
        shr ecx, 12
        add ecx, [taken]
        mov edx, [mfn_list]
        mov ecx, [edx + 4 * ecx]
        shl ecx, 12
        or ecx, USER_PAGE
        xor edx, edx
        xor esi, esi                         # no flush: the entry was not there before
        mov eax, __HYPERVISOR_update_va_mapping
        int 0x82
        inc dword ptr [taken]
        popad
        pop eax
        add esp, 4                           # the error code
        iretd                                # to the instruction that faulted
elsewhere:
        popad
        pop eax
        add esp, 4
        mov dword ptr [esp], offset failed   # behind it all
        iretd

undefined:                                   # a frame without an error code
        add dword ptr [esp], 2               # behind the UD2
        iretd

system_call:                                 # print the character in AL; the CPU comes here from ring 3 by itself
        pushad
        mov [character], al
        mov ebx, CONSOLEIO_write
        mov ecx, 1
        mov edx, offset character
        mov eax, __HYPERVISOR_console_io
        int 0x82
        popad
        iretd

finish: mov ebx, SCHEDOP_shutdown
        mov ecx, offset reason
        mov eax, __HYPERVISOR_sched_op
        int 0x82

        .align 8
trap_table:                                  # vector, flags, selector, handler
        .byte 6, 0
        .word FLAT_RING1_CS
        .long undefined
        .byte 14, 0
        .word FLAT_RING1_CS
        .long page_fault
        .byte 0x80, 3                        # the application may use INT with it
        .word FLAT_RING1_CS
        .long system_call
        .byte 0x81, 3
        .word FLAT_RING1_CS
        .long finish
        .long 0, 0

mfn_list:  .long 0
taken:     .long 0
reason:    .long SHUTDOWN_poweroff
character: .byte 0
        .align 4096
pool:   .fill 4 * 4096, 1, 0
        .fill 512, 1, 0
kernel_stack:

# ---- the application ---------------------------------------------------------------------

        .align 4096
user_start:
application:
        mov ebx, WINDOW + 0x3010
        mov byte ptr [ebx], 'p'              # a page that is not there
        mov al, [ebx]                        # now it is
        int 0x80
        ud2                                  # not an instruction
        mov ebx, WINDOW + 0x5000
        mov byte ptr [ebx + 4], 'g'          # another page
        mov al, [ebx + 4]
        int 0x80
        mov eax, [0x1000]                    # and one that is nobody's
        mov al, '?'
        int 0x80
failed: mov al, '.'
        int 0x80
        int 0x81                             # the end
        .fill 256, 1, 0
user_stack:
        .align 4096
user_end:
