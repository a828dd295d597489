"""Guest images: what is to be loaded where, read from assembly source or from an ELF file.

An ELF kernel says what it needs in Xen notes (elfnote.h): where its address space begins, where
it starts, where it wants its hypercall page, which page-table format it was built for.  A
guest assembled from source gets a fixed layout instead, so that its ten lines can stay ten.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from xenlab.abi import numbers
from xenlab.errors import ImageError
from xenlab.machine.assembler import assemble
from xenlab.machine.memory import PAGE_SIZE
from xenlab.machine.paging import PAE, TWO_LEVEL, PagingMode

if TYPE_CHECKING:
    from elftools.elf.elffile import ELFFile

# The layout of a guest assembled from source.
SOURCE_BASE = 0xC000_0000
SOURCE_HYPERCALL_PAGE = SOURCE_BASE
SOURCE_SHARED_INFO = SOURCE_BASE + PAGE_SIZE
SOURCE_CODE = SOURCE_BASE + 2 * PAGE_SIZE

ELF_MAGIC = b"\x7fELF"
_NOTE_ENTRY, _NOTE_HYPERCALL_PAGE, _NOTE_VIRT_BASE, _NOTE_PADDR_OFFSET, _NOTE_PAE_MODE = 1, 2, 3, 4, 9
_MAX_IMAGE = 1 << 30


@dataclass(frozen=True, slots=True)
class Section:
    """Bytes to be placed at a linear address; ``size`` may exceed the data, the rest is zero."""

    address: int
    data: bytes
    size: int


@dataclass(frozen=True, slots=True)
class Image:
    """A guest before it is a domain.

    Attributes:
        name: for people.
        base: linear address of pseudo-physical frame 0.
        entry: where it starts.
        sections: what to load.
        mode: the page-table format that it was built for.
        hypercall_page: where the hypercall page goes, None for nowhere.
        shared_info: where the builder maps the shared-information page, None for nowhere.
        user: linear range that applications in ring 3 may use.
        symbols: labels and their addresses.
    """

    name: str
    base: int
    entry: int
    sections: tuple[Section, ...]
    mode: PagingMode = TWO_LEVEL
    hypercall_page: int | None = None
    shared_info: int | None = None
    user: range = range(0)
    symbols: dict[str, int] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """Linear address behind the last section."""
        return max(section.address + section.size for section in self.sections)


def abi_symbols() -> dict[str, int]:
    """The names that every assembled guest can use without defining them."""
    names: dict[str, int] = {f"__HYPERVISOR_{call.name}": call.value for call in numbers.Hypercall}
    names |= {f"SCHEDOP_{command.name.lower()}": command.value for command in numbers.SchedOp}
    names |= {f"SHUTDOWN_{reason.name.lower()}": reason.value for reason in numbers.Shutdown}
    names |= {f"CONSOLEIO_{command.name.lower()}": command.value for command in numbers.ConsoleIo}
    names |= {f"XENVER_{command.name.lower()}": command.value for command in numbers.XenVersion}
    names |= {f"MMUEXT_{command.name}": command.value for command in numbers.MmuextOp}
    names |= {f"UVMF_{flag.name}": flag.value for flag in numbers.UvmFlags}
    names |= {f"XENMEM_{command.name.lower()}": command.value for command in numbers.MemoryOp}
    names |= {"MMU_NORMAL_PT_UPDATE": 0, "MMU_MACHPHYS_UPDATE": 1, "MMU_PT_UPDATE_PRESERVE_AD": 2}
    names |= {"VMASST_CMD_enable": 0, "VMASST_CMD_disable": 1, "VMASST_TYPE_writable_pagetables": 2}
    names |= {name: getattr(numbers, name) for name in dir(numbers) if name.startswith(("FLAT_RING", "DOMID_"))}
    names |= {"hypercall_page": SOURCE_HYPERCALL_PAGE, "shared_info": SOURCE_SHARED_INFO}
    return names


def image_from_source(source: str, name: str = "guest", mode: PagingMode = TWO_LEVEL) -> Image:
    """Assemble a guest.  It starts at the label ``start`` if there is one, else at its first byte.

    Pages from the label ``user_start`` to ``user_end`` (both page-aligned) can be used from
    ring 3.  The names of `abi_symbols` are predefined.

    Raises:
        AssemblyError: the source has a mistake; the message says where and what to write.
        ImageError: the user pages are not page-aligned.
    """
    program = assemble(source, SOURCE_CODE, symbols=abi_symbols())
    if not program.code:
        raise ImageError(f"guest {name!r}: the source contains no instructions")
    symbols = program.symbols
    user = range(symbols.get("user_start", 0), symbols.get("user_end", symbols.get("user_start", 0)))
    if user.start % PAGE_SIZE or user.stop % PAGE_SIZE:
        raise ImageError(
            f"guest {name!r}: user_start {user.start:#x} and user_end {user.stop:#x} must be page-aligned: "
            f"write .align {PAGE_SIZE} before each"
        )
    return Image(
        name,
        SOURCE_BASE,
        symbols.get("start", SOURCE_CODE),
        (Section(SOURCE_CODE, program.code, len(program.code)),),
        mode,
        SOURCE_HYPERCALL_PAGE,
        SOURCE_SHARED_INFO,
        user,
        dict(symbols),
    )


def image_from_elf(data: bytes, name: str = "guest") -> Image:
    """Read a 32-bit x86 ELF kernel with Xen notes.

    Raises:
        ImageError: not ELF, truncated, of another class or machine, without anything to load,
            or with addresses that contradict each other.
    """
    from elftools.elf.elffile import ELFFile

    if data[:4] != ELF_MAGIC:
        raise ImageError(f"image {name!r}: expected an ELF file, found {data[:4]!r} at its start")
    if len(data) > 4 and data[4] != 1:
        raise ImageError(f"image {name!r}: expected a 32-bit ELF file, found a 64-bit one")
    try:
        elf = ELFFile(io.BytesIO(data))
        if elf.header["e_machine"] != "EM_386":
            raise ImageError(f"image {name!r}: expected machine EM_386, found {elf.header['e_machine']}")
        return _image_of(elf, data, name)
    except ImageError:
        raise
    except Exception as problem:  # the ELF library answers damage with whatever its parsers stumble over
        raise ImageError(f"image {name!r}: truncated or damaged ELF file ({problem})") from None


def load_image(path: Path) -> Image:
    """The image in the ELF file at ``path``.  Raises ImageError, also when it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as problem:
        raise ImageError(f"image {str(path)!r}: cannot be read: {problem.strerror}") from None
    return image_from_elf(data, path.name)


def _image_of(elf: ELFFile, data: bytes, name: str) -> Image:
    notes = dict(_xen_notes(elf))
    base = _number(notes, _NOTE_VIRT_BASE, 0)
    sections = tuple(_load_sections(elf, data, name, base, _number(notes, _NOTE_PADDR_OFFSET, base), notes))
    if not sections:
        raise ImageError(f"image {name!r}: nothing to load (no PT_LOAD segment)")
    start = min(section.address for section in sections)
    image = Image(
        name,
        base if _NOTE_VIRT_BASE in notes else start & ~(PAGE_SIZE - 1),
        _number(notes, _NOTE_ENTRY, elf.header["e_entry"]),
        sections,
        _mode_of(notes),
        _number(notes, _NOTE_HYPERCALL_PAGE, 0) or None,
        symbols=_symbols(elf),
    )
    _check(image)
    return image


def _check(image: Image) -> None:
    low, high = min(section.address for section in image.sections), image.end
    if image.base % PAGE_SIZE:
        raise ImageError(f"image {image.name!r}: virtual base {image.base:#x} is not at the start of a page")
    if low < image.base:
        raise ImageError(f"image {image.name!r}: loads at {low:#x}, below its virtual base {image.base:#x}")
    if not low <= image.entry < high:
        raise ImageError(f"image {image.name!r}: entry {image.entry:#x} is outside what is loaded, {low:#x}..{high:#x}")
    page = image.hypercall_page
    if page is not None and (page % PAGE_SIZE or not image.base <= page < high):
        raise ImageError(f"image {image.name!r}: hypercall page {page:#x} is not a page of the image")


def _load_sections(
    elf: ELFFile, data: bytes, name: str, base: int, paddr_offset: int, notes: dict[int, bytes]
) -> Iterator[Section]:
    for segment in elf.iter_segments("PT_LOAD"):
        header = segment.header
        offset, in_file, size = header["p_offset"], header["p_filesz"], header["p_memsz"]
        if offset + in_file > len(data):
            raise ImageError(
                f"image {name!r}: truncated: a segment needs {offset + in_file:#x} bytes of file, found {len(data):#x}"
            )
        if in_file > size or size > _MAX_IMAGE:
            raise ImageError(f"image {name!r}: a segment of {in_file:#x} file bytes claims {size:#x} bytes of memory")
        address = header["p_paddr"] - paddr_offset + base if _NOTE_VIRT_BASE in notes else header["p_vaddr"]
        if not 0 <= address <= 0xFFFF_FFFF - size:
            raise ImageError(f"image {name!r}: a segment would load at {address:#x}, outside 32 bits")
        if size:
            yield Section(address, data[offset : offset + in_file], size)


def _xen_notes(elf: ELFFile) -> Iterator[tuple[int, bytes]]:
    for segment in elf.iter_segments("PT_NOTE"):
        yield from _notes_in(segment.data())


def _notes_in(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Notes called "Xen": three words (name size, data size, type), then both, 4-byte aligned."""
    at = 0
    while at + 12 <= len(data):
        name_size, size, kind = (int.from_bytes(data[at + n : at + n + 4], "little") for n in (0, 4, 8))
        content = at + 12 + (name_size + 3 & ~3)
        if data[at + 12 : at + 12 + name_size] == b"Xen\0":
            yield kind, data[content : content + size]
        at = content + (size + 3 & ~3)


def _number(notes: dict[int, bytes], kind: int, default: int) -> int:
    return int.from_bytes(notes[kind][:8], "little") if kind in notes else default


def _mode_of(notes: dict[int, bytes]) -> PagingMode:
    value = notes.get(_NOTE_PAE_MODE, b"no")
    return PAE if value.startswith(b"yes") or value[:1] == b"\x01" else TWO_LEVEL


def _symbols(elf: ELFFile) -> dict[str, int]:
    from elftools.elf.sections import SymbolTableSection

    table = elf.get_section_by_name(".symtab")
    if not isinstance(table, SymbolTableSection):
        return {}
    wanted = ("STT_FUNC", "STT_NOTYPE", "STT_OBJECT")
    return {
        symbol.name: symbol["st_value"]
        for symbol in table.iter_symbols()
        if symbol.name and symbol["st_info"]["type"] in wanted and symbol["st_value"]
    }
