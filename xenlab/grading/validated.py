"""Running a guest whose page tables a student's part validates, with the auditor behind every hypercall (exercise 05).

Two domains are built, each through the part: a neighbour, which never runs, and the guest.  So the guest has
somebody to attack, and is not domain 0.

The invariant: the run ends at the first hypercall after which the auditor is not content.  What a part has broken
before that is what the report is about; what follows from it is not.
"""

from __future__ import annotations

from functools import cache

from xenlab.abi.numbers import HYPERCALL_VECTOR, Hypercall, MmuextOp
from xenlab.errors import HypercallError, XenlabError
from xenlab.grading.decisions import Unusable
from xenlab.grading.guests import MEMORY_MIB, Call, Run
from xenlab.grading.page_types_slot import PageTypesSlot
from xenlab.hypervisor.auditor import Violation, audit, describe_entry
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import Domain, Vcpu
from xenlab.hypervisor.frames import FREE
from xenlab.hypervisor.trace import Trace
from xenlab.machine.machine import Machine
from xenlab.machine.memory import PAGE_SHIFT, PAGE_SIZE
from xenlab.toolstack import Image, build, image_from_source

_NEIGHBOUR = "stay: jmp stay"
_NEIGHBOURS_PAGE = 100


class _Broken(XenlabError):
    """The auditor is not content."""


def _neighbour() -> Image:
    """The domain that is there to be attacked."""
    return image_from_source(_NEIGHBOUR, "neighbour")


@cache
def known_frames() -> tuple[int, int]:
    """A frame of the neighbour's and a free one, the same in every run: frames are dealt out in a fixed order."""
    xen = Hypervisor(Machine(MEMORY_MIB))
    other, _guest = (build(xen, _neighbour(), memory_mib=1) for _ in range(2))
    return other.frames[_NEIGHBOURS_PAGE], xen.frames.owner.index(FREE)


def run_validated(image: Image, slot: PageTypesSlot, budget: int) -> Run:
    """Build both domains and run the guest to its end, its budget, or the first violation."""
    trace = Trace()
    xen = Hypervisor(Machine(MEMORY_MIB), page_types=slot, trace=trace)
    watch = _Watch(xen, slot)
    problem = ""
    try:
        for each in (_neighbour(), image):
            domain = build(xen, each, memory_mib=1)
        watch.audit()
        xen.cpu.handler = watch.trap
        xen.unpause(domain)
        xen.run(budget)
    except _Broken:
        pass
    except (Unusable, XenlabError) as reason:
        problem = str(reason)
    # A part may say of a frame in use that it is free; then it is ours that stumbles.
    except Exception as stumbled:
        problem = f"after these answers the hypervisor could not go on ({type(stumbled).__name__}: {stumbled})"
    guest = list(xen.domains.values())[-1]
    return Run(xen, guest, trace.events(), problem, watch.calls, slot.questions, watch.violations)


class _Watch:
    """Stands before the hypervisor's entry: writes each hypercall down, and audits after it."""

    def __init__(self, xen: Hypervisor, slot: PageTypesSlot) -> None:
        self._xen, self._slot = xen, slot
        self.calls: list[Call] = []
        self.violations: list[Violation] = []

    def trap(self, vector: int, error: int, address: int) -> None:
        vcpu = self._xen.current
        is_call = vector == HYPERCALL_VECTOR and vcpu is not None
        if is_call and vcpu is not None:
            text, frames = _described(self._xen, vcpu)
            self.calls.append(Call(text, frames, len(self._slot.questions)))
        self._xen.trap(vector, error, address)
        if is_call:
            self.audit()

    def audit(self) -> None:
        self.violations = audit(self._xen)
        if self.violations:
            raise _Broken(str(self.violations[0]))


def _described(xen: Hypervisor, vcpu: Vcpu) -> tuple[str, tuple[int, ...]]:
    """A hypercall in words, with its entries decoded, and the frames that it names."""
    state, domain = vcpu.state, vcpu.domain
    number, address = state.eax, state.ebx
    try:
        if number == Hypercall.update_va_mapping:
            place = f"for {address:#x}"
            return _entry_text("update_va_mapping", domain, place, state.ecx)
        if number == Hypercall.mmu_update:
            low, high, entry, _high = xen.guest_memory.read_words(vcpu, address, 4)
            pointer = low | high << 32
            place = f"{pointer % PAGE_SIZE // domain.mode.entry_size} of frame {pointer >> PAGE_SHIFT:#x}"
            return _entry_text("mmu_update", domain, place, entry)
        if number == Hypercall.mmuext_op:
            command, mfn = xen.guest_memory.read_words(vcpu, address, 2)
            name = MmuextOp(command).name if command in MmuextOp._value2member_map_ else str(command)
            return f"mmuext_op: {name} of frame {mfn:#x}", (mfn,)
        if number == Hypercall.set_gdt:
            mfn = xen.guest_memory.read_word(vcpu, address)
            return f"set_gdt: descriptors in frame {mfn:#x}", (mfn,)
    except HypercallError:
        pass
    return Hypercall(number).name if number in Hypercall._value2member_map_ else f"hypercall {number}", ()


def _entry_text(call: str, domain: Domain, place: str, entry: int) -> tuple[str, tuple[int, ...]]:
    frames = (domain.mode.frame_of(entry),) if entry & 1 else ()
    return f"{call}: entry {place} = {describe_entry(domain.mode, entry)}", frames


__all__ = ["known_frames", "run_validated"]
