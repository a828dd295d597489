from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xenlab.machine.disassembler import Instruction, disassemble


def test_instructions_have_intel_syntax_addresses_and_bytes() -> None:
    assert disassemble(bytes.fromhex("b812000000cd82c3"), 0x1000) == [
        Instruction(0x1000, 5, bytes.fromhex("b812000000"), "mov", "eax, 0x12"),
        Instruction(0x1005, 2, bytes.fromhex("cd82"), "int", "0x82"),
        Instruction(0x1007, 1, b"\xc3", "ret", ""),
    ]


def test_text_joins_mnemonic_and_operands() -> None:
    assert [entry.text for entry in disassemble(b"\x90\x89\xd8", 0)] == ["nop", "mov eax, ebx"]


def test_undecodable_bytes_are_listed_and_decoding_goes_on() -> None:
    listing = disassemble(bytes.fromhex("90 8ef8 90 b8"), 0)
    assert [entry.text for entry in listing] == ["nop", ".byte 0x8e", "clc", "nop", ".byte 0xb8"]


def test_branch_targets_are_absolute() -> None:
    assert disassemble(b"\xeb\xfe", 0x2000)[0].operands == "0x2000"


def test_count_limits_the_listing() -> None:
    assert len(disassemble(b"\x90" * 5000, 0, count=3)) == 3
    assert len(disassemble(b"\x90" * 5000, 0)) == 5000
    assert disassemble(b"\x90", 0, count=0) == []
    assert disassemble(b"", 0) == []


def test_an_instruction_across_a_decoding_window_is_not_cut() -> None:
    listing = disassemble(b"\x90" * 253 + bytes.fromhex("b812000000"), 0)
    assert listing[-1].text == "mov eax, 0x12"


@given(st.binary(max_size=600), st.integers(0, 2**32 - 1024))
def test_listing_covers_every_byte_once(code: bytes, address: int) -> None:
    listing = disassemble(code, address)
    assert b"".join(entry.raw for entry in listing) == code
    at = address
    for entry in listing:
        assert (entry.address, entry.size) == (at, len(entry.raw))
        at += entry.size
