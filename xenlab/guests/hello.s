# The smallest useful guest: two hypercalls and no memory of its own but its code.
# It runs in ring 1, as every guest kernel does.

start:  mov ebx, CONSOLEIO_write            # what to do
        mov ecx, length                     # how many bytes
        mov edx, offset message             # from where
        mov eax, __HYPERVISOR_console_io    # the number of the hypercall
        int 0x82                            # into the hypervisor

        mov ebx, SCHEDOP_shutdown
        mov ecx, offset reason
        mov eax, __HYPERVISOR_sched_op
        int 0x82                            # does not come back

reason:  .long SHUTDOWN_poweroff
message: .ascii "Hello from ring 1\n"
length = . - message
