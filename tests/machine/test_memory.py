"""Machine memory: what nobody wrote to costs nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from xenlab import Hypervisor, Machine, boot
from xenlab.machine.memory import PAGE_SIZE, Memory

LOOP = "start: mov dword ptr [0xC0200000], 1\n stop: jmp stop"


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_SIZE / (1 << 20)


@pytest.mark.skipif(sys.platform != "linux", reason="the size of the process is read from /proc")
def test_guest_memory_that_was_never_touched_costs_no_host_memory() -> None:
    xen = Hypervisor(Machine(1024))
    before = resident_mib()
    domain = boot(xen, LOOP, memory_mib=512)
    xen.run(100)
    assert not domain.ended, domain.report
    during = resident_mib()
    xen.destroy(domain)
    after = resident_mib()
    # Its page tables and its list of frames take 1 MiB, the hypervisor's rows for them some more.
    assert during - before < 40
    assert after - before < 40


def test_a_frame_is_scrubbed() -> None:
    memory = Memory(1)
    memory.write(5 * PAGE_SIZE + 4095, b"x")
    memory.scrub(5)
    assert not any(memory.frame(5))
