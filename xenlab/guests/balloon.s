# A kernel with a page allocator, a workload that takes and returns pages, and a balloon driver (paper 3.3.4).
#
# The control domain's tools write into the store page how much memory the kernel should have: its target.  The driver
# follows.  To give memory back it takes free pages from the allocator, unmaps them and hands their frames to the
# hypervisor; to have more it asks for frames, maps them and frees them into the allocator.
#
# The command line says how many pages the workload moves in a round; then pairs: how many pages it wants, for how
# many rounds.  After the last pair the first one follows again.  With an empty line there is no work, and the kernel
# sleeps whenever it has done what it was told.

        .set BASE, 0xC0000000                # where pseudo-physical frame 0 is mapped
        .set AWAY, 0xFFFFFFFF                # in the list of frames: a page that has no frame now
        .set ENTRY, 0x63                     # present, writable, accessed, dirty
        .set BATCH, 16                       # the driver moves so many pages at a time
        .set LOW, 4                          # free pages that it leaves to its own kernel
        .set SPIN, 150                       # what a round works besides
        .set STAMP, 0x5EED0000
        # start_info
        .set NR_PAGES, 32
        .set STORE_MFN, 44
        .set MFN_LIST, 68
        .set CMD_LINE, 80
        # the store page: see xenlab/toolstack/balloon.py
        .set TARGET, 0
        .set NEED, 4
        .set HAVE, 8
        .set FAILED, 12

start:  mov [first], esp                     # behind the stack all memory is free
        mov eax, [esi + MFN_LIST]
        mov [p2m], eax
        mov eax, [esi + NR_PAGES]
        mov [have], eax
        lea eax, [esi + CMD_LINE]
        mov [cursor], eax
        call find_store
        call fill_allocator
        call find_limit
        call next_number
        mov [rate], eax
        mov eax, [cursor]
        mov [plan], eax

round:  call follow_plan
        call drive
        call work
        call report
        cmp dword ptr [rate], 0
        je  rest
        mov ecx, SPIN
spin:   dec ecx
        jnz spin
        mov ebx, SCHEDOP_yield
        call sched
        jmp round
rest:   cmp dword ptr [moved], 0
        jne round                            # there may be more to move
        mov ebx, SCHEDOP_block               # until the tools wake us
        call sched
        jmp round

sched:  xor ecx, ecx
        mov eax, __HYPERVISOR_sched_op
        int 0x82
        ret

# ---- the balloon driver -----------------------------------------------------------------------

drive:  mov eax, [wanted]                    # what the workload will ask for in this round
        sub eax, [used]
        jns asks
        xor eax, eax
asks:   cmp eax, [rate]
        jbe asked
        mov eax, [rate]
asked:  mov [missing], eax
        call decide
        xor edx, edx
        mov [moved], edx
        test eax, eax
        jz  still
        js  shrink
        call at_most_a_batch
        call populate
        mov [moved], eax
still:  ret
shrink: neg eax
        call at_most_a_batch
        mov ecx, [free]
        add ecx, [bare]
        cmp eax, ecx
        jbe can
        mov eax, ecx
can:    mov [moved], eax
        test eax, eax
        jnz give_back
        ret
at_most_a_batch:
        cmp eax, BATCH
        jbe small
        mov eax, BATCH
small:  ret

decide:                                      # EAX: how many pages to get, or, below zero, to give back
        mov eax, [missing]
        sub eax, [free]
        ja  decided                          # out of memory: whatever the target says, ask for more
        mov edx, [store]
        mov eax, [edx + TARGET]
        sub eax, [have]
        jae decided
        mov edx, [missing]                   # too much: what is free, but for what is kept back
        add edx, LOW
        sub edx, [free]
        sub edx, [bare]
        cmp edx, 0
        jge nothing
        cmp eax, edx
        jge decided
        mov eax, edx
decided:
        ret
nothing:
        xor eax, eax
        ret

give_back:                                   # EAX pages, of which so many are free
        mov [count], eax
        xor edi, edi
one:    call pick
        mov eax, [p2m]
        mov ecx, [eax + 4 * ebp]
        mov [list + 4 * edi], ecx
        mov dword ptr [eax + 4 * ebp], AWAY  # from here on the page has no frame
        cmp ebp, [hint]
        jae later
        mov [hint], ebp
later:  xor ecx, ecx                         # an empty entry
        call batch_entry
        inc edi
        cmp edi, [count]
        jb  one
        mov dword ptr [batch - 32 + 20 + edx], UVMF_TLB_FLUSH | UVMF_ALL
        call map_batch
        mov ebx, XENMEM_decrease_reservation
        call reservation
        cmp eax, [count]
        jne broken
        sub [have], eax
        ret

populate:                                    # up to EAX pages; EAX: how many there were
        mov [count], eax
        mov ebp, [hint]
        xor edi, edi
        mov edx, [p2m]
search: cmp edi, [count]
        je  chosen
        cmp ebp, [limit]
        jae chosen
        cmp dword ptr [edx + 4 * ebp], AWAY
        jne here
        mov [pages + 4 * edi], ebp
        mov [list + 4 * edi], ebp
        inc edi
here:   inc ebp
        jmp search
chosen: mov [count], edi
        xor eax, eax
        test edi, edi
        jz  got
        mov ebx, XENMEM_populate_physmap
        call reservation
        mov [count], eax
        test eax, eax
        jz  got
        xor edi, edi
enter:  mov ebp, [pages + 4 * edi]
        mov ecx, [list + 4 * edi]
        mov eax, [p2m]
        mov [eax + 4 * ebp], ecx             # the page is back, in another frame
        shl ecx, 12
        or  ecx, ENTRY
        call linear
        call batch_entry
        inc edi
        cmp edi, [count]
        jb  enter
        call map_batch
        xor edi, edi
fill:   mov ebp, [pages + 4 * edi]
        call put_page
        inc edi
        cmp edi, [count]
        jb  fill
        inc ebp
        mov [hint], ebp
        mov eax, [count]
        add [have], eax
got:    ret

batch_entry:                                 # number EDI: map EBX by the entry ECX; EDX is where the next one goes
        mov edx, edi
        shl edx, 5
        mov dword ptr [batch + edx], __HYPERVISOR_update_va_mapping
        mov [batch + 8 + edx], ebx
        mov [batch + 12 + edx], ecx
        mov dword ptr [batch + 16 + edx], 0
        mov dword ptr [batch + 20 + edx], 0
        add edx, 32
        ret

map_batch:
        mov ebx, offset batch
        mov ecx, [count]
        mov eax, __HYPERVISOR_multicall
        int 0x82
        ret

reservation:                                 # EBX: which; EAX: how many were done
        mov ecx, offset extents
        mov eax, __HYPERVISOR_memory_op
        int 0x82
        ret

# ---- the workload -----------------------------------------------------------------------------

follow_plan:
        cmp dword ptr [rate], 0
        je  planned
        sub dword ptr [rounds], 1
        jg  planned
        call next_number
        jnc pair
        mov eax, [plan]                      # from the beginning again
        mov [cursor], eax
        call next_number
pair:   mov [wanted], eax
        call next_number
        mov [rounds], eax
planned:
        ret

work:   mov esi, [rate]                      # pages that may still be moved in this round
        mov eax, [used]
more:   test esi, esi
        jz  enough
        dec esi
        mov eax, [used]
        cmp eax, [wanted]
        je  enough
        ja  drop
        call take_page
        test ebx, ebx
        jz  failed
        lea eax, [ebp + STAMP]               # use it
        mov [ebx + 4], eax
        mov eax, [used_list]
        mov [ebx], eax
        mov [used_list], ebx
        inc dword ptr [used]
        jmp more
drop:   mov ebx, [used_list]
        mov ebp, ebx
        sub ebp, BASE
        shr ebp, 12
        lea eax, [ebp + STAMP]
        cmp eax, [ebx + 4]                   # is it what was written?
        jne broken
        mov eax, [ebx]
        mov [used_list], eax
        dec dword ptr [used]
        call put_page
        jmp more
failed: inc dword ptr [failures]
        cmp dword ptr [hungry], 1
        je  told
        mov dword ptr [hungry], 1
        mov ecx, no_memory_length
        mov edx, offset no_memory
        jmp print
enough: mov eax, [used]
        cmp eax, [wanted]
        jne told
        cmp dword ptr [hungry], 0
        je  told
        mov dword ptr [hungry], 0
        mov ecx, again_length
        mov edx, offset again
print:  mov ebx, CONSOLEIO_write
        mov eax, __HYPERVISOR_console_io
        int 0x82
told:   ret

report: mov edx, [store]
        mov eax, [have]
        mov [edx + HAVE], eax
        sub eax, [free]
        sub eax, [bare]
        mov ecx, [wanted]
        sub ecx, [used]
        jle less
        add eax, ecx
less:   add eax, LOW
        mov [edx + NEED], eax
        mov eax, [failures]
        mov [edx + FAILED], eax
        ret

broken: ud2                                  # a page is not what it should be: the kernel stops here

# ---- pages: EBP is the frame number, EBX the address ------------------------------------------

linear: mov ebx, ebp
        shl ebx, 12
        add ebx, BASE
        ret

put_page:                                    # into the allocator
        call linear
        mov eax, [free_list]
        mov [ebx], eax
        mov [free_list], ebx
        inc dword ptr [free]
        ret

take_page:                                   # out of it; EBX is 0 if there is none
        mov ebx, [free_list]
        test ebx, ebx
        jz  none
        mov eax, [ebx]
        mov [free_list], eax
        dec dword ptr [free]
        mov ebp, ebx
        sub ebp, BASE
        shr ebp, 12
none:   ret

pick:   cmp dword ptr [bare], 0              # what the driver gives back: first what is not mapped anyway
        je  take_page
        dec dword ptr [bare]
        mov ebp, [limit]
        add ebp, [bare]
        jmp linear

# ---- at the start -----------------------------------------------------------------------------

find_store:                                  # start_info names the page by its machine frame; the list of
        mov ebx, XENVER_platform_parameters  # all machine frames says which of our pages that is
        mov ecx, offset list
        mov eax, __HYPERVISOR_xen_version
        int 0x82
        mov edx, [list]
        mov eax, [esi + STORE_MFN]
        mov ebp, [edx + 4 * eax]
        call linear
        mov [store], ebx
        cmp dword ptr [ebx + TARGET], 0
        jne said
        mov eax, [have]                      # nothing was said yet: what we have is right
        mov [ebx + TARGET], eax
said:   ret

fill_allocator:
        mov ebp, [first]
        sub ebp, BASE
        shr ebp, 12
        mov [hint], ebp
        call has_table
behind: cmp ebp, [have]
        jae filled
        test ebp, 511
        jnz tabled
        call has_table
tabled: test eax, eax
        js  beyond
        call put_page
        xor eax, eax
        inc ebp
        jmp behind
beyond: mov eax, [have]                      # the first page tables do not reach there, and this small kernel
        sub eax, ebp                         # makes no others
        mov [bare], eax
filled: mov [limit], ebp
        ret

has_table:                                   # EAX is negative where no page table covers the page
        call linear
        mov eax, [p2m]
        mov ecx, [eax + 4 * ebp]
        shl ecx, 12
        or  ecx, ENTRY
        cmp ebp, [have]
        jb  try
        xor ecx, ecx
try:    xor edx, edx
        xor esi, esi
        mov eax, __HYPERVISOR_update_va_mapping
        int 0x82
        ret

find_limit:                                  # how far page tables, and the pages of the list, reach behind our memory
        cmp dword ptr [bare], 0
        jne known
        mov ebp, [have]
probe:  test ebp, 1023
        jz  known
        test ebp, 511
        jnz reach
        call has_table
        test eax, eax
        js  known
reach:  mov eax, [p2m]
        mov dword ptr [eax + 4 * ebp], AWAY
        inc ebp
        mov [limit], ebp
        jmp probe
known:  ret

next_number:                                 # EAX: the next number of the command line; carry: there is none
        mov esi, [cursor]
        xor eax, eax
skip:   movzx ecx, byte ptr [esi]
        test ecx, ecx
        stc
        jz  read
        inc esi
        sub ecx, '0'
        cmp ecx, 9
        ja  skip
digit:  imul eax, eax, 10
        add eax, ecx
        movzx ecx, byte ptr [esi]
        sub ecx, '0'
        cmp ecx, 9
        ja  number
        inc esi
        jmp digit
number: clc
read:   mov [cursor], esi
        ret

# ---- data -------------------------------------------------------------------------------------

        .align 4
first:      .long 0
p2m:        .long 0                          # the list of frames by our own numbers, kept up to date by us
store:      .long 0
cursor:     .long 0                          # where the command line was read to
plan:       .long 0                          # where its pairs begin
rate:       .long 0
wanted:     .long 0
rounds:     .long 0
used:       .long 0
used_list:  .long 0
have:       .long 0
free:       .long 0
free_list:  .long 0
bare:       .long 0                          # pages that are ours and not mapped, from number `limit` on
limit:      .long 0                          # frame numbers below this one can be mapped
hint:       .long 0                          # no page below this one is away
missing:    .long 0
moved:      .long 0
failures:   .long 0
hungry:     .long 0
extents:    .long list                       # xen_memory_reservation
count:      .long 0, 0, 0
            .word DOMID_SELF, 0
list:       .fill BATCH, 4, 0
pages:      .fill BATCH, 4, 0
no_memory:  .ascii "out of memory\n"
no_memory_length = . - no_memory
again:      .ascii "memory again\n"
again_length = . - again
        .align 32
batch:      .fill 8 * BATCH, 4, 0
