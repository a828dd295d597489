/* What the kernel says about itself, its first instructions, and the page for hypercalls. */

#ifdef LEGACY
        .section __xen_guest
        .ascii "GUEST_OS=xenlab-test,GUEST_VER=0.9"
        .ascii ",XEN_VER=xen-3.0,VIRT_BASE="
        .ascii BASE_TEXT
#ifndef WITHOUT_PAGE
        /* The number of the image's page, not an address. */
        .ascii ",HYPERCALL_PAGE="
        .ascii PAGE_TEXT
#endif
#if PAE
        .ascii ",PAE=yes[extended-cr3]"
#else
        .ascii ",PAE=no"
#endif
        .ascii ",FEATURES=writable_page_tables|pae_pgdir_above_4gb,LOADER=generic"
        .byte 0
#else
        .macro note type:req, content:vararg
        .pushsection .note.Xen, "a", @note
        .long 4, 2f - 1f, \type
        .asciz "Xen"
1:      \content
2:      .p2align 2
        .popsection
        .endm
        note 1, .long start
#ifndef WITHOUT_PAGE
        note 2, .long hypercall_page
#endif
        note 3, .long virt_base
        note 5, .asciz "xen-3.0"
        note 6, .asciz "xenlab-test"
        note 7, .asciz "1.0"
        note 8, .asciz "generic"
#if PAE
        note 9, .asciz "yes"
#else
        note 9, .asciz "no"
#endif
        note 10, .asciz "!writable_page_tables|pae_pgdir_above_4gb"
        note 12, .long 0xf5800000
        note 14, .long 1
        note 17, .long 1 << 0 | 1 << 4 | 1 << 11
#endif

        .text
        .globl start, hypercall_page, at_start
start:  jmp save

        /* The first whole page of the image. */
        .p2align 12
hypercall_page:
        .fill 4096, 1, 0

save:   movl %eax, at_start
        movl %ebx, at_start + 4
        movl %ecx, at_start + 8
        movl %edx, at_start + 12
        movl %esi, at_start + 16
        movl %edi, at_start + 20
        movl %ebp, at_start + 24
        movl %esp, at_start + 28
        movl %cs, %eax
        movl %eax, at_start + 32
        movl %ss, %eax
        movl %eax, at_start + 36
        movl %ds, %eax
        movl %eax, at_start + 40
        movl %es, %eax
        movl %eax, at_start + 44
        movl %fs, %eax
        movl %eax, at_start + 48
        movl %gs, %eax
        movl %eax, at_start + 52
        pushfl
        popl at_start + 56
        pushl %esi
        call kernel
1:      jmp 1b

        .data
at_start:
        .fill 15, 4, 0xdeadbeef

        .section .note.GNU-stack, "", @progbits
