"""Trying addresses, from a guest in machine code: reads and writes from ring 1 and from ring 3, one after the other.

The guest's kernel goes through a table of probes in its second page.  What succeeds and what faults, with which error
code at which address, it writes back into the table, where the judge finds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import Domain
from xenlab.machine.memory import PAGE_SHIFT, PAGE_SIZE
from xenlab.machine.paging import PRESENT

# Where in a page ring 1 and ring 3 write.
KERNEL_WORD, USER_WORD = 0xFF4, 0xFF0
# Of the kernel's pages: code, the table of probes, the stack.
CODE_PAGE, PROBES_PAGE, STACK_PAGE = 0, 1, 2
STACK_TOP = 0xF00
_BYTES, _LAST, _BUDGET = 20, 4, 100_000
MOST_PROBES = USER_WORD // _BYTES - 1
_NOT_RUN, _DONE, _FAULT, _OTHER = 0, 1, 0x100, 0x200

PROBER = """
start:  mov ebx, offset trap_table
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
        mov ebx, FLAT_RING1_SS
        mov ecx, STACK
        mov eax, __HYPERVISOR_stack_switch
        int 0x82
        mov eax, FLAT_RING3_DS
        mov ds, eax
        mov es, eax
        mov edi, PROBES
next:   mov esp, STACK
        mov ebx, [edi]
        mov ecx, [edi + 4]
        mov edx, [edi + 8]
        cmp ecx, 4
        je finish
        test ecx, 2
        jnz outside
        test ecx, 1
        jnz store
        mov eax, [ebx]
        jmp done
store:  mov [ebx], edx
done:   mov dword ptr [edi + 12], 1
        mov [edi + 16], eax
        add edi, 20
        jmp next
outside:
        push FLAT_RING3_SS
        push 0
        push 0x202
        push FLAT_RING3_CS
        push PROGRAM
        iretd
fault:  pop eax
        or eax, 0x100
        mov [edi + 12], eax
        mov eax, cr2
        mov [edi + 16], eax
        add edi, 20
        jmp next
other:  mov dword ptr [edi + 12], 0x200
        add edi, 20
        jmp next
finish: mov ebx, SCHEDOP_shutdown
        mov ecx, offset reason
        mov eax, __HYPERVISOR_sched_op
        int 0x82
reason: .long SHUTDOWN_poweroff
        .align 8
trap_table:
        .byte 14, 0
        .word FLAT_RING1_CS
        .long fault
        .byte 13, 0
        .word FLAT_RING1_CS
        .long other
        .byte 6, 0
        .word FLAT_RING1_CS
        .long other
        .byte 0x80, 3
        .word FLAT_RING1_CS
        .long done
        .long 0, 0
"""
APPLICATION = """
        test ecx, 1
        jnz store
        mov eax, [ebx]
        int 0x80
store:  mov [ebx], edx
        int 0x80
"""


class Access(IntEnum):
    """What a probe does: bit 0 a write, bit 1 from ring 3."""

    READ = 0
    WRITE = 1
    USER_READ = 2
    USER_WRITE = 3

    def __str__(self) -> str:
        return f"ring {3 if self & 2 else 1} {'writes' if self & 1 else 'reads'}"


@dataclass(frozen=True, slots=True)
class Probe:
    """One access that the guest tries.

    Attributes:
        about: the region, or what else, for people.
        address, access: what is tried.
        error: the page fault's error code that it must raise, None if it must succeed.
        value: the word that must be read, None for any.
        mfn: the machine frame in which a word that is written must stand.
        ignore: bits of what is read that do not matter.
    """

    about: str
    address: int
    access: Access
    error: int | None = None
    value: int | None = None
    mfn: int = 0
    ignore: int = 0

    def wish(self) -> str:
        """What is expected, in words."""
        if self.error is not None:
            return f"a page fault with error code {self.error}"
        if self.access & Access.WRITE:
            return f"the word to be stored in machine frame {self.mfn:#x}"
        if self.value is None:
            return "it to succeed"
        return f"{self.value:#010x}" + (" (accessed and dirty may be set too)" if self.ignore else "")


class Prober:
    """Lets a guest try probes.

    Args:
        xen, domain: the machine and the guest, built and paused.
        table: machine address of the page of probes.
    """

    def __init__(self, xen: Hypervisor, domain: Domain, table: int) -> None:
        self._xen, self._domain, self._table = xen, domain, table

    def run(self, probes: list[Probe]) -> list[str]:
        """For each probe what was not as expected, in words; empty if all was."""
        assert len(probes) <= MOST_PROBES, len(probes)
        memory = self._xen.memory
        for number, probe in enumerate(probes):
            words = (probe.address, probe.access, _written(number), _NOT_RUN, 0)
            memory.write(self._table + _BYTES * number, b"".join(word.to_bytes(4, "little") for word in words))
        memory.write(self._table + _BYTES * len(probes) + 4, _LAST.to_bytes(4, "little"))
        self._xen.unpause(self._domain)
        self._xen.run(_BUDGET)
        return [self._problem(number, probe) for number, probe in enumerate(probes)]

    def _problem(self, number: int, probe: Probe) -> str:
        words, at = self._xen.memory.words, self._table + _BYTES * number + 12 >> 2
        status, found = words[at], words[at + 1]
        wanted = _DONE if probe.error is None else _FAULT | probe.error
        if status == wanted and self._is_right(number, probe, found):
            return ""
        asked = f"{probe.access} at {probe.address:#010x} ({probe.about})"
        return f"{asked}: expected {probe.wish()}, found {self._found(status, found, probe)}"

    def _is_right(self, number: int, probe: Probe, found: int) -> bool:
        if probe.error is not None:
            return found == probe.address
        if probe.access & Access.WRITE:
            place = (probe.mfn << PAGE_SHIFT) + probe.address % PAGE_SIZE
            return self._xen.memory.words[place >> 2] == _written(number)
        return probe.value is None or not (probe.value ^ found) & ~probe.ignore

    def _found(self, status: int, found: int, probe: Probe) -> str:
        if status == _NOT_RUN:
            report = self._domain.report
            return f"that it was not tried: {report.splitlines()[0] if report else 'the guest was still busy before'}"
        if status == _OTHER:
            return "another exception than a page fault"
        if status & _FAULT:
            where = "" if found == probe.address else f" at {found:#x}"
            return f"a page fault with error code {status & 0xFF}{where}{self._walk(probe.address)}"
        if probe.error is not None:
            return f"that it was allowed{self._walk(probe.address)}"
        if probe.access & Access.WRITE:
            return f"that it went elsewhere{self._walk(probe.address)}"
        return f"{found:#010x}{self._walk(probe.address)}"

    def _walk(self, address: int) -> str:
        """The entries on the way to an address, on a line of their own."""
        mode, table, parts = self._domain.mode, self._domain.vcpus[0].state.cr3, list[str]()
        for level in mode.levels:
            entry = mode.read(self._xen.memory, table, level.index(address))
            parts.append(f"{level.name}[{level.index(address)}] = {entry:#x}")
            if not entry & PRESENT:
                break
            table = mode.frame_of(entry) << PAGE_SHIFT
        return f"\nthe walk there: {', '.join(parts)}"


def _written(number: int) -> int:
    return 0x5EED_0000 | number


__all__ = ["Access", "Probe", "Prober"]
