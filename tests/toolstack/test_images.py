"""Guest images from ELF files: made by hand, made by gcc, and damaged in every way."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_elf import (
    BASE,
    CODE,
    ENTRY,
    HYPERCALL_PAGE,
    PADDR_OFFSET,
    PAE_MODE,
    PT_LOAD,
    SHT_NOTE,
    SHT_PROGBITS,
    VIRT_BASE,
    Elf,
    note,
)

from xenlab import Hypervisor, ImageError, Machine, boot
from xenlab.abi.kernel_notes import Feature
from xenlab.machine.paging import PAE, TWO_LEVEL
from xenlab.toolstack import Image, build, image_from_elf, load_image


def test_image_by_hand_boots() -> None:
    image = image_from_elf(Elf().data(), "tiny")
    assert (image.base, image.entry, image.hypercall_page, image.mode) == (BASE, BASE, BASE + 0x1000, TWO_LEVEL)
    xen = Hypervisor(Machine(memory_mib=4))
    domain = boot(xen, image)
    xen.run(100)
    assert domain.vcpus[0].state.eax == 50
    assert xen.guest_memory.read(domain.vcpus[0], BASE + 0x1000 + 32, 7) == b"\xb8\1\0\0\0\xcd\x82"


def test_memory_behind_the_file_is_zero() -> None:
    xen = Hypervisor(Machine(memory_mib=4))
    first = boot(xen, "start: mov edi, offset here\n mov ecx, 9000\n here: rep stosb\n jmp start")
    xen.run(1000)
    xen.destroy(first)
    domain = boot(xen, image_from_elf(Elf().data()))
    assert xen.guest_memory.read(domain.vcpus[0], BASE + 3, 0xFFD) == bytes(0xFFD)


@pytest.mark.parametrize(
    ("content", "mode"),
    [
        (b"yes\0", PAE),
        (b"yes,bimodal\0", PAE),
        (b"bimodal\0", PAE),
        (b"yes,extended-cr3\0", PAE),
        (b"no\0", TWO_LEVEL),
        (b"", TWO_LEVEL),
        (1, PAE),
        (0, TWO_LEVEL),
    ],
)
def test_page_table_format_comes_from_the_note(content: bytes | int, mode: object) -> None:
    assert image_from_elf(Elf(notes=note(VIRT_BASE, BASE) + note(PAE_MODE, content)).data()).mode is mode


def test_without_notes_addresses_are_the_headers() -> None:
    image = image_from_elf(Elf(notes=b"", entry=BASE + 1).data())
    assert (image.base, image.entry, image.hypercall_page) == (BASE, BASE + 1, None)


@pytest.mark.parametrize("offset", [note(PADDR_OFFSET, 0), b""], ids=["said", "not said"])
def test_load_addresses_are_physical_plus_base(offset: bytes) -> None:
    elf = Elf(segments=[(PT_LOAD, BASE, 0x1000, CODE, 3)], entry=BASE + 0x1000)
    elf.notes = note(VIRT_BASE, BASE) + offset
    assert image_from_elf(elf.data()).sections[0].address == BASE + 0x1000


def test_without_a_virtual_base_it_is_0() -> None:
    elf = Elf(segments=[(PT_LOAD, 0x2000, 0x2000, CODE, 3)], notes=note(ENTRY, 0x2000))
    image = image_from_elf(elf.data())
    assert (image.base, image.entry, image.sections[0].address) == (0, 0x2000, 0x2000)


def test_notes_that_only_a_section_names() -> None:
    whole = Elf().notes
    elf = Elf(notes=note(4, b"GNU", b"GNU\0"), sections={".note.Xen": (SHT_NOTE, note(1, 7, b"GNU\0") + whole)})
    assert image_from_elf(elf.data()).notes == image_from_elf(Elf().data()).notes


LEGACY = (
    b"GUEST_OS=linux,GUEST_VER=2.6,XEN_VER=xen-3.0,VIRT_BASE=0xC0000000,ELF_PADDR_OFFSET=0xC0000000,"
    b"VIRT_ENTRY=0xC0000001,HYPERCALL_PAGE=0x2,FEATURES=writable_page_tables|!pae_pgdir_above_4gb,"
    b"PAE=yes[extended-cr3],LOADER=generic,BSD_SYMTAB\0rest"
)


def legacy(text: bytes, physical: int = BASE) -> Image:
    elf = Elf(notes=b"", sections={"__xen_guest": (SHT_PROGBITS, text)})
    elf.segments = [(PT_LOAD, BASE, physical, CODE, 0x3000)]
    return image_from_elf(elf.data(), "bad")


def test_string_of_a_kernel_from_before_the_notes() -> None:
    image = legacy(LEGACY)
    assert (image.base, image.entry, image.hypercall_page, image.mode) == (BASE, BASE + 1, BASE + 0x2000, PAE)
    notes = image.notes
    assert (notes.guest_os, notes.guest_version, notes.xen_version) == ("linux", "2.6", "xen-3.0")
    assert (notes.loader, notes.bsd_symtab, notes.required) == ("generic", True, {"pae_pgdir_above_4gb"})
    assert notes.supported == {Feature.writable_page_tables, Feature.pae_pgdir_above_4gb}


def test_what_a_string_leaves_out() -> None:
    image = legacy(b"XEN_VER=xen-3.0,VIRT_BASE=0xC0000000")
    # Physical addresses are then linear ones, and the entry is the file's.
    assert (image.sections[0].address, image.entry) == (BASE, BASE)
    assert (image.hypercall_page, image.mode) == (None, TWO_LEVEL)
    assert legacy(b"VIRT_BASE=0xC0000000,ELF_PADDR_OFFSET=0", physical=0).sections[0].address == BASE
    assert legacy(b"VIRT_BASE=3221225472,PAE=no").base == BASE


@pytest.mark.parametrize("text", [b"VIRT_BASE=C0", b"HYPERCALL_PAGE=", b"ELF_PADDR_OFFSET=0xg"])
def test_number_in_a_string_that_is_none(text: bytes) -> None:
    with pytest.raises(ImageError, match=r"'bad': [A-Z_]*=.* in __xen_guest: expected a number"):
        legacy(text)


# Types of further notes, and what is said against them.
XEN_VERSION, GUEST_OS, LOADER, FEATURES, HV_START_LOW, SUPPORTED = 5, 6, 8, 10, 12, 17
UNWANTED = {
    "another loader": (note(LOADER, b"lilo\0") + note(GUEST_OS, b"plan9\0"), "loader 'lilo', expected 'generic'"),
    "another Xen": (note(XEN_VERSION, b"xen-2.0\0"), "interface 'xen-2.0', expected 'xen-3.0'"),
    "ring 0": (note(FEATURES, b"dom0|!supervisor_mode_kernel\0"), "requires supervisor_mode_kernel, which is not"),
    "two things": (note(FEATURES, b"!b|!auto_translated_physmap\0"), "requires auto_translated_physmap, b, which"),
    "a small hypervisor": (note(HV_START_LOW, 0xFD00_0000), "0xfd000000 or above, it begins at 0xfc000000"),
    "a smaller one": (note(HV_START_LOW, 0xF600_0000) + note(PAE_MODE, b"yes\0"), "it begins at 0xf5800000"),
    "a number of 3 bytes": (note(ENTRY, b"\1\2\3"), "note ENTRY has 3 bytes, expected a number of 4 or 8"),
}


@pytest.mark.parametrize("name", UNWANTED)
def test_kernel_that_asks_for_what_there_is_not(name: str) -> None:
    notes, message = UNWANTED[name]
    assert message in refused(Elf(notes=Elf().notes + notes).data())


def test_kernel_that_asks_for_what_there_is() -> None:
    notes = note(LOADER, b"generic\0") + note(XEN_VERSION, b"xen-3.0\0") + note(HV_START_LOW, 0xF580_0000)
    notes += note(FEATURES, b"!writable_page_tables|pae_pgdir_above_4gb|no_such_feature\0")
    assert image_from_elf(Elf(notes=Elf().notes + notes).data()).notes.required == {"writable_page_tables"}
    linux = note(LOADER, b"\0") + note(GUEST_OS, b"linux\0")
    assert image_from_elf(Elf(notes=Elf().notes + linux).data()).notes.guest_os == "linux"


@pytest.mark.parametrize(("bits", "is_refused"), [(1 << 11, False), (1, True), (None, False)])
def test_initial_domain_only_if_the_kernel_can_be_one(bits: int | None, is_refused: bool) -> None:
    extra = b"" if bits is None else note(SUPPORTED, bits.to_bytes(8, "little"))
    image = image_from_elf(Elf(notes=Elf().notes + extra).data())
    xen = Hypervisor(Machine(memory_mib=4))
    if is_refused:
        with pytest.raises(ImageError, match="does not declare the feature dom0"):
            boot(xen, image, privileged=True)
    else:
        boot(xen, image, privileged=True)
    boot(xen, image)


def refused(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        image_from_elf(data, "bad")
    assert "'bad'" in str(caught.value)
    return str(caught.value)


SPOILED: dict[str, tuple[Elf, str]] = {
    "64-bit": (Elf(kind=2), "64-bit"),
    "no class": (Elf(kind=0), "'bad'"),
    "for ARM": (Elf(machine=40), "EM_ARM"),
    "nothing to load": (Elf(segments=[]), "nothing to load"),
    "empty segment": (Elf(segments=[(PT_LOAD, BASE, BASE, b"", 0)]), "nothing to load"),
    "entry below": (Elf(notes=note(VIRT_BASE, BASE) + note(ENTRY, BASE - 1)), "entry 0xbfffffff"),
    "entry behind": (Elf(notes=note(VIRT_BASE, BASE) + note(ENTRY, BASE + 0x3000)), "entry"),
    "entry of 64 bits": (Elf(notes=note(ENTRY, b"\1\2\3\4\5\6\7\10")), "entry"),
    "hypercall page not aligned": (Elf(notes=note(VIRT_BASE, BASE) + note(HYPERCALL_PAGE, BASE + 8)), "hypercall page"),
    "hypercall page elsewhere": (Elf(notes=note(VIRT_BASE, BASE) + note(HYPERCALL_PAGE, 0x1000)), "hypercall page"),
    "hypercall page behind": (Elf(notes=note(VIRT_BASE, BASE) + note(HYPERCALL_PAGE, BASE + 0x3000)), "hypercall page"),
    "base not aligned": (Elf(notes=note(VIRT_BASE, BASE - 8) + note(PADDR_OFFSET, BASE - 8)), "start of a page"),
    "below the base": (Elf(notes=note(VIRT_BASE, BASE) + note(PADDR_OFFSET, BASE + 0x1000)), "below"),
    "an offset and no base": (Elf(notes=note(PADDR_OFFSET, 0)), "no virtual base"),
    "outside 32 bits": (Elf(segments=[(PT_LOAD, 0xFFFF_F000, 0, CODE, 0x2000)], notes=b""), "outside 32 bits"),
    "2 GiB": (Elf(segments=[(PT_LOAD, 0, 0, CODE, 1 << 31)], notes=b""), "claims"),
    "more file than memory": (Elf(segments=[(PT_LOAD, BASE, BASE, CODE, 2)], notes=b""), "claims"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_image(name: str) -> None:
    elf, message = SPOILED[name]
    assert message in refused(elf.data())


@pytest.mark.parametrize("data", [b"", b"\x7f", b"\x7fELF", b"MZ\x90", b"#!/bin/sh\n", bytes(100), b"\x7fELF\1\1\1"])
def test_not_elf(data: bytes) -> None:
    refused(data)


@pytest.mark.parametrize("length", range(len(Elf().data())))
def test_truncated_at_every_length(length: int) -> None:
    """A cut can only pass unseen where it takes padding, or notes that were not needed."""
    data = Elf(notes=b"").data()
    if length < len(data) - 1:
        refused(data[:length])
    try:
        image = image_from_elf(Elf().data()[:length])
    except ImageError:
        return
    assert image.sections[0].data == CODE


def start_or_refuse(data: bytes) -> None:
    """Whatever the bytes are: a whole domain or an ImageError, never half a domain."""
    xen = MACHINE
    free = xen.frames.free_frames
    try:
        domain = build(xen, image_from_elf(data), memory_mib=1)
    except ImageError:
        assert xen.frames.free_frames == free
        assert xen.domains == {}
    else:
        xen.destroy(domain)
        assert xen.frames.free_frames == free


MACHINE = Hypervisor(Machine(memory_mib=4))
for _mode in (TWO_LEVEL, PAE):  # the descriptor pages, which stay
    MACHINE.shared_pages.make(_mode)
WHOLE = Elf().data()


@settings(max_examples=400)
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_flipped_bytes(changes: list[tuple[int, int]]) -> None:
    data = bytearray(WHOLE)
    for at, value in changes:
        data[at] = value
    start_or_refuse(bytes(data))


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_garbage_behind_a_good_identification(rest: bytes) -> None:
    start_or_refuse(WHOLE[:16] + rest)


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.just(PT_LOAD),
            st.integers(0, 2**32 - 1) | st.integers(BASE, BASE + 0x2000),
            st.integers(0, 2**32 - 1) | st.integers(BASE, BASE + 0x2000),
            st.binary(max_size=20),
            st.integers(0, 0x2_0000) | st.integers(0, 2**32 - 1),
        ),
        max_size=4,
    ),
    st.integers(0, 2**32 - 1) | st.integers(BASE, BASE + 0x100),
    st.booleans(),
)
def test_segments_anywhere(segments: list[tuple[int, int, int, bytes, int]], entry: int, with_notes: bool) -> None:
    notes = note(VIRT_BASE, BASE) + note(PADDR_OFFSET, BASE) if with_notes else b""
    start_or_refuse(Elf(segments=segments, entry=entry, notes=notes).data())


def test_overlapping_segments_load_in_their_order() -> None:
    segments = [(PT_LOAD, BASE, BASE, b"\xcc" * 16, 16), (PT_LOAD, BASE, BASE, CODE, 0x1000)]
    xen = Hypervisor(Machine(memory_mib=4))
    domain = boot(xen, image_from_elf(Elf(segments=segments, notes=b"").data()))
    assert xen.guest_memory.read(domain.vcpus[0], BASE, 4) == CODE + b"\xcc"


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="cannot be read"):
        load_image(tmp_path / "missing")
    with pytest.raises(ImageError, match="cannot be read"):
        load_image(tmp_path)


C_GUEST = r"""
#define STR_(x) #x
#define STR(x) STR_(x)
#define NOTE(name, type, desc) asm(".pushsection .note.Xen, \"a\", @note\n .long 4, 2f - 1f, " STR(type) \
  "\n .asciz \"Xen\"\n 1: " desc "\n 2: .p2align 2\n .popsection")
NOTE(entry, 1, ".long start");
NOTE(page, 2, ".long hypercall_page");
NOTE(base, 3, ".long 0xc0000000");
NOTE(offset, 4, ".long 0xc0000000");
NOTE(pae, 9, ".asciz \"PAE_ANSWER\"");
asm(".text\n .globl start\n start: call main\n 1: jmp 1b\n .p2align 12\n .globl hypercall_page\n"
    "hypercall_page: .skip 4096\n");
static const char text[] = "built by gcc\n";
static int zeros[4096];
extern char hypercall_page[];
static long hypercall(int number, long a, long b, long c)
{
    long result;
    asm volatile("call *%1" : "=a"(result) : "r"(hypercall_page + 32 * number),
                 "b"(a), "c"(b), "d"(c) : "memory");
    return result;
}
void main(void)
{
    int reason = 0;
    for (int n = 0; n < 4096; n++)
        reason |= zeros[n];
    hypercall(18, 0, sizeof text - 1, (long)text);
    hypercall(29, 2, (long)&reason, 0);
}
"""


LINKER_SCRIPT = """
ENTRY(start)
PHDRS { all PT_LOAD; notes PT_NOTE; }
SECTIONS
{
  . = 0xc0000000;
  .text : { *(.text) } :all
  .rodata : { *(.rodata*) } :all
  .note.Xen : { *(.note.Xen) } :all :notes
  .data : { *(.data) } :all
  .bss : { *(.bss) } :all
  /DISCARD/ : { *(.note.gnu*) *(.comment) }
}
"""


@pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("ld")), reason="needs gcc and ld")
@pytest.mark.parametrize(("answer", "mode"), [("no", TWO_LEVEL), ("yes", PAE)])
def test_image_built_by_gcc(answer: str, mode: object, tmp_path: Path) -> None:
    source, output, kernel = tmp_path / "kernel.c", tmp_path / "kernel.o", tmp_path / "kernel"
    source.write_text(C_GUEST.replace("PAE_ANSWER", answer))
    options = [
        "-m32",
        "-O1",
        "-ffreestanding",
        "-fno-pic",
        "-fno-pie",
        "-fno-stack-protector",
        "-fno-asynchronous-unwind-tables",
    ]
    compiled = subprocess.run(
        ["gcc", *options, "-w", "-c", source, "-o", output], capture_output=True, text=True, timeout=60, check=False
    )
    if compiled.returncode:
        pytest.skip(f"this gcc builds no 32-bit code: {compiled.stderr[:200]}")
    script = tmp_path / "kernel.lds"
    script.write_text(LINKER_SCRIPT)
    link = ["ld", "-m", "elf_i386", "-z", "noexecstack", "--no-warn-rwx-segments", "-T", script, output, "-o", kernel]
    subprocess.run(link, capture_output=True, timeout=60, check=True)
    image: Image = load_image(kernel)
    assert image.mode is mode
    assert image.symbols["start"] == image.entry
    xen = Hypervisor(Machine(memory_mib=8))
    domain = boot(xen, kernel, memory_mib=2)
    xen.run(200_000)
    assert domain.console == "built by gcc\n", domain.report
    assert (domain.shutdown, domain.report) == (0, "")
