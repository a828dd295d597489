# A kernel and its memory: it finds its pages in both lists, walks its own page table, gives one page a
# second address, names a wrong frame, and swaps the machine frames of two of its pages.
# For page tables of two levels.

        .set BASE, 0xc0000000                # pseudo-physical frame 0 stands here
        .set M2P, 0xfc000000                 # the machine-to-physical list
        .set PT_BASE, 60                     # offsets in start_info
        .set MFN_LIST, 68

start:  mov ebp, [esi + MFN_LIST]            # EBP: the physical-to-machine list, for the whole run
        mov edi, [esi + PT_BASE]             # EDI: the root page table, as the guest sees it

        mov ebx, offset left                 # a linear address:
        sub ebx, BASE
        shr ebx, 12                          # its pseudo-physical frame,
        mov ecx, [ebp + 4 * ebx]             # its machine frame,
        mov edx, [M2P + 4 * ecx]             # and back
        cmp edx, ebx
        jne wrong
        mov edx, '1'
        call say

walk:   mov eax, offset left                 # the same by the page table
        shr eax, 22
        mov eax, [edi + 4 * eax]             # the root's entry names the l1 table by its machine frame,
        shr eax, 12
        mov eax, [M2P + 4 * eax]             # which the guest can only read at a linear address
        shl eax, 12
        add eax, BASE
        mov esi, eax                         # ESI: the l1 table
        mov ebx, offset left
        shr ebx, 12
        and ebx, 1023
        mov eax, [esi + 4 * ebx]
        shr eax, 12
        cmp eax, ecx                         # the frame that the list named
        jne wrong
        mov edx, '2'
        call say

twice:  shl ecx, 12                          # `left` once more, at an address behind the guest's memory
        or ecx, 1                            # present, read-only
        mov ebx, BASE + 0x200000
        xor edx, edx
        push esi
        xor esi, esi
        mov eax, __HYPERVISOR_update_va_mapping
        int 0x82
        pop esi
        mov eax, [BASE + 0x200000]
        cmp eax, [left]
        jne wrong
        mov edx, '3'
        call say

confused:
        mov ecx, offset left
        sub ecx, BASE                        # a pseudo-physical frame where a machine frame belongs
        or ecx, 1
        mov ebx, BASE + 0x201000
        xor edx, edx
        push esi
        xor esi, esi
        mov eax, __HYPERVISOR_update_va_mapping
        int 0x82
        pop esi
        test eax, eax
        jns wrong
        mov edx, '4'
        call say

swap:   mov ebx, offset left
        sub ebx, BASE
        shr ebx, 12
        mov ecx, [ebp + 4 * ebx]             # ECX: the frame of `left`
        mov edx, [ebp + 4 * ebx + 4]         # EDX: of `right`, the page behind it
        mov eax, [ebp + 4 * ebx + 8]         # EAX: of a spare page
        mov [copies + 4], eax                # the contents change places: left to spare,
        mov [copies + 8], ecx
        mov [copies + 16], ecx               # right to left,
        mov [copies + 20], edx
        mov [copies + 28], edx               # spare to right
        mov [copies + 32], eax

        mov eax, ecx                         # the machine-to-physical list: two new numbers
        shl eax, 12
        or eax, MMU_MACHPHYS_UPDATE
        mov [updates], eax
        lea eax, [ebx + 1]
        mov [updates + 8], eax
        mov eax, edx
        shl eax, 12
        or eax, MMU_MACHPHYS_UPDATE
        mov [updates + 16], eax
        mov [updates + 24], ebx

        mov eax, esi                         # the page table: its machine address first
        sub eax, BASE
        shr eax, 12
        mov eax, [ebp + 4 * eax]
        shl eax, 12
        lea eax, [eax + 4 * ebx]             # BASE has the l1 index 0, so the pfn is the index
        mov [updates + 32], eax
        add eax, 4
        mov [updates + 48], eax
        mov eax, edx
        shl eax, 12
        or eax, 0x63                         # present, writable, accessed, dirty
        mov [updates + 40], eax
        mov eax, ecx
        shl eax, 12
        or eax, 0x63
        mov [updates + 56], eax

        mov [ebp + 4 * ebx], edx             # the guest's own list
        mov [ebp + 4 * ebx + 4], ecx

        mov ebx, offset copies
        mov ecx, 3
        xor edx, edx
        mov esi, DOMID_SELF
        mov eax, __HYPERVISOR_mmuext_op
        int 0x82
        test eax, eax
        jnz wrong
        mov ebx, offset updates
        mov ecx, 4
        mov eax, __HYPERVISOR_mmu_update
        int 0x82
        test eax, eax
        jnz wrong
        mov ebx, offset flush                # the CPU may remember the old entries
        mov ecx, 1
        mov eax, __HYPERVISOR_mmuext_op
        int 0x82
        mov eax, [left]                      # nothing has moved, as far as the guest can see
        cmp eax, 'l'
        jne wrong
        mov eax, [right]
        cmp eax, 'r'
        jne wrong
        mov edx, '5'
        call say
        jmp over

wrong:  mov edx, '?'
        call say
over:   mov ebx, SCHEDOP_shutdown
        mov ecx, offset reason
        mov eax, __HYPERVISOR_sched_op
        int 0x82

say:    push ebx                             # print the character in DL
        push ecx
        mov [letter], dl
        mov ebx, CONSOLEIO_write
        mov ecx, 1
        mov edx, offset letter
        mov eax, __HYPERVISOR_console_io
        int 0x82
        pop ecx
        pop ebx
        ret

letter: .byte 0
        .align 8
copies: .long MMUEXT_COPY_PAGE, 0, 0, MMUEXT_COPY_PAGE, 0, 0, MMUEXT_COPY_PAGE, 0, 0
flush:  .long MMUEXT_TLB_FLUSH_LOCAL, 0, 0
        .align 8
updates:
        .fill 16, 4, 0                       # four updates: where (64 bits) and what (64 bits)
reason: .long SHUTDOWN_poweroff

        .align 4096
left:   .long 'l'
        .align 4096
right:  .long 'r'
        .align 4096
spare:  .fill 4096, 1, 0
