"""Guest images from ELF files: made by hand, made by gcc, and damaged in every way."""

from __future__ import annotations

import shutil
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenlab import Hypervisor, ImageError, Machine, boot
from xenlab.machine.paging import PAE, TWO_LEVEL
from xenlab.toolstack import Image, build, image_from_elf, load_image

BASE = 0xC000_0000
CODE = b"\x40\xeb\xfd"  # inc eax; jmp back
PT_LOAD, PT_NOTE = 1, 4
ENTRY, HYPERCALL_PAGE, VIRT_BASE, PADDR_OFFSET, PAE_MODE = 1, 2, 3, 4, 9


def note(kind: int, content: bytes | int) -> bytes:
    """One Xen note (elfnote.h)."""
    data = content.to_bytes(4, "little") if isinstance(content, int) else content
    padded = data + b"\0" * (-len(data) % 4)
    return struct.pack("<III", 4, len(data), kind) + b"Xen\0" + padded


@dataclass
class Elf:
    """A tiny ELF file, each part of which can be spoiled."""

    segments: list[tuple[int, int, int, bytes, int]] = field(
        default_factory=lambda: [(PT_LOAD, BASE, BASE, CODE, 0x3000)]
    )
    notes: bytes = (
        note(VIRT_BASE, BASE) + note(ENTRY, BASE) + note(HYPERCALL_PAGE, BASE + 0x1000) + note(PADDR_OFFSET, BASE)
    )
    entry: int = BASE
    machine: int = 3
    kind: int = 1

    def data(self) -> bytes:
        parts = [*self.segments]
        if self.notes:
            parts.append((PT_NOTE, 0, 0, self.notes, len(self.notes)))
        at = 52 + 32 * len(parts)
        headers, body = b"", b""
        for kind, virtual, physical, content, size in parts:
            headers += struct.pack("<8I", kind, at + len(body), virtual, physical, len(content), size, 7, 4)
            body += content + b"\0" * (-len(content) % 4)
        identity = b"\x7fELF" + bytes((self.kind, 1, 1)) + bytes(9)
        numbers = (2, self.machine, 1, self.entry, 52, 0, 0, 52, 32, len(parts), 40, 0, 0)
        return identity + struct.pack("<HHIIIIIHHHHHH", *numbers) + headers + body


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
    ("content", "mode"), [(b"yes\0", PAE), (b"yes,extended-cr3\0", PAE), (b"no\0", TWO_LEVEL), (1, PAE), (0, TWO_LEVEL)]
)
def test_page_table_format_comes_from_the_note(content: bytes | int, mode: object) -> None:
    assert image_from_elf(Elf(notes=note(VIRT_BASE, BASE) + note(PAE_MODE, content)).data()).mode is mode


def test_without_notes_addresses_are_the_headers() -> None:
    image = image_from_elf(Elf(notes=b"", entry=BASE + 1).data())
    assert (image.base, image.entry, image.hypercall_page) == (BASE, BASE + 1, None)


def test_load_addresses_are_physical_plus_base() -> None:
    elf = Elf(segments=[(PT_LOAD, BASE, 0x1000, CODE, 3)], entry=BASE + 0x1000)
    elf.notes = note(VIRT_BASE, BASE) + note(PADDR_OFFSET, 0)
    assert image_from_elf(elf.data()).sections[0].address == BASE + 0x1000


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
