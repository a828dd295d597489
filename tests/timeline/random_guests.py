"""Random guests: each is a loop over pieces drawn from `PIECES`, with a handler that skips what faulted.

Two of them share the CPU in slices so short that most end in the middle of something.
"""

from __future__ import annotations

from hypothesis import strategies as st

from xenlab import Hypervisor, Machine, boot
from xenlab.hypervisor.schedulers import RoundRobin
from xenlab.hypervisor.trace import Trace

HEAD = """
start:  mov ebx, offset table
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
again:
"""
TAIL = """
        jmp again
with_error:
        add esp, 4
skip:   mov edx, [resume]
        mov [esp], edx
back:   jmp hypercall_page + 32 * __HYPERVISOR_iret
count:  inc dword ptr [counted]
        jmp back
.align 4
resume: .long 0
counted: .long 0
message: .ascii "*"
table:  .byte 0, 0
        .word FLAT_RING1_CS
        .long skip
        .byte 6, 0
        .word FLAT_RING1_CS
        .long skip
        .byte 13, 0
        .word FLAT_RING1_CS
        .long with_error
        .byte 14, 4
        .word FLAT_RING1_CS
        .long with_error
        .byte 0x80, 1
        .word FLAT_RING1_CS
        .long count
        .long 0, 0
buffer: .space 256
"""
RESUME = "mov dword ptr [resume], offset resume_{n}\n"
PIECES = {
    "arithmetic": "add eax, {k}\nimul ebx, eax, {k}\nxor esi, ebx\nrol esi, 3\nsbb edx, esi",
    "string": "cld\nmov ecx, {k}\nmov esi, offset buffer\nmov edi, offset buffer + 64\nrep movsb",
    "fill": "mov ecx, {k}\nmov edi, offset buffer\nrep stosb\nmov ecx, {k}\nrepne scasb",
    "stack": "push {k}\npushfd\npop eax\npop ecx\npush eax\npopfd",
    "float": "fld1\nfldpi\nfaddp st(1), st\nfstp qword ptr [buffer]\nmovd xmm1, eax\npaddd xmm1, xmm1",
    "page fault": RESUME + "mov eax, [0x1000 * {k}]\nresume_{n}:",
    # Faults in the middle: the domain's memory ends there.
    "string fault": RESUME + "mov edi, 0xC00FFFF0\nmov ecx, {k}\nrep stosd\nresume_{n}:",
    "divide": RESUME + "xor ecx, ecx\ndiv ecx\nresume_{n}:",
    "invalid": RESUME + "ud2\nresume_{n}:",
    "port": RESUME + "in al, dx\nresume_{n}:",
    "interrupt": "int 0x80",
    "emulated": "mov eax, cr0\nrdtsc",
    "cpuid": "mov eax, 1\ncpuid",
    "yield": "mov ebx, SCHEDOP_yield\nmov eax, __HYPERVISOR_sched_op\nint 0x82",
    "console": "mov ebx, 0\nmov ecx, 1\nmov edx, offset message\nmov eax, __HYPERVISOR_console_io\nint 0x82",
    "read": "mov ebx, CONSOLEIO_read\nmov ecx, 8\nmov edx, offset buffer\nmov eax, __HYPERVISOR_console_io\nint 0x82",
    "version": "mov ebx, 0\nmov eax, __HYPERVISOR_xen_version\nint 0x82",
    # Behind a jump: a store into the block of code that it stands in is counted twice or once, as the run is cut.
    "self-modifying": "inc dword ptr [changed_{n} + 1]\njmp changed_{n}\nchanged_{n}: mov ebp, {k}\nadd [counted], ebp",
}


def source_of(pieces: list[tuple[str, int]]) -> str:
    body = [PIECES[name].format(n=number, k=value) for number, (name, value) in enumerate(pieces)]
    return HEAD + "\n".join(body) + TAIL


guests = st.lists(st.tuples(st.sampled_from(sorted(PIECES)), st.integers(1, 60)), min_size=1, max_size=12).map(
    source_of
)
pairs = st.tuples(guests, guests)
slices = st.integers(3, 120)


def machine(sources: tuple[str, ...], slice_instructions: int) -> Hypervisor:
    xen = Hypervisor(Machine(8), scheduler=RoundRobin(slice_instructions), trace=Trace())
    for number, source in enumerate(sources):
        boot(xen, source, name=f"guest{number}")
    return xen
