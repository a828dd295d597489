"""The typed view over a vCPU's registers."""

from __future__ import annotations

import pytest
from bare_machine import CODE, SELECTORS, Bare
from hypothesis import given, settings
from hypothesis import strategies as st

from xenlab.machine.cpuid import cpuid
from xenlab.machine.engine import GENERAL, SEGMENTS
from xenlab.machine.segments import Descriptor, flat_code, flat_data
from xenlab.machine.state import AC, AF, CF, DF, IF, NT, OF, PF, SF, ZF

FLAGS = [CF, PF, AF, ZF, SF, IF, DF, OF, NT, AC, 1 << 21]


@pytest.mark.parametrize("portable", [False, True])
@settings(max_examples=60)
@given(flags=st.sets(st.sampled_from(FLAGS)))
def test_flags_written_are_flags_read_by_python_and_by_the_guest(portable: bool, flags: set[int]) -> None:
    bare, value = shared(portable), sum(flags) | 2
    bare.state.eflags, bare.state.eip = value, CODE
    assert bare.state.eflags == value
    bare.cpu.run_until(bare.cpu.instructions + 1)
    assert bare.state.eflags == value
    bare.cpu.run_until(bare.cpu.instructions + 1)
    assert bare.state.eax == value
    assert bare.state.eflags == value


_shared: dict[bool, Bare] = {}


def shared(portable: bool) -> Bare:
    """A machine standing at code that reads the flags."""
    if portable not in _shared:
        _shared[portable] = Bare(portable=portable)
        _shared[portable].load("pushfd\npop eax")
    bare = _shared[portable]
    bare.state.esp = 0xA000
    return bare


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize(
    ("code", "flags"),
    [
        ("mov al, 0xff\nadd al, 1", CF | PF | AF | ZF),
        ("mov al, 0x7f\ninc al", OF | SF | AF),
        ("mov al, 0\nsub al, 1", CF | PF | AF | SF),
        ("mov al, 3\nand al, 1", 0),
        ("mov al, 0x80\nshl al, 1", CF | PF | ZF | OF),
        ("stc\nstd", CF | DF),
    ],
)
def test_lazy_flags_are_true_right_after_arithmetic(portable: bool, code: str, flags: int) -> None:
    bare = Bare(portable=portable)
    bare.load(code)
    bare.cpu.run_until(2)
    defined = CF | PF | ZF | SF | OF | DF | (0 if "shl" in code or "and" in code else AF)
    assert bare.state.eflags & defined == flags & defined


@pytest.mark.parametrize("portable", [False, True])
@given(values=st.lists(st.integers(0, 0xFFFF_FFFF), min_size=9, max_size=9))
def test_registers_written_are_registers_read(portable: bool, values: list[int]) -> None:
    state = shared(portable).state
    for name, value in zip((*GENERAL, "eip"), values, strict=True):
        setattr(state, name, value)
    assert state.general() == tuple(values[:8])
    assert state.frame()[:9] == tuple(values)
    assert state.frame()[9] & 3 == state.cpl == 1
    state.set_eax(values[1])
    assert state.eax == values[1]


@pytest.mark.parametrize("portable", [False, True])
def test_loading_segments_changes_the_ring_both_ways(portable: bool) -> None:
    rings = []

    def change(bare: Bare, trap) -> None:
        rings.append(trap.ring)
        ring = 4 - trap.ring
        code, data = SELECTORS[ring]
        bare.state.load_segment("ss", data, flat_data(ring))
        bare.state.load_segment("cs", code, flat_code(ring))

    bare = Bare(portable=portable, handle=change)
    bare.run("1: mov ax, cs\nint 0x40\njmp 1b", 13)
    assert rings == [1, 3, 1, 3]
    assert bare.state.cpl == bare.state.eax & 3 == 1


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("name", ["es", "ds", "fs", "gs"])
def test_a_segment_base_is_added_to_addresses(portable: bool, name: str) -> None:
    bare = Bare(portable=portable)
    bare.memory.words[0x20040 >> 2] = 0x1234_5678
    bare.state.load_segment(name, 0x59, Descriptor(0x20000, 0xFFFF, 0xB3, 0x4))
    bare.load(f"mov eax, {name}:[0x40]\nnop")
    bare.cpu.run_until(1)
    assert bare.state.eax == 0x1234_5678
    segment = bare.state.segment(name)
    assert (segment.selector, segment.base, segment.limit) == (0x59, 0x20000, 0xFFFF)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("selector", [0, 3])
def test_a_null_selector_keeps_its_value(portable: bool, selector: int) -> None:
    bare = Bare(ring=3, portable=portable)
    bare.state.load_segment("gs", selector, None)
    bare.run("mov eax, gs\nud2")
    assert bare.state.eax == selector
    assert bare.state.segment("gs").limit == 0


def test_architectural_names_every_register() -> None:
    names = set(Bare().state.architectural())
    assert {*GENERAL, *SEGMENTS, "eip", "eflags", "cpl", "cr2", "cr3", "st0", "xmm7", "mxcsr", "fpcw"} <= names


@pytest.mark.parametrize(
    "leaf", [0, 1, 2, 0x8000_0000, 0x8000_0001, 0x8000_0002, 0x8000_0004, 0x8000_0008, 0x4000_0000]
)
@pytest.mark.parametrize("portable", [False, True])
def test_cpuid_answers_from_our_table(leaf: int, portable: bool) -> None:
    bare = Bare(ring=3, portable=portable)
    bare.run(f"mov eax, {leaf}\nxor ecx, ecx\ncpuid\nud2")
    state = bare.state
    assert (state.eax, state.ebx, state.ecx, state.edx) == cpuid(leaf, 0)


@given(
    base=st.integers(0, 0xFFFF_FFFF),
    limit=st.integers(0, 0xF_FFFF),
    access=st.integers(0, 255),
    flags=st.integers(0, 15),
)
def test_a_descriptor_has_the_layout_of_the_manual(base: int, limit: int, access: int, flags: int) -> None:
    value = sum(
        (
            (limit & 0xFFFF),
            (base & 0xFFFF) << 16,
            (base >> 16 & 0xFF) << 32,
            access << 40,
            (limit >> 16) << 48,
            flags << 52,
            (base >> 24) << 56,
        )
    )
    found = Descriptor.decode(value)
    assert found == Descriptor(base, limit << 12 | 0xFFF if flags & 8 else limit, access, flags)
    assert found.encode() == value
    assert found.dpl == access >> 5 & 3


def test_flat_segments_are_those_that_every_kernel_uses() -> None:
    assert flat_code(0).encode() == 0x00CF_9B00_0000_FFFF
    assert flat_data(3).encode() == 0x00CF_F300_0000_FFFF
