"""From LLVM's relocatable object to the flat image that is placed at one address.

Problem: an object's sections have no addresses, and its code has holes where addresses belong.
Invariant: the image's byte ``i`` is what the guest sees at ``base + i``; each hole is filled or the link fails.
Without the range checks a 16-bit hole would silently keep the low half of an address.
Relocation types: System V ABI, AMD64 supplement; `assembler_process` says why 32-bit code comes in a 64-bit object.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from xenlab.errors import XenlabError

IMAGE_LIMIT = 64 << 20
ADDRESS_SPACE = 1 << 32
SHF_ALLOC = 2
DEFAULT_TEXT_ALIGNMENT = 4  # what LLVM writes for a .text in which nobody asked for more
# Type: bytes of the hole, and whether it holds the distance from the hole.
RELOCATIONS = {
    1: (8, False),
    2: (4, True),
    4: (4, True),
    10: (4, False),
    11: (4, False),
    12: (2, False),
    13: (2, True),
    14: (1, False),
    15: (1, True),
}


class LinkError(XenlabError):
    """The object cannot be made into an image.

    Attributes:
        symbol: the undefined symbol, or "" if it is not about one.
        address: where in the image the hole is, or None.
        labels: the absolute address of each label, if ``address`` is known.
        further: the addresses of the other holes that cannot be filled.
    """

    def __init__(self, problem: str, *, symbol: str = "", address: int | None = None) -> None:
        self.problem, self.symbol, self.address = problem, symbol, address
        self.labels: dict[str, int] = {}
        self.further: list[int] = []
        super().__init__(problem)


@dataclass(frozen=True, slots=True)
class Image:
    """Linked code: the bytes for ``base``, and the absolute address of each label."""

    code: bytes
    labels: dict[str, int]


@dataclass(slots=True)
class _Layout:
    elf: Any
    base: int
    addresses: dict[int, int] = field(default_factory=dict)
    end: int = 0

    def value(self, symbol: Any) -> int:
        """A symbol's absolute address or constant. Raises LinkError if it is defined nowhere."""
        section = symbol["st_shndx"]
        if section in self.addresses:
            return self.addresses[section] + int(symbol["st_value"])
        if section == "SHN_ABS" or not symbol.name:  # the nameless one stands for a jump to a fixed address
            return int(symbol["st_value"])
        raise LinkError(f"the symbol '{symbol.name}' is not defined", symbol=symbol.name)


def link(elf_object: bytes, base: int) -> Image:
    """Lay out the allocated sections from ``base`` on and fill in their relocations.

    ``.text`` comes first, the others follow in the order in which the source first names them.

    Raises:
        LinkError: an undefined symbol, an address that does not fit its hole, an image over 64 MiB or past 4 GiB.
    """
    from elftools.elf.elffile import ELFFile

    elf = ELFFile(BytesIO(elf_object))
    layout = _place(elf, base)
    code = bytearray(layout.end - base)
    for index, start in layout.addresses.items():
        section = elf.get_section(index)
        if section["sh_type"] != "SHT_NOBITS":
            code[start - base : start - base + section["sh_size"]] = section.data()
    _relocate(layout, code)
    return Image(bytes(code), _labels(layout))


def _place(elf: Any, base: int) -> _Layout:
    layout = _Layout(elf, base, end=base)
    sections = [(i, s) for i, s in enumerate(elf.iter_sections()) if s["sh_flags"] & SHF_ALLOC]
    for index, section in sorted(sections, key=lambda pair: pair[1].name != ".text"):
        alignment = max(section["sh_addralign"], 1)
        if not section["sh_size"] or (layout.end == base and alignment <= DEFAULT_TEXT_ALIGNMENT):
            alignment = 1
        elif layout.end == base and base % alignment:
            raise LinkError(f"section {section.name} asks for alignment {alignment:#x}, but the base is {base:#x}")
        layout.addresses[index] = -(-layout.end // alignment) * alignment
        layout.end = layout.addresses[index] + section["sh_size"]
    _check_size(base, layout.end)
    return layout


def _check_size(base: int, end: int) -> None:
    if end - base > IMAGE_LIMIT:
        raise LinkError(f"the image would have {end - base:#x} bytes; the limit is {IMAGE_LIMIT:#x} (64 MiB)")
    if end > ADDRESS_SPACE:
        raise LinkError(f"the image would end at {end:#x}, above the 4 GiB that 32 bits can address")


def _labels(layout: _Layout) -> dict[str, int]:
    table = layout.elf.get_section_by_name(".symtab")
    symbols = table.iter_symbols() if table else ()
    return {s.name: layout.value(s) for s in symbols if s.name and s["st_shndx"] in layout.addresses}


def _holes(layout: _Layout) -> Iterator[tuple[Any, int, Any]]:
    """Each relocation of an allocated section, with its address and its symbol."""
    for section in layout.elf.iter_sections():
        start = layout.addresses.get(section["sh_info"]) if section["sh_type"] == "SHT_RELA" else None
        if start is not None:
            table = layout.elf.get_section(section["sh_link"])
            for relocation in section.iter_relocations():
                yield relocation, start + relocation["r_offset"], table.get_symbol(relocation["r_info_sym"])


def _relocate(layout: _Layout, code: bytearray) -> None:
    errors: list[LinkError] = []
    for relocation, address, symbol in _holes(layout):
        try:
            content = _content(layout, relocation, address, symbol)
        except LinkError as error:
            errors.append(error)
        else:
            code[address - layout.base : address - layout.base + len(content)] = content
    if errors:
        errors[0].labels = _labels(layout)
        errors[0].further = [error.address for error in errors[1:] if error.address is not None]
        raise errors[0]


def _content(layout: _Layout, relocation: Any, address: int, symbol: Any) -> bytes:
    """What the hole at ``address`` is to hold."""
    kind = relocation["r_info_type"]
    if kind not in RELOCATIONS:
        raise LinkError(f"relocation type {kind} of '{symbol.name}' is not one of a flat image", address=address)
    size, relative = RELOCATIONS[kind]
    try:
        target = layout.value(symbol)
    except LinkError as error:
        raise LinkError(error.problem, symbol=error.symbol, address=address) from None
    return _fitted(target + relocation["r_addend"] - (address if relative else 0), size, relative, address)


def _fitted(value: int, size: int, relative: bool, address: int) -> bytes:
    """``value`` in ``size`` bytes; addresses wrap at 4 GiB, smaller holes must hold the value."""
    modulus = 1 << 8 * size
    if size < 4 and not -modulus // 2 <= value < (modulus // 2 if relative else modulus):
        what = "the distance" if relative else "the value"
        raise LinkError(f"{what} {value:#x} does not fit into {8 * size} bits", address=address)
    return (value % modulus).to_bytes(size, "little")
