"""Small ELF kernels, a runner for commands, and a clone with lessons of its own."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner, Result

from xenlab.cli import places
from xenlab.cli.app import app
from xenlab.machine.assembler import assemble
from xenlab.toolstack.image import abi_symbols

BASE = 0xC000_0000
CODE = BASE + 0x1000
HEADER, PROGRAM_HEADER = struct.Struct("<4s5B7x2H5I6H"), struct.Struct("<8I")
PT_LOAD, PT_NOTE, EM_386 = 1, 4, 3


def note(kind: int, data: bytes) -> bytes:
    """A Xen ELF note (elfnote.h)."""
    return struct.pack("<3I4s", 4, len(data), kind, b"Xen\0") + data + bytes(-len(data) % 4)


def kernel(source: str, *, word_size: int = 1) -> bytes:
    """A 32-bit ELF kernel: a page for hypercalls at 0xC0000000, and ``source`` behind it."""
    code = bytes(0x1000) + assemble(source, CODE, symbols=abi_symbols() | {"hypercall_page": BASE}).code
    numbers = {1: CODE, 2: BASE, 3: BASE, 4: 0}
    notes = b"".join(note(kind, value.to_bytes(4, "little")) for kind, value in numbers.items()) + note(9, b"no\0")
    first = HEADER.size + 2 * PROGRAM_HEADER.size
    header = HEADER.pack(
        b"\x7fELF", word_size, 1, 1, 0, 0, 2, EM_386, 1, CODE, HEADER.size, 0, 0, HEADER.size, PROGRAM_HEADER.size, 2,
        40, 0, 0,
    )  # fmt: skip
    load = PROGRAM_HEADER.pack(PT_LOAD, first, BASE, 0, len(code), len(code), 7, 0x1000)
    notes_at = PROGRAM_HEADER.pack(PT_NOTE, first + len(code), 0, 0, len(notes), len(notes), 4, 4)
    return header + load + notes_at + code + notes


@pytest.fixture
def elf(tmp_path: Path) -> Callable[..., Path]:
    """``elf(source)`` writes a kernel and gives its path."""

    def write(source: str, **options: int) -> Path:
        path = tmp_path / "kernel.elf"
        path.write_bytes(kernel(source, **options))
        return path

    return write


@pytest.fixture
def xenlab() -> Callable[..., Result]:
    """``xenlab("boot", path)`` runs a command in this process, without standard input."""

    def run(*arguments: object) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture
def start(repository: Path) -> Callable[..., subprocess.Popen[bytes]]:
    """``start("boot", path)`` starts a command in a process of its own, with pipes."""

    def run(*arguments: object) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "xenlab.cli", *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(repository)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return run


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the commands take for the clone, with an empty folder of lessons."""
    monkeypatch.setattr(places, "clone", lambda: tmp_path)
    (tmp_path / "notebooks").mkdir()
    return tmp_path


@pytest.fixture
def write_lesson(clone: Path) -> Callable[..., Path]:
    """``write_lesson("00-first", "1 + 1")`` writes a notebook with these code cells."""

    def write(name: str, *cells: str) -> Path:
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        notebook.cells.insert(0, nbformat.v4.new_markdown_cell("# A lesson"))
        path = clone / "notebooks" / f"{name}.ipynb"
        nbformat.write(notebook, path)
        return path

    return write
