# The life of a page table: filled while it is a page, refused, made read-only, hung into the tree,
# pinned, taken out, given up.  Then a store straight into a table in use.
# After each request the console gets a dot if it was done and an exclamation mark if it was refused.

        .set BASE, 0xc0000000
        .set PT_BASE, 60                     # in struct start_info (xen.h)
        .set MFN_LIST, 68
        .set READ_ONLY, 0x61                 # present, accessed, dirty
        .set WRITABLE, 0x63
        .set TABLE, 0x27                     # present, writable, user, accessed
        .set SLOT, 4 * 700                   # an entry of the root that nobody uses
        .set WINDOW, 700 << 22               # and the addresses behind it

start:  mov ebx, offset traps
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
        mov eax, [esi + MFN_LIST]
        mov [p2m], eax
        mov eax, [esi + PT_BASE]             # the root, and behind it the l1 table
        mov ebp, eax
        call frame_of
        shl eax, 12
        mov [root], eax
        lea eax, [ebp + 4096]
        call frame_of
        shl eax, 12
        mov [leaf], eax
        mov eax, offset new
        call frame_of
        shl eax, 12
        mov [new_table], eax

        mov edi, 0                           # fill the new table: it is still a page like any other
fill:   lea eax, [edi * 8]
        shl eax, 9
        add eax, offset some_page
        call frame_of
        shl eax, 12
        or eax, WRITABLE
        mov [new + 4 * edi], eax
        inc edi
        cmp edi, 3
        jne fill

hang_writable:
        call hang                            # refused: it is mapped writable

        mov ecx, [new_table]
        or ecx, READ_ONLY
        mov ebx, offset new
        call map                             # now nobody can write to it
hang_read_only:
        call hang

        mov eax, [WINDOW]                    # three pages more
        mov dword ptr [WINDOW + 4096], 0x600d

map_table_writable:
        mov ecx, [leaf]                      # a second, writable mapping of a table: refused
        or ecx, WRITABLE
        mov ebx, offset spare
        call map

pin:    mov ebx, MMUEXT_PIN_L1_TABLE
        call extended
take_out:
        mov eax, [root]
        add eax, SLOT
        xor ecx, ecx
        call set_entry
make_writable_again:
        call open_new                        # refused: a pin is a use, too
unpin:  mov ebx, MMUEXT_UNPIN_TABLE
        call extended
        call open_new                        # its last use is gone: a page like any other

assisted:
        mov ebx, VMASST_CMD_enable
        mov ecx, VMASST_TYPE_writable_pagetables
        mov eax, __HYPERVISOR_vm_assist
        int 0x82
        call report
        mov ecx, [new_table]
        or ecx, WRITABLE
        mov [ebp + 4096 + 4 * 400], ecx      # just store: carried out
        mov ecx, [root]
        or ecx, WRITABLE
forbidden:
        mov [ebp + 4096 + 4 * 401], ecx      # a writable mapping of the root: page fault
after:  mov ebx, SCHEDOP_shutdown
        mov ecx, offset reason
        mov eax, __HYPERVISOR_sched_op
        int 0x82

hang:   mov eax, [root]
        add eax, SLOT
        mov ecx, [new_table]
        or ecx, TABLE
set_entry:                                   # EAX: machine address of an entry, ECX: what it is to be
        mov [request], eax
        mov [request + 8], ecx
        mov ebx, offset request
        mov ecx, 1
        xor edx, edx
        mov esi, DOMID_SELF
        mov eax, __HYPERVISOR_mmu_update
        int 0x82
        jmp report
open_new:
        mov ecx, [new_table]
        or ecx, WRITABLE
        mov ebx, offset new
map:    xor edx, edx                         # EBX: linear address, ECX: the entry that maps it
        mov esi, UVMF_INVLPG
        mov eax, __HYPERVISOR_update_va_mapping
        int 0x82
        jmp report
extended:                                    # EBX: a command about the new table
        mov [command], ebx
        mov eax, [new_table]
        shr eax, 12
        mov [command + 4], eax
        mov ebx, offset command
        mov ecx, 1
        xor edx, edx
        mov esi, DOMID_SELF
        mov eax, __HYPERVISOR_mmuext_op
        int 0x82
report: mov edx, offset done
        test eax, eax
        jz print
        mov edx, offset refused
print:  mov ebx, CONSOLEIO_write
        mov ecx, 1
        mov eax, __HYPERVISOR_console_io
        int 0x82
        ret
frame_of:                                    # EAX: linear address in, machine frame out
        sub eax, BASE
        shr eax, 12
        mov edx, [p2m]
        mov eax, [edx + 4 * eax]
        ret
page_fault:
        add esp, 4                           # the error code
        mov dword ptr [esp], offset after
        mov eax, 1
        call report
        iretd

        .align 8
traps:  .byte 14, 0
        .word FLAT_RING1_CS
        .long page_fault
        .long 0, 0
request: .long 0, 0, 0, 0
command: .long 0, 0, 0
p2m:    .long 0
root:   .long 0
leaf:   .long 0
new_table: .long 0
reason: .long SHUTDOWN_poweroff
done:   .ascii "."
refused: .ascii "!"
        .align 4096
new:    .fill 4096, 1, 0
spare:  .fill 4096, 1, 0
some_page:
        .fill 3 * 4096, 1, 0
