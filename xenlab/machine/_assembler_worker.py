"""The helper process in which LLVM assembles: LLVM ends its whole process at the first error in the source.

So this file is run on its own (it imports nothing of xenlab) and may die at any request; what LLVM wrote to
standard error is then read by the parent.  Requests and replies are a line with a length, then that many bytes:
assembly text comes in, an ELF object goes out.  The end of standard input ends the process.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import Any, BinaryIO

import llvmlite.binding as llvm

TRIPLE = "i386-unknown-none-elf"
MEMORY_LIMIT = 2 << 30  # address space; LLVM's library alone maps some 250 MiB
STDERR_LIMIT = 16 << 20
CPU_SECONDS_PER_REQUEST = 30  # only for a parent that was killed: a living one stops us sooner


def target_machine() -> Any:
    """LLVM's i386 back end with its assembly parser."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    llvm.initialize_native_asmparser()
    return llvm.Target.from_triple(TRIPLE).create_target_machine(reloc="static")


def assemble(machine: Any, text: bytes) -> bytes:
    """The ELF object of ``text``; does not return if LLVM finds an error."""
    quoted = "".join(f"\\{byte:02X}" for byte in text)
    return bytes(machine.emit_object(llvm.parse_assembly(f'module asm "{quoted}"\n')))


def private_stdout() -> BinaryIO:
    """The reply channel, moved away from descriptor 1, where the directive ``.print`` writes."""
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return channel


def confine() -> None:
    """Bound memory and forbid opening files (``.incbin``), where the platform can."""
    try:
        import resource
    except ImportError:  # Windows
        return
    open_files = os.dup(0)  # the lowest free descriptor: nothing above the ones we hold may be opened
    os.close(open_files)
    wanted = {"RLIMIT_AS": MEMORY_LIMIT, "RLIMIT_CORE": 0, "RLIMIT_FSIZE": STDERR_LIMIT, "RLIMIT_NOFILE": open_files}
    for name, value in wanted.items():
        with suppress(OSError, ValueError):  # macOS refuses some
            resource.setrlimit(getattr(resource, name), (value, value))


def allow_cpu_time() -> None:
    """A fresh allowance of processor time for one request."""
    try:
        import resource
    except ImportError:
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(usage.ru_utime + usage.ru_stime) + CPU_SECONDS_PER_REQUEST
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def main() -> None:
    """Answer requests until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = private_stdout()
    machine = target_machine()
    confine()
    while header := sys.stdin.buffer.readline():
        allow_cpu_time()
        image = assemble(machine, sys.stdin.buffer.read(int(header)))
        replies.write(b"%d\n" % len(image) + image)
        replies.flush()


if __name__ == "__main__":
    main()
