"""Guest images: what is to be loaded where, read from assembly source or from an ELF file.

An ELF kernel says in its notes what it needs (`notes`), and its segments are placed accordingly: a
segment's physical address, less the offset that the kernel declares, is its place in pseudo-physical memory,
and that begins at the virtual base.  A guest assembled from source gets a fixed layout instead, so that its
ten lines can stay ten.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from struct import Struct
from typing import TYPE_CHECKING, Any

from xenlab.abi import numbers
from xenlab.errors import ImageError
from xenlab.machine.assembler import assemble
from xenlab.machine.memory import PAGE_SIZE
from xenlab.machine.paging import TWO_LEVEL, PagingMode
from xenlab.toolstack.notes import NOTHING_SAID, Notes, check, notes_of

if TYPE_CHECKING:
    from elftools.elf.elffile import ELFFile

# The layout of a guest assembled from source.
SOURCE_BASE = 0xC000_0000
SOURCE_HYPERCALL_PAGE = SOURCE_BASE
SOURCE_SHARED_INFO = SOURCE_BASE + PAGE_SIZE
SOURCE_CODE = SOURCE_BASE + 2 * PAGE_SIZE

ELF_MAGIC = b"\x7fELF"
_MAX_IMAGE = 1 << 30
# An entry of the symbol table, and the types that are addresses of something: none, object, function.
_SYMBOL, _NAMED = Struct("<IIIBBH"), (0, 1, 2)


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
        notes: what the kernel says about itself.
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
    notes: Notes = NOTHING_SAID

    @property
    def start(self) -> int:
        """Linear address of the first section."""
        return min(section.address for section in self.sections)

    @property
    def end(self) -> int:
        """Linear address behind the last section."""
        return max(section.address + section.size for section in self.sections)


def abi_symbols() -> dict[str, int]:
    """The names that every assembled guest can use without defining them."""
    names: dict[str, int] = {f"__HYPERVISOR_{call.name}": call.value for call in numbers.Hypercall}
    names |= {f"SCHEDOP_{command.name.lower()}": command.value for command in numbers.SchedOp}
    names |= {f"SHUTDOWN_{reason.name.lower()}": reason.value for reason in numbers.Shutdown}
    names |= {f"EVTCHNOP_{command.name.lower()}": command.value for command in numbers.EvtchnOp}
    names |= {f"EVTCHNSTAT_{status.name.lower()}": status.value for status in numbers.EvtchnStatus}
    names |= {f"VIRQ_{virq.name}": virq.value for virq in numbers.Virq}
    names |= {f"VCPUOP_{command.name.lower()}": command.value for command in numbers.VcpuOp}
    names |= {f"CALLBACKOP_{command.name.lower()}": command.value for command in numbers.CallbackOp}
    names |= {f"CALLBACKTYPE_{kind.name.lower()}": kind.value for kind in numbers.CallbackType}
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
    notes = notes_of(elf, name)
    check(notes, name)
    sections = tuple(_load_sections(elf, data, name, notes))
    if not sections:
        raise ImageError(f"image {name!r}: nothing to load (no PT_LOAD segment)")
    image = Image(
        name,
        (notes.virt_base or 0) if notes.declared else min(part.address for part in sections) & ~(PAGE_SIZE - 1),
        elf.header["e_entry"] if notes.entry is None else notes.entry,
        sections,
        notes.mode,
        notes.hypercall_page,
        symbols=_symbols(elf),
        notes=notes,
    )
    _check_addresses(image)
    return image


def _check_addresses(image: Image) -> None:
    if image.base % PAGE_SIZE:
        raise ImageError(f"image {image.name!r}: virtual base {image.base:#x} is not at the start of a page")
    if image.start < image.base:
        raise ImageError(f"image {image.name!r}: loads at {image.start:#x}, below its virtual base {image.base:#x}")
    if not image.start <= image.entry < image.end:
        loaded = f"{image.start:#x}..{image.end:#x}"
        raise ImageError(f"image {image.name!r}: entry {image.entry:#x} is outside what is loaded, {loaded}")
    page = image.hypercall_page
    if page is not None and (page % PAGE_SIZE or not image.base <= page < image.end):
        raise ImageError(f"image {image.name!r}: hypercall page {page:#x} is not a page of the image")


def _load_sections(elf: ELFFile, data: bytes, name: str, notes: Notes) -> Iterator[Section]:
    headers = [segment.header for segment in elf.iter_segments("PT_LOAD")]
    shift = _shift(headers, name, notes)
    for header in headers:
        offset, in_file, size = header["p_offset"], header["p_filesz"], header["p_memsz"]
        if offset + in_file > len(data):
            raise ImageError(
                f"image {name!r}: truncated: a segment needs {offset + in_file:#x} bytes of file, found {len(data):#x}"
            )
        if in_file > size or size > _MAX_IMAGE:
            raise ImageError(f"image {name!r}: a segment of {in_file:#x} file bytes claims {size:#x} bytes of memory")
        address = header["p_paddr"] + shift if notes.declared else header["p_vaddr"]
        if not 0 <= address <= 0xFFFF_FFFF - size:
            raise ImageError(f"image {name!r}: a segment would load at {address:#x}, outside 32 bits")
        if size:
            yield Section(address, data[offset : offset + in_file], size)


def _shift(headers: list[Any], name: str, notes: Notes) -> int:
    """From the physical addresses in the file to linear ones."""
    base = notes.virt_base or 0
    if notes.paddr_offset is not None:
        if notes.virt_base is None:
            raise ImageError(f"image {name!r}: has an offset for physical addresses and no virtual base to add to them")
        return base - notes.paddr_offset
    # The default is 0, and the base in the older string.  Who has linked without a thought to physical
    # addresses has them equal to the linear ones; under the default such a kernel could not start at all.
    unthinking = all(header["p_paddr"] == header["p_vaddr"] for header in headers)
    return 0 if notes.legacy or unthinking else base


def _symbols(elf: ELFFile) -> dict[str, int]:
    """Names with addresses, read in one pass: a kernel may have a hundred thousand."""
    table = elf.get_section_by_name(".symtab")
    if table is None or table["sh_type"] != "SHT_SYMTAB":
        return {}
    names, entries = elf.get_section(table["sh_link"]).data(), table.data()
    return {
        names[name : names.index(0, name)].decode("utf-8", "backslashreplace"): value
        for name, value, _size, info, _other, _section in _SYMBOL.iter_unpack(entries[: len(entries) // 16 * 16])
        if name and value and info & 15 in _NAMED
    }
