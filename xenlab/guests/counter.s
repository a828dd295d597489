# Counts for ever and says so now and then.  It never gives up the CPU of its own accord:
# that others run as well is the scheduler's doing.

        .set BLINK, 20000

start:  mov esi, BLINK
work:   inc edi
        dec esi
        jnz work

        mov ebx, CONSOLEIO_write
        mov ecx, 1
        mov edx, offset dot
        mov eax, __HYPERVISOR_console_io
        int 0x82
        jmp start

dot:    .ascii "."
