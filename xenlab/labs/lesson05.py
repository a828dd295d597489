"""Scenes of lesson 05: page tables that the hypervisor has validated (paper 3.3.3).

`Obedient` is a guest that makes the updates you ask it for, one at a time.  `refused_updates` tries what must not be.
`batching` measures what a batch saves.  `queueing` runs a guest that forgets to flush its queue of updates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xenlab import guests
from xenlab.abi.numbers import MmuextOp
from xenlab.hypervisor.auditor import audit, describe_entry
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.frames import FrameType
from xenlab.hypervisor.page_entries import Use
from xenlab.hypervisor.page_types import GRANTED, VALIDATE
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.labs.obedient import READ_ONLY, TABLE, WRITABLE, Answer, Obedient, Page
from xenlab.machine.machine import Machine
from xenlab.machine.memory import PAGE_SHIFT
from xenlab.machine.paging import GLOBAL, PRESENT, PSE, RW, USER
from xenlab.timeline import Timeline
from xenlab.toolstack import boot
from xenlab.views.audit import audit_report
from xenlab.views.picture import table
from xenlab.views.refusals import TYPE_NAMES
from xenlab.views.story import describe, last_steps

_MACHINE_MIB = 8
_SLOT, _HYPERVISOR_SLOT = 700, 1020
_UNCACHED = 0x10


def tables_timeline() -> Timeline:
    """The guest ``tables``, booted and at its first instruction, with a way forward and back."""
    xen = Hypervisor(Machine(_MACHINE_MIB), trace=Trace())
    boot(xen, guests.source("tables"), name="tables")
    return Timeline(xen)


def describe_frames(xen: Hypervisor, domid: int) -> str:
    """How many frames of a domain have which type, and how often they are used."""
    frames = xen.frames
    mine = frames.owned_by(domid)
    rows = []
    for kind in FrameType:
        found = [mfn for mfn in mine if frames.type[mfn] == kind]
        if found:
            uses = sorted({frames.uses[mfn] for mfn in found})
            rows.append((TYPE_NAMES[kind], str(len(found)), ", ".join(map(str, uses))))
    return table(("type", "frames", "uses of each"), rows)


def entries(guest: Obedient, mfn: int, indices: Sequence[int]) -> str:
    """Some entries of a table, in words."""
    lines = [f"{index:>5}  {describe_entry(guest.mode, guest.entry_at(mfn, index))}" for index in indices]
    return "\n".join(lines)


def new_table(guest: Obedient, number: int, pages: Sequence[Page]) -> Page:
    """Page ``number`` of the guest's filled as an l1 table of ``pages``; it is still a writable page."""
    page = guest.page(number)
    guest.fill(page, [(index, guest.mode.entry(found.mfn, WRITABLE)) for index, found in enumerate(pages)])
    return page


Attempt = Callable[[Obedient], Answer]


def _leaf(entry_of: Callable[[Obedient], int]) -> Attempt:
    """An attempt to put an entry into a free place of the guest's l1 table."""
    return lambda guest: guest.update(guest.leaf, 300, entry_of(guest))


def _root(entry_of: Callable[[Obedient], int]) -> Attempt:
    return lambda guest: guest.update(guest.root, _SLOT, entry_of(guest))


def _prepared(guest: Obedient, entry: int) -> int:
    """A table that the guest cannot write to any more, with one entry; as an entry of the root."""
    page = guest.page(0)
    guest.fill(page, [(5, entry)])
    guest.make_read_only(page)
    return guest.mode.entry(page.mfn, TABLE)


ATTEMPTS: dict[str, Attempt] = {
    "a page table, to be written": _leaf(lambda guest: guest.mode.entry(guest.leaf, WRITABLE)),
    "a frame of the neighbour's": _leaf(lambda guest: guest.mode.entry(guest.neighbour, READ_ONLY)),
    "a frame of the hypervisor's": _leaf(lambda guest: guest.mode.entry(guest.xen.frames.m2p_frames.start, READ_ONLY)),
    "a frame beyond the end of memory": _leaf(lambda guest: guest.mode.entry(0xFFFFF, READ_ONLY)),
    "a page that is not cached": _leaf(lambda guest: guest.mode.entry(guest.page(0).mfn, WRITABLE | _UNCACHED)),
    "a page for all address spaces": _leaf(lambda guest: guest.mode.entry(guest.page(0).mfn, WRITABLE | GLOBAL)),
    "4 MB at once": _root(lambda guest: guest.mode.entry(guest.page(0).mfn, TABLE | PSE)),
    "a table that can still be written": _root(lambda guest: guest.mode.entry(guest.page(0).mfn, TABLE)),
    "a table of the neighbour's": _root(lambda guest: guest.mode.entry(guest.neighbour, TABLE)),
    "a table with a neighbour's page in it": _root(
        lambda guest: _prepared(guest, guest.mode.entry(guest.neighbour, WRITABLE))
    ),
    "the root itself, to be written": _root(lambda guest: guest.mode.entry(guest.root, TABLE)),
    "an entry of the hypervisor's range": lambda guest: guest.update(guest.root, _HYPERVISOR_SLOT, 0),
    "an entry of the neighbour's table": lambda guest: guest.mmu_update((guest.pointer(guest.neighbour, 0), 0)),
    "the l1 table as a root": lambda guest: guest.extended(MmuextOp.NEW_BASEPTR, guest.leaf),
}


def refused_updates() -> str:
    """Each of `ATTEMPTS` in a guest of its own: the answer, the reason; and how often the auditor was content then."""
    lines, content = list[str](), 0
    for what, attempt in ATTEMPTS.items():
        guest = Obedient()
        answer, _colon, why = str(attempt(guest)).partition(": ")
        lines += [f"{what:<40}{answer}", f"    {why}"]
        content += not audit(guest.xen)
    return "\n".join([*lines, "", f"The auditor was content after {content} of {len(ATTEMPTS)}."])


def read_through(guest: Obedient, address: int) -> str:
    """What the guest finds at an address, or its fault."""
    answer = guest.load(address)
    return f"{address:#x}: {answer}" if answer.fault is not None else f"{address:#x}: {answer.result:#x}"


class Trusting:
    """A validator that refuses nothing: for seeing what the auditor says then."""

    def __init__(self) -> None:
        self._types: dict[int, int] = {}

    def entry(self, level: str, flags: int, _domid: int, _owner: int) -> int:
        """What the entry asks for, whatever that is."""
        return {"l1": Use.WRITE if flags & RW else Use.READ, "l2": Use.L1, "l3": Use.L2}[level]

    def take(self, mfn: int, use: int) -> int:
        """Granted; a frame that becomes a table or descriptors is reported as new."""
        if use in (Use.READ, Use.WRITE) or self._types.get(mfn) == use:
            return GRANTED
        self._types[mfn] = use
        return VALIDATE

    def drop(self, _mfn: int, _use: int) -> int:
        """Never the last."""
        return 0


# Batching.

_BATCH = """
        .set BASE, 0xc0000000
        .set FIRST, 512                      # entries of the l1 table that map nothing yet
start:  mov ebp, [esi + 68]                  # the list of machine frames
        mov eax, [esi + 60]                  # the root; the l1 table is behind it
        sub eax, BASE - 4096
        shr eax, 12
        mov edx, [ebp + 4 * eax]
        shl edx, 12
        add edx, 4 * FIRST                   # machine address of the first entry
        mov eax, offset spare
        sub eax, BASE
        shr eax, 12
        mov ecx, [ebp + 4 * eax]
        shl ecx, 12
        or ecx, 0x63
        mov edi, offset updates
        mov eax, {count}
fill:   mov [edi], edx
        mov [edi + 8], ecx
        add edx, 4
        add edi, 16
        dec eax
        jnz fill
again:  mov ebp, offset updates
        mov edi, {calls}
one:    mov ebx, ebp
        mov ecx, {each}
        xor edx, edx
        mov esi, DOMID_SELF
        mov eax, __HYPERVISOR_mmu_update
        int 0x82
        add ebp, 16 * {each}
        dec edi
        jnz one
        jmp again
        .align 16
updates: .fill 4 * {count}, 4, 0
        .align 4096
spare:  .fill 4096, 1, 0
"""
_FILL_INSTRUCTIONS, _PER_UPDATE, _PER_CALL, _PER_ROUND = 15, 6, 9, 3


@dataclass(frozen=True, slots=True)
class BatchCost:
    """Updates of one table in batches.

    Attributes:
        batch: updates in one call.
        traps: calls for all updates.
        update_ns: time of one update; of this host, at this moment.
    """

    batch: int
    traps: int
    update_ns: float


def batching(batches: Sequence[int] = (1, 8, 64, 512), *, count: int = 512, repeat: int = 5) -> list[BatchCost]:
    """The same ``count`` updates in batches of these sizes.

    Args:
        repeat: measurements in turns, of which the quickest counts.
    """
    machines = [_batch_machine(batch, count) for batch in batches]
    lengths = [_PER_CALL * (count // batch) + _PER_ROUND for batch in batches]
    best = [float("inf")] * len(batches)
    for _turn in range(repeat):
        for place, (xen, length) in enumerate(zip(machines, lengths, strict=True)):
            begin = time.perf_counter_ns()
            xen.run(length)
            best[place] = min(best[place], time.perf_counter_ns() - begin)
    return [BatchCost(batch, count // batch, taken / count) for batch, taken in zip(batches, best, strict=True)]


def _batch_machine(batch: int, count: int) -> Hypervisor:
    """A machine whose guest has filled its array and been round once, without a trace that would cost time."""
    xen = Hypervisor(Machine(_MACHINE_MIB))
    boot(xen, _BATCH.format(count=count, calls=count // batch, each=batch), name=f"batches of {batch}")
    xen.run(_FILL_INSTRUCTIONS + _PER_UPDATE * count + _PER_CALL * (count // batch) + _PER_ROUND)
    return xen


# Forgetting to flush.

QUEUE = """
        .set BASE, 0xc0000000
        .set WINDOW, BASE + 600 * 4096       # linear addresses that map nothing yet

start:  mov ebx, offset traps
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
        mov ebp, [esi + 68]                  # the list of machine frames
        mov eax, [esi + 60]                  # the root; the l1 table is behind it
        sub eax, BASE - 4096
        shr eax, 12
        mov edx, [ebp + 4 * eax]
        shl edx, 12
        add edx, 4 * 600                     # machine address of the entry for WINDOW
        mov eax, offset page
        sub eax, BASE
        shr eax, 12
        mov ecx, [ebp + 4 * eax]
        shl ecx, 12
        or ecx, 0x63

        mov [queue], edx                     # write the update down; the hypervisor hears nothing of it
        mov [queue + 8], ecx
        mov dword ptr [queued], 1
touch:  mov eax, [WINDOW]                    # ... and use the page, as if it were there
        mov ebx, SCHEDOP_shutdown
        mov ecx, offset reason
        mov eax, __HYPERVISOR_sched_op
        int 0x82

page_fault:
        cmp dword ptr [queued], 0            # is there anything that I forgot?
        je hopeless
        mov ebx, offset queue
        mov ecx, [queued]
        xor edx, edx
        mov esi, DOMID_SELF
        mov eax, __HYPERVISOR_mmu_update
        int 0x82
        mov dword ptr [queued], 0
        add esp, 4
        iretd                                # try again
hopeless:
        ud2

        .align 8
traps:  .byte 14, 0
        .word FLAT_RING1_CS
        .long page_fault
        .long 0, 0
reason: .long SHUTDOWN_poweroff
queued: .long 0
        .align 16
queue:  .fill 64, 1, 0
        .align 4096
page:   .ascii "here"
        .align 4096
"""


def queueing() -> str:
    """A guest that uses a page before it has sent the update that maps it: what happened, in order."""
    xen = Hypervisor(Machine(_MACHINE_MIB), trace=Trace())
    boot(xen, QUEUE, name="forgetful")
    xen.run(1_000)
    told = (Kind.TRAP, Kind.DELIVER, Kind.HYPERCALL, Kind.DOMAIN)
    steps = [step for step in last_steps(xen, 40) if step.event.kind in told and step.event.time]
    return table(("time", "event"), [(f"{step.event.time:,}", describe(xen, step)) for step in steps])


def linear_address(slot: int, address: int) -> int:
    """Where the entry that maps ``address`` is seen, when entry ``slot`` of the root names the root itself."""
    return (slot << 22) + (address >> PAGE_SHIFT) * 4


__all__ = [
    "ATTEMPTS",
    "PRESENT",
    "QUEUE",
    "READ_ONLY",
    "TABLE",
    "USER",
    "WRITABLE",
    "BatchCost",
    "MmuextOp",
    "Obedient",
    "Trusting",
    "audit_report",
    "batching",
    "describe_frames",
    "entries",
    "linear_address",
    "new_table",
    "queueing",
    "read_through",
    "refused_updates",
    "tables_timeline",
]
