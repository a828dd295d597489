from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenlab.errors import AssemblyError
from xenlab.machine.assembler import assemble


def rejection(source: str, **symbols: int) -> AssemblyError:
    with pytest.raises(AssemblyError) as caught:
        assemble(source, symbols=symbols)
    return caught.value


# source -> column of the number, bits of its place
OVERSIZED = [
    ("mov al, 300", 9, 8),
    ("mov al, -129", 9, 8),
    ("add byte ptr [eax], 0x100", 21, 8),
    ("lock or byte ptr [eax], 256", 25, 8),
    ("cmp ax, 65536", 9, 16),
    ("ret 70000", 5, 16),
    ("mov eax, 0x100000000", 10, 32),
    ("mov eax, -0x80000001", 10, 32),
    ("mov eax, [ebx + 0x1ffffffff]", 17, 32),
    ("mov al, big", 9, 8),
    ("mov al, offset big", 9, 8),
]


@pytest.mark.parametrize(("source", "column", "bits"), OVERSIZED)
def test_number_that_llvm_would_cut_is_refused(source: str, column: int, bits: int) -> None:
    for error in (rejection(source, big=300), rejection(f"{source}\nbig = 300")):
        assert (error.line, error.column) == (1, column)
        assert f"does not fit into the {bits} bits" in error.problem


@settings(max_examples=25)
@given(st.sampled_from([("cl", 8), ("cx", 16), ("ecx", 32)]), st.integers(-(2**33), 2**33))
def test_immediate_is_encoded_whole_or_refused(register: tuple[str, int], value: int) -> None:
    name, bits = register
    source = f"mov {name}, {value}"
    if -(2 ** (bits - 1)) <= value < 2**bits:
        assert assemble(source).code[-bits // 8 :] == (value % 2**bits).to_bytes(bits // 8, "little")
    else:
        assert "does not fit" in rejection(source).problem


def test_what_a_macro_does_with_a_number_is_its_own_affair() -> None:
    source = ".macro both low, value\nmov \\low, \\value & 0xff\n.endm\nboth al, 0x1ff"
    assert assemble(source).code.hex() == "b0ff"


def test_predefined_constant_may_be_meant_as_negative() -> None:
    assert assemble("mov al, minus", symbols={"minus": -1}).code.hex() == "b0ff"
    assert assemble("mov al, -one", symbols={"one": 1}).code.hex() == "b0ff"
