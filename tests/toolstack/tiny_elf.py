"""A tiny ELF kernel made by hand, each part of which can be spoiled."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

BASE = 0xC000_0000
CODE = b"\x40\xeb\xfd"  # inc eax; jmp back
PT_LOAD, PT_NOTE = 1, 4
SHT_PROGBITS, SHT_STRTAB, SHT_NOTE = 1, 3, 7
ENTRY, HYPERCALL_PAGE, VIRT_BASE, PADDR_OFFSET, PAE_MODE = 1, 2, 3, 4, 9


def note(kind: int, content: bytes | int, name: bytes = b"Xen\0") -> bytes:
    """One Xen note (elfnote.h)."""
    data = content.to_bytes(4, "little") if isinstance(content, int) else content
    padded = data + b"\0" * (-len(data) % 4)
    return struct.pack("<III", len(name), len(data), kind) + name + b"\0" * (-len(name) % 4) + padded


@dataclass
class Elf:
    """A file with its headers; ``segments`` are (type, linear address, physical address, bytes, size)."""

    segments: list[tuple[int, int, int, bytes, int]] = field(
        default_factory=lambda: [(PT_LOAD, BASE, BASE, CODE, 0x3000)]
    )
    notes: bytes = (
        note(VIRT_BASE, BASE) + note(ENTRY, BASE) + note(HYPERCALL_PAGE, BASE + 0x1000) + note(PADDR_OFFSET, BASE)
    )
    entry: int = BASE
    machine: int = 3
    kind: int = 1
    sections: dict[str, tuple[int, bytes]] = field(default_factory=dict)

    def data(self) -> bytes:
        parts = [*self.segments]
        if self.notes:
            parts.append((PT_NOTE, 0, 0, self.notes, len(self.notes)))
        at = 52 + 32 * len(parts)
        headers, body = b"", b""
        for kind, virtual, physical, content, size in parts:
            headers += struct.pack("<8I", kind, at + len(body), virtual, physical, len(content), size, 7, 4)
            body += content + b"\0" * (-len(content) % 4)
        table, count = b"", 0
        if self.sections:
            body, table, count = self._with_sections(at, body)
        identity = b"\x7fELF" + bytes((self.kind, 1, 1)) + bytes(9)
        table_at = at + len(body) if count else 0
        numbers = (2, self.machine, 1, self.entry, 52, table_at, 0, 52, 32, len(parts), 40, count, max(0, count - 1))
        return identity + struct.pack("<HHIIIIIHHHHHH", *numbers) + headers + body + table

    def _with_sections(self, at: int, body: bytes) -> tuple[bytes, bytes, int]:
        """The body with the contents and the names of the sections behind it, their table, and how many there are."""
        names, table = b"\0", bytes(40)
        contents = [*self.sections.items(), (".shstrtab", (SHT_STRTAB, b""))]
        for name, (kind, content) in contents:
            start, names = len(names), names + name.encode() + b"\0"
            data = names if kind == SHT_STRTAB else content
            table += struct.pack("<10I", start, kind, 0, 0, at + len(body), len(data), 0, 0, 4, 0)
            body += data + b"\0" * (-len(data) % 4)
        return body, table, len(contents) + 1
