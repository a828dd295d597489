"""Numbers in instructions that do not fit: LLVM would cut them without a word.

Problem: LLVM encodes ``mov al, 300`` as ``mov al, 44``, and cuts any number of an instruction to 32 bits.
Invariant: a number written in an instruction, or a constant that stands for one, is in the code unchanged.
Without it, a guest would compute with another number than its source shows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from xenlab.machine.assembler_source import Line, register_bits

NUMBER = r"0x[0-9a-f]+|0b[01]+|\d+"
ANY_NUMBER = re.compile(rf"(?<![\w.$])(?:{NUMBER})(?![\w.$])", re.I)
PLAIN = re.compile(rf"\s*(?P<minus>-?)\s*(?:(?P<number>{NUMBER})|(?:offset\s+)?(?P<name>[a-z_.$][\w.$]*))\s*", re.I)
SIZED = re.compile(r"\b(byte|word|dword)\s+ptr\b", re.I)
BITS = {"byte": 8, "word": 16, "dword": 32}
MACRO = re.compile(r"\s*([\w.$]+)")
WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class Oversized:
    """The number at 0-based ``column`` needs more than ``bits``."""

    text: str
    column: int
    bits: int


def value_of(number: str) -> int:
    """The value of a number as LLVM reads it: 0x, 0b, a leading zero for octal, else decimal; 0 for anything else."""
    base = 0 if number[1:2].lower() in ("x", "b") else 8 if number.startswith("0") else 10
    try:
        return int(number, base)
    except ValueError:
        return 0


def plain_constants(lines: list[Line], symbols: Mapping[str, int]) -> dict[str, set[int]]:
    """The values that each name of a plain number may have; a predefined one is also meant as a negative number."""
    known = {name: {value, value - (1 << WORD_BITS)} for name, value in symbols.items()}
    own: dict[str, set[int]] = {}
    for name, expression in (e for line in lines if (e := line.equate)):
        match = PLAIN.fullmatch(expression)
        plain = match is not None and match["number"]
        own.setdefault(name, set()).add(_signed(match, value_of(match["number"])) if match and plain else 0)
    return known | own


def macros(lines: list[Line]) -> set[str]:
    """The names of the source's macros: what they do with a number is not known."""
    found = (MACRO.match(line.bare, line.operands_at) for line in lines if line.word == ".macro")
    return {match[1].lower() for match in found if match}


def oversized(line: Line, known: Mapping[str, set[int]]) -> Oversized | None:
    """The first number of the instruction in ``line`` that its place cannot hold."""
    if not line.word or line.word.startswith(".") or line.equate:
        return None
    for match in ANY_NUMBER.finditer(line.bare, line.operands_at):
        if value_of(match[0]) >> WORD_BITS:
            return Oversized(match[0], match.start(), WORD_BITS)
    return _oversized_immediate(line, known)


def _oversized_immediate(line: Line, known: Mapping[str, set[int]]) -> Oversized | None:
    operands = line.bare[line.operands_at :].split(",")
    bits, match = _immediate_bits(line.word, operands), PLAIN.fullmatch(operands[-1])
    if not bits or match is None:
        return None
    values = {value_of(match["number"])} if match["number"] else known.get(match["name"], {0})
    if any(-(1 << bits - 1) <= _signed(match, value) < 1 << bits for value in values):
        return None
    spaces = len(operands[-1]) - len(operands[-1].lstrip())
    text = match[0].strip() if match["number"] else f"{match[0].strip()} ({_signed(match, min(values, key=abs))})"
    return Oversized(text, len(line.bare) - len(operands[-1]) + spaces, bits)


def _signed(match: re.Match[str], value: int) -> int:
    return -value if match["minus"] else value


def _immediate_bits(word: str, operands: list[str]) -> int:
    """Bits of the immediate, as far as the first operand tells; else 0."""
    if len(operands) == 1:
        return 16 if word in ("ret", "retf") else 0
    sized = SIZED.search(operands[0])
    return BITS[sized[1].lower()] if sized else register_bits(operands[0].strip())
