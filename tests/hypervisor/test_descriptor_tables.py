"""The guest's own descriptors: checked, shown to the CPU read-only, changed by hypercall (paper 2.1.1, 3.3.3)."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_bench import FREE_PFN, LISTS, READ_ONLY, Guest, guests

from xenlab import Hypervisor, Machine, boot
from xenlab.abi.numbers import Errno, Hypercall, MmuextOp
from xenlab.errors import HypercallError
from xenlab.hypervisor.auditor import check
from xenlab.hypervisor.descriptor_tables import checked_descriptor
from xenlab.hypervisor.frames import FrameType
from xenlab.hypervisor.layout import segments_end
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.machine.paging import PAE, TWO_LEVEL, PagingMode
from xenlab.machine.segments import Descriptor, flat_code, flat_data

A, B = FREE_PFN, FREE_PFN + 1
END = segments_end(TWO_LEVEL)


class TestCheckedDescriptor:
    def test_what_is_not_present_may_be_anything(self) -> None:
        for value in (0, 0x00CF_1A00_0000_FFFF, 0x0000_0C00_0000_0000, 0xFFFF_7FFF_FFFF_FFFF):
            assert checked_descriptor(value, END) == value

    @pytest.mark.parametrize("make", [flat_code, flat_data])
    def test_ring_0_becomes_ring_1(self, make: Any) -> None:
        assert checked_descriptor(make(0, 0xFFFFF).encode(), END) == make(1, 0xFFFFF).encode()

    @pytest.mark.parametrize("dpl", [1, 2, 3])
    def test_other_rings_stay(self, dpl: int) -> None:
        assert checked_descriptor(flat_code(dpl, 0xFFFFF).encode(), END) == flat_code(dpl, 0xFFFFF).encode()

    def test_the_accessed_bit_is_set(self) -> None:
        plain = flat_data(3, 0xFFFFF).encode() & ~(1 << 40)
        assert checked_descriptor(plain, END) == plain | 1 << 40

    def test_a_segment_ends_where_the_hypervisor_begins(self) -> None:
        for base in (0, 0x1000, 0x123000, 0xC000_0000, END - 0x1000):
            value = Descriptor(base, 0xFFFF_FFFF, flat_data(1).access).encode()
            found = Descriptor.decode(checked_descriptor(value, END))
            assert (found.base, found.base + found.limit) == (base, END - 1)

    @pytest.mark.parametrize("kind", [kind for kind in range(1, 16) if kind != 12])
    def test_system_descriptors_are_refused(self, kind: int) -> None:
        for dpl in range(4):
            value = Descriptor(0x1000, 0x67, 0x80 | dpl << 5 | kind, 0).encode()
            with pytest.raises(HypercallError):
                checked_descriptor(value, END)

    def test_a_segment_that_grows_downwards_is_refused(self) -> None:
        with pytest.raises(HypercallError):
            checked_descriptor(Descriptor(0, 0x1000, 0x80 | 0x70 | 0x06).encode(), END)

    def test_64_bit_code_is_refused(self) -> None:
        with pytest.raises(HypercallError):
            checked_descriptor(flat_code(1, 0xFFFFF).encode() | 1 << 53, END)

    @given(st.integers(0, 2**64 - 1))
    def test_what_is_let_in_is_safe_and_stays_as_it_is(self, value: int) -> None:
        try:
            checked = checked_descriptor(value, END)
        except HypercallError:
            return
        found = Descriptor.decode(checked)
        assert not found.present or (found.dpl >= 1 and (found.is_segment or found.access & 0xF in (0, 12)))
        assert not found.present or not found.is_segment or found.base >= END or found.base + found.limit < END
        assert checked_descriptor(checked, END) == checked


@pytest.fixture
def guest(mode: PagingMode) -> Guest:
    return guests(mode)[0]


def gdt(guest: Guest, *pfns: int, entries: int | None = None) -> int:
    """The result of `set_gdt` with these pages."""
    guest.write(LISTS, b"".join(struct.pack("<I", guest.frames[pfn]) for pfn in pfns))
    return guest.call(Hypercall.set_gdt, LISTS, 512 * len(pfns) if entries is None else entries)


class TestSetGdt:
    def test_frames_become_descriptors(self, guest: Guest) -> None:
        guest.map(A, guest.entry(A, READ_ONLY))
        assert gdt(guest, A) == 0
        frames = guest.xen.frames
        assert frames.type[guest.frames[A]] == FrameType.DESCRIPTORS
        assert guest.map(A, guest.entry(A)) == -Errno.EBUSY
        assert gdt(guest) == 0
        assert frames.type[guest.frames[A]] == FrameType.NONE
        assert guest.map(A, guest.entry(A)) == 0

    def test_a_page_that_is_mapped_writable(self, guest: Guest) -> None:
        guest.map(A, guest.entry(A, READ_ONLY))
        assert gdt(guest, A, B) == -Errno.EINVAL
        assert guest.xen.frames.type[guest.frames[A]] == FrameType.NONE
        assert guest.vcpu.gdt == ()

    def test_too_many(self, guest: Guest) -> None:
        assert gdt(guest, A, entries=14 * 512 + 1) == -Errno.EINVAL
        assert gdt(guest, A, entries=0xFFFF_FFFF) == -Errno.EINVAL

    def test_wild_lists_and_frames(self, guest: Guest) -> None:
        assert guest.call(Hypercall.set_gdt, 0x1000, 512) == -Errno.EFAULT
        for mfn in (guest.root, guest.xen.frames.count, 0, 0xFFFF_FFFF):
            guest.write(LISTS, struct.pack("<I", mfn))
            assert guest.call(Hypercall.set_gdt, LISTS, 1) == -Errno.EINVAL

    def test_bad_contents_are_refused(self, guest: Guest) -> None:
        guest.write(guest.address(A), struct.pack("<Q", Descriptor(0, 0x67, 0x89, 0).encode()))
        guest.map(A, guest.entry(A, READ_ONLY))
        assert gdt(guest, A) == -Errno.EINVAL
        assert guest.xen.frames.type[guest.frames[A]] == FrameType.NONE

    def test_the_same_frame_twice(self, guest: Guest) -> None:
        guest.map(A, guest.entry(A, READ_ONLY))
        assert gdt(guest, A, A) == 0
        assert guest.xen.frames.uses[guest.frames[A]] == 2


class TestUpdateDescriptor:
    VALUE = flat_data(3, 0xFFFFF).encode()

    def change(self, guest: Guest, at: int, value: int) -> int:
        return guest.call(Hypercall.update_descriptor, at, at >> 32, value, value >> 32)

    def test_in_a_descriptor_table_and_in_data(self, guest: Guest) -> None:
        at = guest.frames[A] << 12 | 0x18
        assert self.change(guest, at, self.VALUE) == 0
        guest.map(A, guest.entry(A, READ_ONLY))
        assert gdt(guest, A) == 0
        assert self.change(guest, at, self.VALUE & ~(1 << 40)) == 0
        assert guest.xen.memory.qwords[at >> 3] == self.VALUE

    def test_refused(self, guest: Guest) -> None:
        at = guest.frames[A] << 12
        assert self.change(guest, at + 4, self.VALUE) == -Errno.EINVAL
        assert self.change(guest, at, Descriptor(0, 0x67, 0x89, 0).encode()) == -Errno.EINVAL
        assert self.change(guest, guest.root << 12, self.VALUE) == -Errno.EINVAL
        assert self.change(guest, guest.xen.frames.count << 12, self.VALUE) == -Errno.EINVAL
        assert self.change(guest, guest.xen.shared_pages.descriptors(guest.mode) << 12, self.VALUE) == -Errno.EINVAL


class TestSetLdt:
    @pytest.mark.parametrize(
        ("address", "entries"), [(0xC002_8004, 1), (0xC002_8000, 8193), (0xFBFF_F000, 8192), (0xFFFF_F000, 512)]
    )
    def test_refused(self, guest: Guest, address: int, entries: int) -> None:
        assert guest.extended(MmuextOp.SET_LDT, address, entries) == -Errno.EINVAL

    def test_none_again(self, guest: Guest) -> None:
        assert guest.extended(MmuextOp.SET_LDT, guest.address(A), 8) == 0
        assert guest.extended(MmuextOp.SET_LDT, 0, 0) == 0
        assert guest.vcpu.ldt == (0, 0)


# Descriptors in the page `own`, which is made read-only and used as GDT or LDT.
SEGMENTS = """
start:  mov ebx, offset table
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
        mov eax, [esi + 68]             # mfn_list
        mov edx, offset own
        sub edx, 0xC0000000
        shr edx, 10
        mov eax, [eax + edx]
        mov [frame], eax
        shl eax, 12
        lea ecx, [eax + {flags}]
        mov ebx, offset own
        xor edx, edx
        xor esi, esi
        mov eax, __HYPERVISOR_update_va_mapping
        int 0x82
        {use}
        mov [result], eax
        mov ebp, 0x5AFE
        mov eax, {selector}
        {load}
        mov edx, fs:[0]
done:   jmp done
fault:  pop ebx
end:    jmp end
frame:  .long 0
result: .long 0
operation: .long MMUEXT_SET_LDT, own, 16
table:  .byte 13, 0
        .short FLAT_RING1_CS
        .long fault
        .byte 14, 0
        .short FLAT_RING1_CS
        .long fault, 0, 0
data:   .long 0x600DDA7A
        .align 4096
own:    .long 0, 0
        .quad {descriptor}
        .align 4096
"""
GDT = "mov ebx, offset frame\n mov ecx, 16\n mov eax, __HYPERVISOR_set_gdt\n int 0x82"
LDT = """
        mov ebx, offset operation
        mov ecx, 1
        xor edx, edx
        mov esi, DOMID_SELF
        mov eax, __HYPERVISOR_mmuext_op
        int 0x82
"""


@pytest.fixture(params=[False, True], ids=["probed", "portable"])
def portable(request: pytest.FixtureRequest) -> bool:
    """Each kind of CPU."""
    return bool(request.param)


def load(
    table: str, descriptor: int, mode: PagingMode, portable: bool, flags: int = 0x21, load: str = "mov fs, ax"
) -> Any:
    """The guest's first vCPU after it has used its own table, and the machine."""
    use, selector = (GDT, 8 | 1) if table == "gdt" else (LDT, 12 | 1)
    text = SEGMENTS.format(use=use, selector=selector, descriptor=hex(descriptor), flags=flags, load=load)
    xen = Hypervisor(Machine(4, portable=portable), trace=Trace())
    domain = boot(xen, text, mode=mode)
    xen.run(60)
    check(xen)
    return domain, domain.vcpus[0].state, xen


@pytest.mark.parametrize("table", ["gdt", "ldt"])
def test_the_cpu_loads_the_guests_descriptor(table: str, mode: PagingMode, portable: bool) -> None:
    base = 0xC000_2000
    domain, state, xen = load(table, Descriptor(base, 0xFFF, 0xF2).encode(), mode, portable)
    assert state.eip == domain.symbols["done"], domain.report
    assert state.segment("fs").base == base
    assert xen.guest_memory.read_word(domain.vcpus[0], base) == state.edx
    assert xen.guest_memory.read_word(domain.vcpus[0], domain.symbols["result"]) == 0


@pytest.mark.parametrize("table", ["gdt", "ldt"])
def test_a_ring_0_code_segment_runs_in_ring_1_at_most(table: str, mode: PagingMode, portable: bool) -> None:
    selector = 9 if table == "gdt" else 13
    jump = f"push {selector}\n push offset done\n retf"
    domain, state, _xen = load(table, flat_code(0).encode(), mode, portable, load=jump)
    assert state.eip == domain.symbols["done"], domain.report
    assert state.cpl == 1


@pytest.mark.parametrize("table", ["gdt", "ldt"])
def test_an_absent_segment(table: str, mode: PagingMode, portable: bool) -> None:
    domain, state, _xen = load(table, 0, mode, portable)
    assert state.eip == domain.symbols["end"], domain.report
    assert state.ebx == (8 if table == "gdt" else 12)


def test_an_ldt_page_that_cannot_be_descriptors_faults_at_the_guests_address(mode: PagingMode, portable: bool) -> None:
    """The page stays writable, so it cannot be shown to the CPU."""
    domain, state, xen = load("ldt", flat_data(1).encode(), mode, portable, flags=0x63)
    assert state.eip == domain.symbols["end"], domain.report
    deliver = xen.trace.events(Kind.DELIVER)[-1]
    assert deliver.vector == 14
    assert domain.vcpus[0].control["cr2"] == domain.symbols["own"] + 8


def test_the_guests_table_ends_with_the_guest(mode: PagingMode) -> None:
    domain, _state, xen = load("ldt", flat_data(1).encode(), mode, False)
    free = xen.frames.free_frames
    xen.destroy(domain)
    check(xen)
    assert xen.frames.free_frames == free + 256 + 2


def test_two_formats() -> None:
    assert segments_end(PAE) < segments_end(TWO_LEVEL)
