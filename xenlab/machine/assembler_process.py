"""LLVM's assembler, one process for each source.

Problem: LLVM is a large C++ library; it may crash or eat memory over a student's typing error, and its directives
``.incbin`` and ``.include`` read any file.  The Python package `ziglang` carries it in one executable, with the x86
back end on every host.  It reads the source from a pipe and writes the object to a pipe: it needs no file at all.
Invariant: the process ends with the call, whatever happened, and sees no input before its limits are set.
Without it, an interrupted cell would leave a process behind, and a source could put a file into a guest's image.

Linux takes the right to open files and bounds memory.  macOS and Windows let nobody limit a running process, so
there the refusals in `assembler`, the limit on the answer and the timeout stand alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from xenlab.errors import XenlabError

# The 64-bit object format, for 32-bit code (the source begins with `.code32`): the 32-bit one keeps addends inside
# the code, where those of 8 and 16 bits lose their upper part, and cuts sizes at 4 GiB.
TRIPLE = "x86_64-unknown-none-elf"
ARGUMENTS = ("clang", "-cc1as", "-triple", TRIPLE, "-filetype", "obj", "-massembler-no-warn", "-o", "-", "-")
OBJECT_MAGIC = b"\x7fELF"
TIMEOUT_SECONDS = 20.0
OBJECT_LIMIT = 192 << 20
MESSAGES_LIMIT = 1 << 20
MEMORY_LIMIT = 1 << 30
CPU_SECONDS = 30  # for the case that we are killed and cannot stop it
STANDARD_STREAMS = 3


class Rejected(Exception):
    """LLVM made no object; ``diagnostics`` is what it said."""

    def __init__(self, diagnostics: str) -> None:
        self.diagnostics = diagnostics
        super().__init__(diagnostics)


@cache
def executable() -> Path:
    """The program in the package `ziglang`. Raises XenlabError if it is not installed."""
    spec = find_spec("ziglang")
    for directory in (spec and spec.submodule_search_locations) or ():
        path = Path(directory, "zig.exe" if sys.platform == "win32" else "zig")
        if path.is_file():
            return path
    raise XenlabError("the assembler is in the Python package 'ziglang', which is missing: run `pip install ziglang`")


def emit_object(text: bytes, timeout: float = TIMEOUT_SECONDS) -> bytes:
    """The 64-bit ELF object that LLVM makes of ``text``.

    Args:
        text: assembly source in LLVM's dialect.
        timeout: seconds after which an unfinished answer is given up.

    Raises:
        Rejected: LLVM found errors, or ended for another reason.
        XenlabError: it is not installed, cannot be started, or did not finish in time.
    """
    program = executable()
    try:
        process = subprocess.Popen(
            [program, *ARGUMENTS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            cwd=program.parent,  # not the user's: nothing there can be named without its full path
            env={name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ},
            **_detached(),
        )
    except OSError as error:
        raise XenlabError(f"the assembler {program} could not be started: {error}") from error
    with process:
        try:
            output = _answer(process, text, timeout)
        finally:
            process.kill()
    return _object(output, process.returncode)


def _detached() -> dict[str, Any]:
    """Popen's options that keep Ctrl-C away from the process, and a console window off the screen."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"process_group": 0}


def _confine(pid: int) -> None:
    """Take the right to open files and bound memory, where one process can do that to another."""
    if sys.platform != "linux":
        return
    import resource

    limits = {
        resource.RLIMIT_NOFILE: STANDARD_STREAMS,
        resource.RLIMIT_AS: MEMORY_LIMIT,
        resource.RLIMIT_CPU: CPU_SECONDS,
        resource.RLIMIT_CORE: 0,
    }
    with suppress(ProcessLookupError, PermissionError):  # it has ended already; a sandbox forbids the call
        for limit, wanted in limits.items():
            hard = resource.prlimit(pid, limit)[1]
            value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.prlimit(pid, limit, (value, value))


def _answer(process: subprocess.Popen[bytes], text: bytes, timeout: float) -> bytes:
    expired = threading.Event()

    def give_up() -> None:
        expired.set()
        process.kill()

    timer = threading.Timer(timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        _confine(process.pid)
        output = _exchange(process, text)
    finally:
        timer.cancel()
    if expired.is_set():
        raise XenlabError(f"the assembler did not finish within {timeout:g} s and was stopped")
    return output


def _exchange(process: subprocess.Popen[bytes], text: bytes) -> bytes:
    """Send the source, then read the answer, but no endless one; the process reads to the end before it writes."""
    assert process.stdin is not None
    assert process.stdout is not None
    rest = memoryview(text)
    with suppress(OSError), process.stdin as stdin:  # it may end without reading
        while rest:
            rest = rest[stdin.write(rest) :]
    output = bytearray()
    while chunk := process.stdout.read(1 << 20):
        output += chunk
        if len(output) > (OBJECT_LIMIT if OBJECT_MAGIC in output else MESSAGES_LIMIT):
            process.kill()
            break
    process.wait()
    return bytes(output)


def _object(output: bytes, status: int) -> bytes:
    """The object in ``output``, behind what ``.print`` has written there."""
    start = output.find(OBJECT_MAGIC)
    if status == 0 and start >= 0:
        return output[start:]
    diagnostics = output[: start if start >= 0 else None].decode("utf-8", "replace")
    if len(output) > OBJECT_LIMIT and not diagnostics.strip():
        diagnostics = "out of memory: the object is too large"
    raise Rejected(diagnostics or f"exit status {status}")
