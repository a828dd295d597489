"""Reading this process's own memory at an address that may be none.

The problem: the engine keeps its registers behind a pointer in a structure that no header describes.  To find
it, `layout` has to look behind every number there that could be an address, and a plain read of a wrong one would
end the process.

The idea: the operating system copies for us, and answers with an error where there is nothing.  On Windows that is
ReadProcessMemory; elsewhere ``write`` to a pipe.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# A page is readable as a whole or not at all, and any pipe holds one, so that a write never waits.
_PAGE = 4096

Peek = Callable[[int, int], bytes]


@contextmanager
def peeking() -> Iterator[Peek]:
    """Gives ``peek(address, size)``: the bytes there, cut off at the first that cannot be read."""
    with _process_copier() if sys.platform == "win32" else _pipe_copier() as copy:

        def peek(address: int, size: int) -> bytes:
            found = bytearray()
            while len(found) < size:
                at = address + len(found)
                piece = copy(at, min(_PAGE - at % _PAGE, size - len(found)))
                if not piece:
                    break
                found += piece
            return bytes(found)

        yield peek


@contextmanager
def _pipe_copier() -> Iterator[Peek]:
    write = ctypes.CDLL(None).write
    write.argtypes, write.restype = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_ssize_t
    reader, writer = os.pipe()
    try:
        yield lambda address, size: os.read(reader, copied) if (copied := write(writer, address, size)) > 0 else b""
    finally:
        os.close(reader)
        os.close(writer)


@contextmanager
def _process_copier() -> Iterator[Peek]:
    kernel = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined,unused-ignore]
    handle, pointer, size = ctypes.c_void_p(-1), ctypes.c_void_p, ctypes.c_size_t  # -1 is this process
    read = kernel.ReadProcessMemory
    read.argtypes = (pointer, pointer, pointer, size, pointer)
    buffer = ctypes.create_string_buffer(_PAGE)
    yield lambda address, wanted: buffer.raw[:wanted] if read(handle, address, buffer, wanted, None) else b""
