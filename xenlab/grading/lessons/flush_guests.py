"""Guests of exercise 06: each keeps translations that its page tables no longer hold, and stores through them.

A `Story` writes such a guest down step by step.  It knows how often the TLB has been emptied by then, if every flush
that is needed is made and no other, so a step can be put where the clock stands as it should: just before it begins
again, or where its copy is as far behind as it can be.

After each step the guest tries its old translation.  A page that became a table it stores to itself.  To a page that
it gave up it has the hypervisor write, which follows a guest's pointers by the same translations as the CPU.  (The
emulated CPU empties its TLB when it has to forget a freed frame's code, as a CPU may at any time; the hypervisor's
own translations stay.)  Where it is stopped, it prints ``.`` and goes on; where something was written, it prints
``!`` and ends, and leaves what it did for the auditor to find.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from xenlab.abi.structures import StartInfo
from xenlab.grading.flush_slot import NOT_MAPPED, FlushClock
from xenlab.hypervisor.tlb import FREED, RETYPED
from xenlab.machine.memory import PAGE_SHIFT
from xenlab.toolstack.image import SOURCE_BASE

STOPPED, LANDED = ".", "!"
# Pages of the guest's that nobody needs: the upper half of its 1 MiB.
_FIRST, _END = 0x80, 0x100
# The TLB is emptied once when the guest is given the CPU.
_AT_START = 1
# Where in a page the guest stores an entry.
_PLACE = 28


@dataclass(frozen=True, slots=True)
class Step:
    """One question that the guest brings about.

    Attributes:
        reason: `RETYPED` or `FREED`.
        story: what the guest did before.
        left, now: how often the TLB had been emptied when the mapping went away, or NOT_MAPPED, and by the time
            of the question, if all answers before were right.
    """

    reason: str
    story: str
    left: int
    now: int


class Story:
    """A guest that is being written.

    Attributes:
        clock: as the part is told of it.
        count: how often the TLB has been emptied so far.
        steps: the questions so far.
    """

    def __init__(self, clock: FlushClock) -> None:
        self.clock, self.count = clock, _AT_START
        self.steps: list[Step] = []
        self._pfn, self._flushes = _FIRST, 0
        self._lines: list[str] = []

    def source(self) -> str:
        """The assembly of the guest."""
        return "\n".join([_BEGIN, *self._lines, _END_AND_SUBROUTINES])

    def table(self, since: int = 0) -> Story:
        """A page is made read-only, the TLB is emptied ``since`` times, and the page becomes a table."""
        page, slot = self._next_page()
        left = self._do(_READ_ONLY.format(page=page, slot=slot), since)
        self._lines.append(_PIN.format(slot=slot))
        self._asked(RETYPED, f"page {page:#x} was made read-only and becomes a page table", left)
        self._lines.append(_TRY_TO_STORE.format(place=page + _PLACE, slot=slot, label=f"tried{len(self.steps)}"))
        return self

    def given_up(self, since: int = 0) -> Story:
        """A page is unmapped, the TLB is emptied ``since`` times, and the page's frame is given up."""
        page, slot = self._next_page()
        left = self._do(_WRITE.format(page=page) + _UNMAP.format(page=page), since)
        self._lines.append(_GIVE_UP.format(slot=slot))
        self._asked(FREED, f"page {page:#x} was unmapped and is given up", left)
        self._try_to_write(page)
        return self

    def given_up_while_mapped(self) -> Story:
        """A page's frame is given up, and the mapping that still held it goes away."""
        page, slot = self._next_page()
        left = self._do(_WRITE.format(page=page) + _GIVE_UP.format(slot=slot) + _UNMAP.format(page=page))
        self._asked(FREED, f"page {page:#x} was given up first and is unmapped now", left)
        self._try_to_write(page)
        return self

    def exchanged(self, since: int) -> Story:
        """A page is unmapped and, later, exchanged; its new frame, never mapped, is made a table and then given up."""
        page, slot = self._next_page()
        left = self._do(_WRITE.format(page=page) + _UNMAP.format(page=page), since)
        self._lines.append(_EXCHANGE.format(slot=slot, pfn=page - SOURCE_BASE >> PAGE_SHIFT))
        self._asked(FREED, f"page {page:#x} was unmapped and is exchanged for another frame", left)
        self._try_to_write(page)
        self._lines.append(_PIN.format(slot="[extent]"))
        self._asked(RETYPED, "a frame that was never mapped becomes a page table", NOT_MAPPED)
        self._lines += [_NOTHING_TO_TRY, _UNPIN, _GIVE_UP.format(slot="[extent]")]
        self._asked(FREED, "a frame that was never mapped is given up", NOT_MAPPED)
        self._lines.append(_NOTHING_TO_TRY)
        return self

    def flush(self, times: int) -> None:
        """Empty the TLB so often, by one way and another in turn."""
        if times:
            way = ("flush_all", "load_the_same_root")[self._flushes % 2]
            self._lines.append(_FLUSHES.format(times=times, way=way, label=f"flush{self._flushes}"))
            self._flushes += 1
            self.count += times

    def where(self, fits: Callable[[int], bool]) -> Story:
        """Empty the TLB until the count fits."""
        most = 2 * self.clock.top * max(self.clock.retyped, self.clock.freed)
        self.flush(next(times for times in range(most) if fits(self.count + times)))
        return self

    def lag(self, reason: str, flushes: int) -> Story:
        """Go to where the copy for a reason is so many flushes behind, within one turn of the clock."""
        return self.where(
            lambda count: count % self.clock.behind(reason) == flushes and not self._has_turned(reason, count)
        )

    def turned(self, reason: str) -> Story:
        """Go to where the clock has begun again and the copy for a reason has not yet."""
        return self.where(lambda count: self._has_turned(reason, count))

    def _has_turned(self, reason: str, count: int) -> bool:
        copied = count - count % self.clock.behind(reason)
        return copied // self.clock.top != count // self.clock.top

    def _next_page(self) -> tuple[int, str]:
        """The address of a page that was not used yet, and where the guest finds its machine frame."""
        assert self._pfn < _END
        self._pfn += 1
        return SOURCE_BASE + (self._pfn - 1 << PAGE_SHIFT), f"[ebp + {4 * (self._pfn - 1)}]"

    def _do(self, code: str, since: int = 0) -> int:
        """Take a mapping away and empty the TLB so often; the count at which the mapping went away."""
        left = self.count
        self._lines.append(code)
        self.flush(since)
        return left

    def _asked(self, reason: str, story: str, left: int) -> None:
        self.steps.append(Step(reason, story, left, self.count))
        if left != NOT_MAPPED:
            told = self.clock.stamp(reason, left), self.clock.reading(self.count)
            self.count += self.clock.may_be_stale(reason, *told)

    def _try_to_write(self, page: int) -> None:
        self._lines.append(_TRY_TO_WRITE.format(page=page, label=f"tried{len(self.steps)}"))


# In all of these EBP points to the list of machine frames; EDI says whether a store landed.
_BEGIN = f"""
start: mov ebp, [esi + {StartInfo.mfn_list.offset}]
 mov ecx, [esi + {StartInfo.pt_base.offset}]
 sub ecx, {SOURCE_BASE:#x}
 shr ecx, {PAGE_SHIFT}
 mov ecx, [ebp + 4 * ecx]
 mov [load_the_same_root + 4], ecx
 mov ebx, offset traps
 mov eax, __HYPERVISOR_set_trap_table
 int 0x82
"""
_READ_ONLY = """
 mov dword ptr [{page}], 0
 mov ecx, {slot}
 shl ecx, 12
 or ecx, 0x61
 mov ebx, {page}
 call remap
"""
_WRITE = """
 mov ebx, XENVER_extraversion
 mov ecx, {page}
 mov eax, __HYPERVISOR_xen_version
 int 0x82
"""
_UNMAP = """
 mov ebx, {page}
 xor ecx, ecx
 call remap
"""
_FLUSHES = """
 mov edi, {times}
{label}: mov ebx, offset {way}
 call extended
 dec edi
 jnz {label}
"""
_PIN = """
 mov eax, {slot}
 mov [pin + 4], eax
 mov [unpin + 4], eax
 mov ebx, offset pin
 call extended
"""
_UNPIN = """
 mov ebx, offset unpin
 call extended
"""
_GIVE_UP = """
 mov eax, {slot}
 mov [extent], eax
 mov ebx, XENMEM_decrease_reservation
 mov ecx, offset reservation
 mov eax, __HYPERVISOR_memory_op
 int 0x82
"""
_EXCHANGE = """
 mov eax, {slot}
 mov [given], eax
 mov dword ptr [extent], {pfn}
 mov dword ptr [exchange + 40], 0
 mov ebx, XENMEM_exchange
 mov ecx, offset exchange
 mov eax, __HYPERVISOR_memory_op
 int 0x82
"""
# An entry that nobody has checked: the table maps itself, writable.
_TRY_TO_STORE = """
 mov ecx, {slot}
 shl ecx, 12
 or ecx, 0x63
 mov dword ptr [resume], offset {label}
 xor edi, edi
 mov [{place}], ecx
 inc edi
{label}: call verdict
"""
_TRY_TO_WRITE = f"""
 xor edi, edi
{_WRITE}
 test eax, eax
 jnz {{label}}
 inc edi
{{label}}: call verdict
"""
_NOTHING_TO_TRY = " xor edi, edi\n call verdict"
_END_AND_SUBROUTINES = """
finish: mov ebx, SCHEDOP_shutdown
 mov ecx, offset reason
 mov eax, __HYPERVISOR_sched_op
 int 0x82

remap: xor edx, edx
 xor esi, esi
 mov eax, __HYPERVISOR_update_va_mapping
 int 0x82
 ret

extended: mov ecx, 1
 xor edx, edx
 mov esi, DOMID_SELF
 mov eax, __HYPERVISOR_mmuext_op
 int 0x82
 ret

verdict: mov byte ptr [letter], '.'
 test edi, edi
 jz say
 mov byte ptr [letter], '!'
say: mov ebx, CONSOLEIO_write
 mov ecx, 1
 mov edx, offset letter
 mov eax, __HYPERVISOR_console_io
 int 0x82
 test edi, edi
 jnz finish
 ret

stopped: push eax
 mov eax, [resume]
 mov [esp + 8], eax
 pop eax
 add esp, 4
 iret

 .align 16
flush_all: .long MMUEXT_TLB_FLUSH_LOCAL, 0, 0
load_the_same_root: .long MMUEXT_NEW_BASEPTR, 0, 0
pin: .long MMUEXT_PIN_L1_TABLE, 0, 0
unpin: .long MMUEXT_UNPIN_TABLE, 0, 0
reservation: .long extent, 1, 0, 0, DOMID_SELF
exchange: .long given, 1, 0, 0, DOMID_SELF, extent, 1, 0, 0, DOMID_SELF, 0
extent: .long 0
given: .long 0
reason: .long SHUTDOWN_poweroff
resume: .long 0
traps: .byte 14, 0
 .word FLAT_RING1_CS
 .long stopped
 .long 0, 0
letter: .byte 0
"""


__all__ = ["LANDED", "STOPPED", "Step", "Story"]
