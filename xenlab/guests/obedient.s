# A guest that does what is typed at it.  An order is eight words, with its data behind them:
#
#       0, number, ebx, ecx, edx, esi, edi, ebp       make a hypercall
#       1, address, value                             store a word
#       2, address                                    load a word
#
# `answer` is what came of it.  After a page fault `fault` is its error code, with bit 31 set, and
# `fault_address` is where.

        .set STORE, 1
        .set ORDER_BYTES, 32 + 12256

start:  mov ebx, offset traps
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82

wait:   mov ebx, CONSOLEIO_read
        mov ecx, ORDER_BYTES
        mov edx, offset order
        mov eax, __HYPERVISOR_console_io
        int 0x82
        test eax, eax
        jz sleep
        mov dword ptr [fault], 0
        mov edi, [order + 4]
        cmp dword ptr [order], STORE
        je store
        ja load

        mov eax, edi
        mov ebx, [order + 8]
        mov ecx, [order + 12]
        mov edx, [order + 16]
        mov esi, [order + 20]
        mov edi, [order + 24]
        mov ebp, [order + 28]
        int 0x82
        jmp keep

store:  mov eax, [order + 8]
        mov [edi], eax
        jmp keep

load:   mov eax, [edi]

keep:   mov [answer], eax
        jmp wait

sleep:  mov ebx, SCHEDOP_block
        xor ecx, ecx
        mov eax, __HYPERVISOR_sched_op
        int 0x82
        jmp wait

page_fault:
        pop dword ptr [fault]                # the error code
        or dword ptr [fault], 0x80000000
        mov eax, [shared_info + 8]
        mov [fault_address], eax
        mov dword ptr [esp], offset keep     # the order is over
        iretd

        .align 8
traps:  .byte 14, 0
        .word FLAT_RING1_CS
        .long page_fault
        .long 0, 0
answer: .long 0
fault:  .long 0
fault_address: .long 0

        .align 4096
order:  .fill 32, 1, 0
data:   .fill ORDER_BYTES - 32, 1, 0
