# The same work done three ways: 16 hypercalls one by one, through the hypercall page, and as
# one batch.  The null hypercall is xen_version, which only answers with a number.

        .set CALLS, 16

start:  mov edi, CALLS
direct: xor ebx, ebx
        mov eax, __HYPERVISOR_xen_version
        int 0x82
        dec edi
        jnz direct

        mov edi, CALLS
paged:  xor ebx, ebx
        call hypercall_page + 32 * __HYPERVISOR_xen_version
        dec edi
        jnz paged

        mov ebx, offset batch
        mov ecx, CALLS
        mov eax, __HYPERVISOR_multicall
        int 0x82

        mov ebx, 12345                       # no such command
        mov eax, __HYPERVISOR_sched_op
        int 0x82
        mov eax, 63                          # no such hypercall
        int 0x82
        mov ebx, CONSOLEIO_write             # a pointer into the hypervisor
        mov ecx, 4
        mov edx, 0xfc000000
        mov eax, __HYPERVISOR_console_io
        int 0x82

        mov ebx, SCHEDOP_shutdown
        mov ecx, offset reason
        mov eax, __HYPERVISOR_sched_op
        int 0x82

reason: .long SHUTDOWN_poweroff
        .align 8
batch:  .rept CALLS                          # op, result, six arguments
        .long __HYPERVISOR_xen_version, 0
        .fill 6, 4, 0
        .endr
