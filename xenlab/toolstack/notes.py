"""What a kernel says about itself: Xen's ELF notes, or the string that older kernels have instead.

The problem: a kernel that was built elsewhere expects things of whoever loads it: where its address
space begins, where it is entered, where it wants its hypercall page, which page tables it walks.
Xen's answer is a list of notes in the kernel's ELF file (elfnote.h).  Kernels from before the notes carry
one string in the section ``__xen_guest``, such as ``GUEST_OS=linux,VIRT_BASE=0xC0000000,PAE=yes``.

The invariant: either everything that a kernel requires is given to it, or it is refused with the name of what
is missing.  What breaks without it: it starts, and fails somewhere in its first thousand instructions, where
nobody can see why.

Paper 3.4.  The rules for what is absent are those of the header, and where it is silent, of Xen's own
loader (libelf).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xenlab.abi.kernel_notes import LEGACY_SECTION, NOTE_NAME, ElfNote, Feature
from xenlab.errors import ImageError
from xenlab.hypervisor.layout import start_of
from xenlab.machine.memory import PAGE_SHIFT
from xenlab.machine.paging import PAE, TWO_LEVEL, PagingMode

if TYPE_CHECKING:
    from elftools.elf.elffile import ELFFile

# What a kernel may insist on.  Page tables are never its own to write, but its stores to them are carried out.
PROVIDED = frozenset(
    {
        Feature.writable_page_tables,
        Feature.pae_pgdir_above_4gb,
        Feature.mmu_pt_update_preserve_ad,
        Feature.dom0,
        Feature.not_direct_mapped,
    }
)
_INTERFACE, _LOADER, _LINUX = "xen-3.0", "generic", "linux"
_NUMBER_SIZES = (4, 8)


@dataclass(frozen=True, slots=True)
class Notes:
    """What a kernel declared; None, empty or False where it said nothing.

    Attributes:
        declared: whether there were notes, or the older string, at all.
        legacy: whether it was the older string.
        entry: linear address at which it starts.
        virt_base: linear address of pseudo-physical frame 0.
        paddr_offset: what to take off the file's physical addresses.
        hypercall_page: linear address of the page it wants filled with stubs.
        pae: as it was written: ``yes``, ``no``, ``bimodal``.
        guest_os, guest_version, xen_version, loader: as they were written.
        supported: features that it knows what to do with.
        required: names of features that it cannot do without.
        hv_start_low: the lowest address at which it can bear the hypervisor's range to begin.
        init_p2m: where it would like its list of frames; only 64-bit kernels are given that choice.
        suspend_cancel, mod_start_pfn, bsd_symtab: kept, for whoever saves a domain or loads a module.
    """

    declared: bool = False
    legacy: bool = False
    entry: int | None = None
    virt_base: int | None = None
    paddr_offset: int | None = None
    hypercall_page: int | None = None
    pae: str = ""
    guest_os: str = ""
    guest_version: str = ""
    xen_version: str = ""
    loader: str = ""
    supported: frozenset[Feature] = frozenset()
    required: frozenset[str] = frozenset()
    numeric_features: bool = False
    hv_start_low: int | None = None
    init_p2m: int | None = None
    suspend_cancel: bool = False
    mod_start_pfn: bool = False
    bsd_symtab: bool = False

    @property
    def mode(self) -> PagingMode:
        """The page tables that it walks; a kernel for both formats gets the larger one, as under Xen."""
        return PAE if self.pae.startswith(("yes", "bimodal", "\1")) else TWO_LEVEL


NOTHING_SAID = Notes()


def notes_of(elf: ELFFile, name: str) -> Notes:
    """Everything that the kernel in ``elf`` declares.  Raises ImageError where it cannot be understood."""
    found = _xen_notes(elf.iter_segments("PT_NOTE"))
    if not found:
        found = _xen_notes(part for part in elf.iter_sections() if part["sh_type"] == "SHT_NOTE")
    if found:
        return _from_notes(found, name)
    section = elf.get_section_by_name(LEGACY_SECTION)
    return _from_string(section.data(), name) if section is not None else NOTHING_SAID


def check(notes: Notes, name: str, *, privileged: bool = False) -> None:
    """Refuse a kernel that asks for what there is not.  Raises ImageError."""
    if notes.loader and not notes.loader.startswith(_LOADER) and not notes.guest_os.startswith(_LINUX):
        raise ImageError(f"image {name!r}: made for the loader {notes.loader!r}, expected {_LOADER!r}")
    if notes.xen_version and not notes.xen_version.startswith(_INTERFACE):
        raise ImageError(f"image {name!r}: made for the interface {notes.xen_version!r}, expected {_INTERFACE!r}")
    missing = sorted(notes.required - {feature.name for feature in PROVIDED})
    if missing:
        raise ImageError(f"image {name!r}: requires {', '.join(missing)}, which is not provided here")
    start = start_of(notes.mode)
    if notes.hv_start_low is not None and notes.hv_start_low > start:
        raise ImageError(
            f"image {name!r}: expects the hypervisor's range to begin at {notes.hv_start_low:#x} or above, "
            f"it begins at {start:#x}"
        )
    if privileged and notes.numeric_features and Feature.dom0 not in notes.supported:
        raise ImageError(f"image {name!r}: does not declare the feature dom0, so it cannot be the initial domain")


# Notes.


def _xen_notes(parts: Iterable[Any]) -> dict[int, bytes]:
    return {kind: content for part in parts for kind, content in _notes_in(part.data())}


def _notes_in(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Notes called "Xen": three words (name size, data size, type), then both, 4-byte aligned."""
    at = 0
    while at + 12 <= len(data):
        name_size, size, kind = (int.from_bytes(data[at + n : at + n + 4], "little") for n in (0, 4, 8))
        content = at + 12 + (name_size + 3 & ~3)
        if data[at + 12 : at + 12 + name_size] == NOTE_NAME:
            yield kind, data[content : content + size]
        at = content + (size + 3 & ~3)


def _from_notes(found: Mapping[int, bytes], name: str) -> Notes:
    def number(kind: ElfNote) -> int | None:
        return _number(found[kind], kind, name) if kind in found else None

    def text(kind: ElfNote) -> str:
        return _text(found.get(kind, b""))

    supported, required = _features(text(ElfNote.FEATURES))
    bits = number(ElfNote.SUPPORTED_FEATURES)
    return Notes(
        declared=True,
        entry=number(ElfNote.ENTRY),
        virt_base=number(ElfNote.VIRT_BASE),
        paddr_offset=number(ElfNote.PADDR_OFFSET),
        hypercall_page=number(ElfNote.HYPERCALL_PAGE),
        pae=text(ElfNote.PAE_MODE),
        guest_os=text(ElfNote.GUEST_OS),
        guest_version=text(ElfNote.GUEST_VERSION),
        xen_version=text(ElfNote.XEN_VERSION),
        loader=text(ElfNote.LOADER),
        supported=supported | {feature for feature in Feature if (bits or 0) >> feature & 1},
        required=required,
        numeric_features=bits is not None,
        hv_start_low=number(ElfNote.HV_START_LOW),
        init_p2m=number(ElfNote.INIT_P2M),
        suspend_cancel=bool(number(ElfNote.SUSPEND_CANCEL)),
        mod_start_pfn=bool(number(ElfNote.MOD_START_PFN)),
        bsd_symtab=text(ElfNote.BSD_SYMTAB) == "yes",
    )


def _number(data: bytes, kind: ElfNote, name: str) -> int:
    if len(data) not in _NUMBER_SIZES:
        raise ImageError(f"image {name!r}: note {kind.name} has {len(data)} bytes, expected a number of 4 or 8")
    return int.from_bytes(data, "little")


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("ascii", "backslashreplace")


def _features(text: str) -> tuple[frozenset[Feature], frozenset[str]]:
    """The known ones of a list such as ``!writable_page_tables|dom0``, and the names of those with a ``!``."""
    names = [name for name in text.split("|") if name]
    required = frozenset(name[1:] for name in names if name.startswith("!"))
    plain = {name.removeprefix("!") for name in names}
    return frozenset(feature for feature in Feature if feature.name in plain), required


# The older string.


def _from_string(data: bytes, name: str) -> Notes:
    pairs = dict(_pair(piece) for piece in _text(data).split(",") if piece)
    base = _legacy_number(pairs, "VIRT_BASE", name)
    page = _legacy_number(pairs, "HYPERCALL_PAGE", name)
    supported, required = _features(pairs.get("FEATURES", ""))
    return Notes(
        declared=True,
        legacy=True,
        entry=_legacy_number(pairs, "VIRT_ENTRY", name),
        virt_base=base,
        paddr_offset=_legacy_number(pairs, "ELF_PADDR_OFFSET", name),
        # Here it is the number of a page of the image, not an address.
        hypercall_page=None if page is None else (base or 0) + (page << PAGE_SHIFT),
        pae=pairs.get("PAE", ""),
        guest_os=pairs.get("GUEST_OS", ""),
        guest_version=pairs.get("GUEST_VER", ""),
        xen_version=pairs.get("XEN_VER", ""),
        loader=pairs.get("LOADER", ""),
        supported=supported,
        required=required,
        bsd_symtab="BSD_SYMTAB" in pairs,
    )


def _pair(piece: str) -> tuple[str, str]:
    name, _, value = piece.strip().partition("=")
    return name, value


def _legacy_number(pairs: Mapping[str, str], key: str, name: str) -> int | None:
    if key not in pairs:
        return None
    try:
        return int(pairs[key], 0)
    except ValueError:
        raise ImageError(f"image {name!r}: {key}={pairs[key]} in {LEGACY_SECTION}: expected a number") from None
