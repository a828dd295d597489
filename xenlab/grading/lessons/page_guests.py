"""Guests that change their page tables, one hypercall a step (exercise 05).

A guest has ten spare pages.  It learns its frame numbers from its own list, so a step names a frame by where its number
stands when the guest runs: a word of memory, or a constant for frames that are not the guest's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xenlab.abi.structures import StartInfo
from xenlab.grading.validated import known_frames

PAGES = 10
PAGE = 4096
# Entry for a page to be written, to be read, and of a table.
WRITABLE, READ_ONLY, TABLE = 0x63, 0x61, 0x27
_PLACES = 0xC000_0000 + 300 * PAGE  # linear addresses that map nothing at the start

NOWHERE, HYPERVISORS, FREE_FRAME = "0x3ffff", "16", "[free_frame]"
LEAF, ROOT = "[leaf]", "[root]"
NEIGHBOUR = "[neighbour]"


@dataclass(frozen=True, slots=True)
class Step:
    """One hypercall of a guest.

    Attributes:
        code: assembly that makes it, with whatever has to stand before.
        result: what it has to answer.
        rule: why, in words.
    """

    code: str
    result: int = 0
    rule: str = "the guest may have this"

    def then(self, step: Step) -> Step:
        """This step's code, which makes no hypercall, before another's."""
        return Step(f"{self.code}\n{step.code}", step.result, step.rule)


def own(page: int) -> str:
    """Where the frame number of the guest's spare page stands."""
    return f"[frames + {4 * page}]"


def _entry(register: str, frame: str, flags: int) -> str:
    return f" mov {register}, {frame}\n shl {register}, 12\n or {register}, {flags:#x}"


def map_page(place: int, frame: str, flags: int = WRITABLE) -> Step:
    """``update_va_mapping``: map a frame at one of the free addresses."""
    return _map(f"{_PLACES + place * PAGE:#x}", _entry("ecx", frame, flags))


def unmap(place: int) -> Step:
    """``update_va_mapping``: nothing at one of the addresses any more."""
    return _map(f"{_PLACES + place * PAGE:#x}", " xor ecx, ecx")


def _map(address: str, entry: str) -> Step:
    return Step(
        f"{entry}\n mov ebx, {address}\n xor edx, edx\n mov esi, UVMF_INVLPG\n"
        " mov eax, __HYPERVISOR_update_va_mapping\n int 0x82"
    )


class OWN:
    """The guest's own mapping of a spare page."""

    @staticmethod
    def writable(page: int) -> Step:
        """Make it writable."""
        return _map(f"offset pages + {page * PAGE}", _entry("ecx", own(page), WRITABLE))

    @staticmethod
    def read_only(page: int) -> Step:
        """Make it read-only."""
        return _map(f"offset pages + {page * PAGE}", _entry("ecx", own(page), READ_ONLY))

    @staticmethod
    def gone(page: int) -> Step:
        """Unmap it."""
        return _map(f"offset pages + {page * PAGE}", " xor ecx, ecx")


def fill(page: int, entries: Mapping[int, str], flags: int = WRITABLE) -> Step:
    """Plain stores of entries into a spare page; no hypercall."""
    lines = [
        f"{_entry('eax', frame, flags)}\n mov [pages + {page * PAGE + 4 * index}], eax"
        for index, frame in entries.items()
    ]
    return Step("\n".join(lines))


def hang(slot: int, frame: str, flags: int = TABLE) -> Step:
    """``mmu_update``: an entry of the root."""
    return _update(slot, _entry("ecx", frame, flags))


def take_out(slot: int) -> Step:
    """``mmu_update``: an entry of the root is absent from now on."""
    return _update(slot, " xor ecx, ecx")


def _update(slot: int, entry: str) -> Step:
    return Step(
        f"{entry}\n mov eax, [root]\n shl eax, 12\n add eax, {4 * slot}\n mov [request], eax\n"
        " mov dword ptr [request + 4], 0\n mov [request + 8], ecx\n mov dword ptr [request + 12], 0\n"
        " mov ebx, offset request\n mov ecx, 1\n xor edx, edx\n mov esi, DOMID_SELF\n"
        " mov eax, __HYPERVISOR_mmu_update\n int 0x82"
    )


def pin(frame: str, level: int = 1) -> Step:
    """``mmuext_op``: pin a frame as a table."""
    return _extended(f"MMUEXT_PIN_L{level}_TABLE", frame)


def unpin(frame: str) -> Step:
    """``mmuext_op``: undo it."""
    return _extended("MMUEXT_UNPIN_TABLE", frame)


def new_base(frame: str) -> Step:
    """``mmuext_op``: walk from another root."""
    return _extended("MMUEXT_NEW_BASEPTR", frame)


def _extended(command: str, frame: str) -> Step:
    return Step(
        f" mov eax, {frame}\n mov [request + 4], eax\n mov dword ptr [request], {command}\n"
        " mov ebx, offset request\n mov ecx, 1\n xor edx, edx\n mov esi, DOMID_SELF\n"
        " mov eax, __HYPERVISOR_mmuext_op\n int 0x82"
    )


def set_gdt(frame: str) -> Step:
    """``set_gdt``: a page of empty descriptors."""
    return Step(
        f" mov eax, {frame}\n mov [request], eax\n mov ebx, offset request\n mov ecx, 512\n"
        " mov eax, __HYPERVISOR_set_gdt\n int 0x82"
    )


def give_back(frame: str) -> Step:
    """``memory_op``: the guest gives up a frame; the answer is how many were."""
    return Step(
        f" mov eax, {frame}\n mov [request], eax\n mov ebx, XENMEM_decrease_reservation\n mov ecx, offset reservation\n"
        " mov eax, __HYPERVISOR_memory_op\n int 0x82",
        1,
    )


def guest_source(steps: Sequence[Step]) -> str:
    """A guest that learns its frames, makes the calls in order, and shuts itself down."""
    neighbour, free = known_frames()
    return _GUEST.format(
        pt_base=StartInfo.pt_base.offset,
        mfn_list=StartInfo.mfn_list.offset,
        pages=PAGES,
        steps="\n".join(step.code for step in steps),
        neighbour=neighbour,
        free=free,
        bytes=PAGES * PAGE,
        page=PAGE,
    )


_GUEST = """
start: mov eax, [esi + {mfn_list}]
 mov [p2m], eax
 mov edi, [esi + {pt_base}]
 mov eax, edi
 call frame_of
 mov [root], eax
 lea eax, [edi + {page}]
 call frame_of
 mov [leaf], eax
 mov edi, 0
learn: mov eax, edi
 shl eax, 12
 add eax, offset pages
 call frame_of
 mov [frames + 4 * edi], eax
 inc edi
 cmp edi, {pages}
 jne learn
{steps}
 mov ebx, SCHEDOP_shutdown
 mov ecx, offset reason
 mov eax, __HYPERVISOR_sched_op
 int 0x82
frame_of: sub eax, 0xc0000000
 shr eax, 12
 mov edx, [p2m]
 mov eax, [edx + 4 * eax]
 ret
 .align 16
request: .long 0, 0, 0, 0
reservation: .long request, 1, 0, 0, 0x7ff0
reason: .long SHUTDOWN_poweroff
p2m: .long 0
root: .long 0
leaf: .long 0
neighbour: .long {neighbour}
free_frame: .long {free}
frames: .fill 4 * {pages}, 1, 0
 .align 4096
pages: .fill {bytes}, 1, 0
"""
