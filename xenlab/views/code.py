"""A guest's code around an address, read from its memory and disassembled.

x86 code can only be decoded forwards from the start of an instruction.  To show what stands
before an address, decoding starts at the nearest name below it, or where the source says that
an instruction starts, and is believed only if it arrives at the address exactly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xenlab.errors import HypercallError
from xenlab.hypervisor.core import Hypervisor
from xenlab.views.story import symbol

if TYPE_CHECKING:
    from xenlab.machine.assembler import Program
    from xenlab.machine.disassembler import Instruction

_REACH, _AHEAD = 160, 64
_LABEL = re.compile(r"^([\w.$]+:)\s+")


@dataclass(frozen=True, slots=True)
class CodeLine:
    """One instruction: address, its bytes in hexadecimal, its text, its place by name, whether it is the one asked for.

    ``source`` is the line of the assembly source whose bytes begin here, where that is known.
    """

    address: int
    raw: str
    text: str
    label: str
    here: bool
    source: str = ""


class CodeReader:
    """Disassembles guests.

    Args:
        sources: assembly source by domain id, for those guests whose source is at hand.
    """

    def __init__(self, xen: Hypervisor, sources: Mapping[int, str] | None = None) -> None:
        self._xen = xen
        self._listings = {domid: _listing(source) for domid, source in (sources or {}).items()}

    def around(
        self, domid: int, address: int, *, before: int = 3, after: int = 4, behind: bool = False
    ) -> list[CodeLine]:
        """Instructions around the one at ``address``, or, if ``behind``, around the one that ends there."""
        earlier = self._earlier(domid, address)
        later = self._decode(domid, address, _AHEAD)
        here = len(earlier) - 1 if behind else len(earlier)
        lines = [self._line(domid, item, place == here) for place, item in enumerate(earlier + later)]
        return lines[max(here - before, 0) : here + after + 1]

    def _earlier(self, domid: int, address: int) -> list[Instruction]:
        for start in self._starts(domid, address):
            found = self._decode(domid, start, address - start)
            if found and all(item.mnemonic != ".byte" for item in found) and self._fits(domid, found, address):
                return found
        return []

    def _fits(self, domid: int, found: list[Instruction], address: int) -> bool:
        # Decoded again with the bytes that follow: an instruction may have been cut off at the address.
        last = found[-1].address
        again = self._decode(domid, last, address - last + 15)
        return bool(again) and again[0].address + again[0].size == address

    def _starts(self, domid: int, address: int) -> list[int]:
        """Places where decoding may begin, the most trustworthy first."""
        domain = self._xen.domains.get(domid)
        names = {at for at in (domain.symbols.values() if domain else ()) if 0 < address - at <= _REACH}
        listing = self._listings.get(domid)
        guesses = [] if listing else list(range(address - 24, address))
        known = {at for at, _line in (listing[0].lines if listing else ()) if 0 < address - at <= _REACH}
        return sorted(known) + sorted(names, reverse=True) + guesses

    def _decode(self, domid: int, address: int, length: int) -> list[Instruction]:
        from xenlab.machine.disassembler import disassemble

        return disassemble(self._read(domid, address, length), address) if length > 0 else []

    def _read(self, domid: int, address: int, length: int) -> bytes:
        """Up to ``length`` bytes; fewer where the guest's mapping ends."""
        domain = self._xen.domains.get(domid)
        if domain is None or not domain.vcpus:
            return b""
        for size in (length, min(length, 0x1000 - address % 0x1000)):
            try:
                return self._xen.guest_memory.read(domain.vcpus[0], address & 0xFFFF_FFFF, size)
            except HypercallError:
                continue
        return b""

    def _line(self, domid: int, item: Instruction, here: bool) -> CodeLine:
        label = symbol(self._xen.domains.get(domid), item.address)
        listing = self._listings.get(domid)
        number = listing[1].get(item.address) if listing else None
        source = f"{number}: {listing[2][number - 1]}" if listing and number else ""
        return CodeLine(item.address, item.raw.hex(" "), item.text, label, here, source)


def _listing(source: str) -> tuple[Program, dict[int, int], list[str]]:
    """The assembled source, line numbers by address, and the lines without comments, for which there is no room."""
    from xenlab.machine.assembler import assemble
    from xenlab.machine.assembler_source import split_lines
    from xenlab.toolstack.image import SOURCE_CODE, abi_symbols

    lines = [_LABEL.sub(r"\1 ", line.kept.strip()) for line in split_lines(source)]
    program = assemble(source, SOURCE_CODE, symbols=abi_symbols())
    return program, dict(program.lines), lines
