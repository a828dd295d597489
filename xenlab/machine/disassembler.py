"""Machine code back into Intel syntax, with Capstone.

Problem: a guest's code holds data and broken instructions too, and a listing must not stop at them.
Invariant: the instructions' bytes, joined, are the bytes that went in, with no gap and no overlap.
Without it, a view that marks the current instruction would mark the wrong one after the first odd byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

WINDOW = 256  # bytes; more than the longest instruction's 15


@dataclass(frozen=True, slots=True)
class Instruction:
    """One decoded instruction, or one undecodable byte as ``.byte 0x..``; ``raw`` has ``size`` bytes."""

    address: int
    size: int
    raw: bytes
    mnemonic: str
    operands: str

    @property
    def text(self) -> str:
        """Mnemonic and operands as the assembler writes them."""
        return f"{self.mnemonic} {self.operands}".rstrip()


def disassemble(code: bytes, address: int, *, count: int | None = None) -> list[Instruction]:
    """Decode 32-bit ``code`` that lies at ``address``: all of it, or the first ``count`` instructions."""
    return list(islice(_decode(bytes(code), address), count))


def _decode(code: bytes, address: int) -> Iterator[Instruction]:
    import capstone  # 0.15 s: only for those who disassemble

    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_32)
    at = 0
    while at < len(code):
        window = at  # Capstone decodes all that it is given before it returns: hand it a little at a time
        for start, size, mnemonic, operands in decoder.disasm_lite(code[at : at + WINDOW], address + at):
            yield Instruction(start, size, code[at : at + size], mnemonic, operands)
            at += size
        if at == window:
            yield Instruction(address + at, 1, code[at : at + 1], ".byte", f"{code[at]:#04x}")
            at += 1
