"""Guests of lesson 06, which work on the TLB: they walk through pages, change their page tables and forget to flush.

Those that change page tables find in EBP the list of their machine frames and in EDI their root table, behind which
the builder has put the only l1 table; `LIBRARY` is what they share.
"""

from __future__ import annotations

LIBRARY = """
mfn_of: sub eax, 0xc0000000                  # EAX: an address in; its machine frame out
        shr eax, 12
        mov eax, [ebp + 4 * eax]
        ret

entry_of:                                    # EAX: an address in; out: the machine address of its page-table entry
        push eax
        lea eax, [edi + 4096]
        call mfn_of
        shl eax, 12
        pop ecx
        shr ecx, 10
        and ecx, 0xffc
        or eax, ecx
        ret

update: mov [request], eax                   # EAX: where an entry is; EDX: what it is to be
        mov [request + 8], edx
        mov ebx, offset request
        mov ecx, 1
        xor edx, edx
        mov esi, DOMID_SELF
        mov eax, __HYPERVISOR_mmu_update
        int 0x82
        ret

extended:                                    # EBX: a command for mmuext_op
        mov ecx, 1
        xor edx, edx
        mov esi, DOMID_SELF
        mov eax, __HYPERVISOR_mmuext_op
        int 0x82
        ret

print:  mov [letter], al                     # AL: a character
        mov ebx, CONSOLEIO_write
        mov ecx, 1
        mov edx, offset letter
        mov eax, __HYPERVISOR_console_io
        int 0x82
        ret

        .align 16
request: .quad 0, 0
letter:  .byte 0
        .align 4
"""
_BEGIN = """
        .set PT_BASE, 60                     # in start_info, to which ESI points
        .set MFN_LIST, 68
start:  mov ebp, [esi + MFN_LIST]
        mov edi, [esi + PT_BASE]
"""


_WALKER = """
start:  mov edx, {rounds}
again:  mov esi, offset pages
        mov ecx, {pages}
one:    mov eax, [esi]                       # one word from each page
        add esi, 4096
        dec ecx
        jnz one
        dec edx
        jnz again
        mov ebx, SCHEDOP_shutdown
        mov ecx, offset reason
        mov eax, __HYPERVISOR_sched_op
        int 0x82
reason: .long SHUTDOWN_poweroff
        .align 4096
pages:  .skip 4096 * {pages}
"""


def walker(pages: int, rounds: int = 10) -> str:
    """A guest that reads one word of each of so many pages, round after round, and ends."""
    return _WALKER.format(pages=pages, rounds=rounds)


_TWIN = """
start:  mov al, [mine]                       # the same address in both domains
        mov [letter], al
        mov ebx, CONSOLEIO_write
        mov ecx, 1
        mov edx, offset letter
        mov eax, __HYPERVISOR_console_io
        int 0x82
        mov ebx, SCHEDOP_yield
        xor ecx, ecx
        mov eax, __HYPERVISOR_sched_op
        int 0x82
        jmp start
letter: .byte 0
        .align 4096
mine:   .ascii "{letter}"
"""


def twins(letters: str = "ab") -> list[str]:
    """Guests that differ only in the letter that they print, and yield after each."""
    return [_TWIN.format(letter=letter) for letter in letters]


REMAP = (
    _BEGIN
    + """
        call look
        mov eax, offset other                # the window is to lead to another page
        call mfn_of
        shl eax, 12
        or eax, 0x63                         # present, writable, accessed, dirty
        push eax
        mov eax, offset window
        call entry_of
        pop edx
        call update
changed:
        call look
        mov ebx, offset flush
        call extended
flushed:
        call look
over:   mov ebx, SCHEDOP_shutdown
        mov ecx, offset reason
        mov eax, __HYPERVISOR_sched_op
        int 0x82

look:   mov al, [window]                     # print what is seen through the window
        call print
        ret
"""
    + LIBRARY
    + """
flush:  .long MMUEXT_INVLPG_LOCAL, window, 0
reason: .long SHUTDOWN_poweroff
        .align 4096
window: .ascii "a"
        .align 4096
other:  .ascii "b"
"""
)


_ACTION = (
    _BEGIN
    + """
        mov ebx, offset traps
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
        mov dword ptr [rounds], {rounds}
again:
{action}
        dec dword ptr [rounds]
        jnz again
done:   jmp done

skip:   add dword ptr [esp], 2               # behind UD2
        jmp hypercall_page + 32 * __HYPERVISOR_iret
"""
    + LIBRARY
    + """
traps:  .byte 6, 0
        .word FLAT_RING1_CS
        .long skip
        .long 0, 0
rounds: .long 0
command: .long 0, 0, 0
extent: .long 0
reservation: .long extent, 1, 0, 0
        .word DOMID_SELF
        .align 4096
spare:  .skip 4096                           # a page that nobody needs
"""
)
NEIGHBOUR = """
start:  mov ebx, SCHEDOP_yield
        xor ecx, ecx
        mov eax, __HYPERVISOR_sched_op
        int 0x82
        jmp start
"""


def action(body: str, rounds: int = 10) -> str:
    """A guest that does ``body`` so often; semicolons in it end lines.

    EBP and EDI are to be left alone.  The label ``spare`` is a page that nobody needs.
    """
    return _ACTION.format(action=body.replace(";", "\n"), rounds=rounds)


def _map_spare(flags: int) -> str:
    return f"""
        mov eax, offset spare
        call mfn_of
        shl eax, 12
        lea ecx, [eax + {flags:#x}]
        mov ebx, offset spare
        xor edx, edx
        xor esi, esi                         # UVMF_NONE: no flush
        mov eax, __HYPERVISOR_update_va_mapping
        int 0x82
"""


def _command(name: str, argument: str = "") -> str:
    """An `mmuext_op` with an operand that ``argument`` leaves in EAX."""
    return f"""
        {argument}
        mov dword ptr [command], MMUEXT_{name}
        mov [command + 4], eax
        mov ebx, offset command
        call extended
"""


def _call(number: str, ebx: str = "0", ecx: str = "0") -> str:
    return f" mov ebx, {ebx}\n mov ecx, {ecx}\n mov eax, __HYPERVISOR_{number}\n int 0x82\n"


_OF_SPARE = "mov eax, offset spare\n call mfn_of"
_PIN = _command("PIN_L1_TABLE", _OF_SPARE) + _command("UNPIN_TABLE", _OF_SPARE)
READ_ONLY, WRITABLE = _map_spare(0x61), _map_spare(0x63)
FLUSH = _command("TLB_FLUSH_LOCAL")
_NUMBER_OF_SPARE = "mov eax, offset spare\n sub eax, 0xc0000000\n shr eax, 12\n"
_EXCHANGE = f"""
        {_map_spare(0)}
        {_OF_SPARE}
        mov [extent], eax                    # give this frame back
        {_call("memory_op", "XENMEM_decrease_reservation", "offset reservation")}
        {_NUMBER_OF_SPARE}
        mov [extent], eax                    # and have another in its place
        {_call("memory_op", "XENMEM_populate_physmap", "offset reservation")}
        {_NUMBER_OF_SPARE}
        mov ecx, [extent]
        mov [ebp + 4 * eax], ecx
        {_map_spare(0x63)}
"""
# What a guest may do, in words and in assembly, for `flushes_of`.
ACTIONS: dict[str, str] = {
    "ask for the version": _call("xen_version"),
    "have the version written to a page": _call("xen_version", "XENVER_capabilities", "offset spare"),
    "read a control register": " mov eax, cr0\n",
    "take an exception, and return": " ud2\n",
    "change a page-table entry": READ_ONLY + WRITABLE,
    "give up the CPU": _call("sched_op", "SCHEDOP_yield"),
    "load a base pointer": _command("NEW_BASEPTR", "mov eax, edi\n call mfn_of"),
    "flush one page": _command("INVLPG_LOCAL", "mov eax, offset spare"),
    "flush all": FLUSH,
    "make an unmapped page a table": READ_ONLY + _PIN + WRITABLE,
    "flush, and then make it a table": READ_ONLY + FLUSH + _PIN + WRITABLE,
    "give a page back, take another": _EXCHANGE,
}


_SECRET = """
start:  mov ebx, SCHEDOP_block
        xor ecx, ecx
        mov eax, __HYPERVISOR_sched_op
        int 0x82
        jmp start
        .align 4096
secret: .ascii "{text}"
"""
_THIEF = (
    _BEGIN
    + """
        mov ebx, offset traps
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
        mov byte ptr [spare], 0              # the TLB learns that this page may be written
"""
    + READ_ONLY
    + _command("PIN_L1_TABLE", _OF_SPARE)
    + """
        mov dword ptr [spare], {frame:#x} << 12 | 0x61    # a store into a page table!
        mov eax, offset spare
        call mfn_of
        shl eax, 12
        lea edx, [eax + 0x63]
        mov eax, edi
        call mfn_of
        shl eax, 12                          # the first entry of the root: addresses from 0 on
        call update
        mov ebx, CONSOLEIO_write
        mov ecx, {length}
        mov edx, 0
        mov eax, __HYPERVISOR_console_io
        int 0x82
stay:   jmp stay

refused:
        mov al, '-'
        call print
end:    jmp end
"""
    + LIBRARY
    + """
traps:  .byte 14, 0
        .word FLAT_RING1_CS
        .long refused
        .long 0, 0
command: .long 0, 0, 0
        .align 4096
spare:  .skip 4096
"""
)


def secret(text: str) -> str:
    """A guest that sleeps; at its label ``secret``, at the start of a page, stands ``text``."""
    return _SECRET.format(text=text)


def thief(frame: int, length: int) -> str:
    """A guest that tries to print so many bytes of a machine frame that is not its own.

    It has a page made a page table, after it made the mapping of that page read-only and asked for no flush, and
    then stores into it.
    """
    return _THIEF.format(frame=frame, length=length)


_CALLER = """
start:  mov ebp, {calls}
again:  xor ebx, ebx
        mov eax, __HYPERVISOR_xen_version
        int 0x82
        mov esi, offset pages
        mov ecx, {pages}
one:    mov eax, [esi]
        add esi, 4096
        dec ecx
        jnz one
        dec ebp
        jnz again
stay:   jmp stay
        .align 4096
pages:  .skip 4096 * {pages}
"""


def caller(pages: int, calls: int) -> tuple[str, int]:
    """A guest that makes the cheapest hypercall so often and uses so many pages after each, and how long that takes."""
    return _CALLER.format(pages=pages, calls=calls), 1 + calls * (7 + 4 * pages)
