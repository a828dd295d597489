"""Benchmarks of what a person waits for: the first line of a guest, the check of the lessons."""

from __future__ import annotations

import subprocess
import sys
import time

from xenlab.cli.benchmarks import Sample
from xenlab.errors import XenlabError

# Prints the seconds from before the import to the guest's first line.
_FIRST_LINE = r"""
import time
begin = time.perf_counter()
from xenlab import Hypervisor, boot
xen = Hypervisor()
guest = boot(xen, '''
start: mov ebx, CONSOLEIO_write
    mov ecx, length
    mov edx, offset message
    mov eax, __HYPERVISOR_console_io
    int 0x82
    mov ebx, SCHEDOP_block
    mov eax, __HYPERVISOR_sched_op
    int 0x82
message: .ascii "hello\\n"
length = . - message
''')
xen.run(1_000)
assert guest.console == "hello\n", guest.console
print(time.perf_counter() - begin)
"""


def cold_start() -> Sample:
    """Seconds in a fresh Python from ``import xenlab`` to the first console line of a guest from source.

    The time that Python itself needs to start is left out; that of the assembler's helper
    process is in.
    """

    def sample() -> float:
        run = subprocess.run(
            [sys.executable, "-c", _FIRST_LINE], capture_output=True, encoding="utf-8", check=False, timeout=120
        )
        if run.returncode:
            raise XenlabError(f"benchmark cold_start: the guest did not print its line:\n{run.stderr}")
        return float(run.stdout)

    return sample


def lab_check() -> Sample:
    """Seconds that ``xenlab lab --check`` takes for all lessons."""
    from xenlab.cli.lab_check import check_lessons
    from xenlab.cli.places import lessons

    def sample() -> float:
        begin = time.perf_counter()
        failed = [outcome.lesson for outcome in check_lessons(lessons()) if outcome.problem]
        if failed:
            raise XenlabError(f"benchmark lab_check: lessons fail, so their time means nothing: {', '.join(failed)}")
        return time.perf_counter() - begin

    return sample
