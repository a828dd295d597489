# A kernel in ring 1 with one application in ring 3: every kind of crossing once.
#
# The kernel registers its handlers, reads a control register (which the hypervisor does for
# it), and starts the application.  The application makes a system call, tries to switch off
# interrupts, which is not its business, writes to memory that is not there, and ends.

        .set GP_VECTOR, 13
        .set PF_VECTOR, 14
        .set SYSCALL_VECTOR, 0x80
        .set KERNEL_ONLY, 0                  # trap_info flags: the ring that may use INT
        .set ANYONE, 3
        .set MASKS, 4                        # mask events on entry: the CPU cannot, so it does not go there alone
        .set CR2_OFFSET, 8                   # in shared_info, vcpu_info[0].arch.cr2

start:  mov ebx, offset trap_table
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
        mov ebx, FLAT_RING1_SS
        mov ecx, offset kernel_stack
        mov eax, __HYPERVISOR_stack_switch
        int 0x82

        mov eax, cr0                         # privileged: faults, and is emulated

        mov eax, FLAT_RING3_DS               # data segments that ring 3 may keep: IRET would
        mov ds, eax                          # empty the kernel's own
        mov es, eax

        push FLAT_RING3_SS                   # the frame that IRET takes down
        push offset user_stack
        push 0x202
        push FLAT_RING3_CS
        push offset application
        iretd                                # from ring 1 to ring 3: the CPU does it alone

# ---- handlers, all in ring 1, on the kernel's stack -------------------------------------

system_call:                                 # EAX is the application's character, 0 to end
        test eax, eax
        jz finish
        mov byte ptr [character], al
        call print
        mov eax, 0
        jmp hypercall_page + 32 * __HYPERVISOR_iret

protection_fault:                            # [esp] is the error code, [esp + 4] EIP
        mov byte ptr [character], '!'
        call print
        add esp, 4
        inc dword ptr [esp]                  # behind the CLI, which is one byte long
        jmp hypercall_page + 32 * __HYPERVISOR_iret

page_fault:
        mov eax, [shared_info + CR2_OFFSET]  # only ring 0 can read CR2: Xen left it here
        mov [fault_address], eax
        mov byte ptr [character], '?'
        call print
        add esp, 4
        add dword ptr [esp], 6               # behind MOV [address], EBX
        jmp hypercall_page + 32 * __HYPERVISOR_iret

print:  mov ebx, CONSOLEIO_write
        mov ecx, 1
        mov edx, offset character
        mov eax, __HYPERVISOR_console_io
        int 0x82
        ret

finish: mov ebx, SCHEDOP_shutdown
        mov ecx, offset reason
        mov eax, __HYPERVISOR_sched_op
        int 0x82

        .align 8
trap_table:                                  # vector, flags, selector, handler
        .byte GP_VECTOR, KERNEL_ONLY
        .word FLAT_RING1_CS
        .long protection_fault
        .byte PF_VECTOR, KERNEL_ONLY
        .word FLAT_RING1_CS
        .long page_fault
        .byte SYSCALL_VECTOR, ANYONE + MASKS
        .word FLAT_RING1_CS
        .long system_call
        .long 0, 0

reason:        .long SHUTDOWN_poweroff
fault_address: .long 0
character:     .byte 0
        .align 16
        .fill 512, 1, 0
kernel_stack:

# ---- the application, on pages that ring 3 may use --------------------------------------

        .align 4096
user_start:
application:
        mov eax, 'a'
        int 0x80                             # a system call
        cli                                  # not allowed in ring 3
        mov ebx, 7
        mov [0x1000], ebx                    # nothing is mapped there
        mov eax, 'z'
        int 0x80
        xor eax, eax
        int 0x80                             # the end
        .fill 256, 1, 0
user_stack:
        .align 4096
user_end:
