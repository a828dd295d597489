"""A kernel in C, written from Xen's headers, that starts a second vCPU and works with it.

What it checks stands in ``kernels/vcpus.c``, as for `test_memory_kernels`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from test_service_kernels import checks

from xenlab import Hypervisor, Machine
from xenlab.abi.numbers import HYPERCALL_VECTOR, Shutdown
from xenlab.hypervisor import auditor
from xenlab.hypervisor.event_bits import XenBits
from xenlab.hypervisor.schedulers import Bvt, Credit, RoundRobin, Scheduler
from xenlab.hypervisor.trace import Trace
from xenlab.timeline import Timeline
from xenlab.toolstack import boot

Compile = Callable[..., Path]


class Audited(Hypervisor):
    """Audits the machine after each hypercall."""

    __slots__ = ()

    def trap(self, vector: int, error: int, address: int) -> None:
        super().trap(vector, error, address)
        if vector == HYPERCALL_VECTOR:
            auditor.check(self)


@pytest.mark.parametrize("portable", [False, True], ids=["probed", "portable"])
@pytest.mark.parametrize("pae", [0, 1], ids=["two-level", "PAE"])
@pytest.mark.parametrize("scheduler", [RoundRobin, Bvt, Credit])
def test_kernel_with_two_vcpus(
    compile_kernel: Compile, repository: Path, scheduler: Callable[[], Scheduler], pae: int, portable: bool
) -> None:
    xen = Audited(Machine(16, portable=portable), scheduler=scheduler())
    free = xen.frames.free_frames
    domain = boot(xen, compile_kernel("vcpus", pae=pae), memory_mib=4, command_line="vcpus=2", max_vcpus=2)
    xen.run(4_000_000)
    expected = [f"ok {check}" for check in checks(repository / "tests/toolstack/kernels/vcpus.c", False)]
    assert len(expected) > 60
    assert domain.console.splitlines() == [*expected, "passed"], domain.console + domain.report
    assert domain.shutdown is Shutdown.POWEROFF
    xen.destroy(domain)
    auditor.check(xen)
    # The descriptors and the list of frames, made for the first domain of a format, stay for the next.
    assert xen.frames.free_frames == free - 2


@pytest.mark.parametrize("pae", [0, 1], ids=["two-level", "PAE"])
def test_with_the_bits_of_events_as_a_part(compile_kernel: Compile, pae: int) -> None:
    xen = Audited(Machine(16), event_bits=XenBits())
    domain = boot(xen, compile_kernel("vcpus", pae=pae), memory_mib=4, command_line="vcpus=3", max_vcpus=3)
    xen.run(4_000_000)
    assert domain.console.splitlines()[-1] == "passed", domain.console + domain.report


@pytest.mark.parametrize("portable", [False, True], ids=["probed", "portable"])
@pytest.mark.parametrize("pae", [0, 1], ids=["two-level", "PAE"])
def test_its_run_can_be_taken_back(compile_kernel: Compile, pae: int, portable: bool) -> None:
    """From times before the second vCPU was started to its end, by any way."""

    def timeline(interval: int) -> Timeline:
        xen = Hypervisor(Machine(8, portable=portable), scheduler=RoundRobin(700), trace=Trace())
        boot(xen, compile_kernel("vcpus", pae=pae), memory_mib=4, command_line="vcpus=2", max_vcpus=2)
        return Timeline(xen, interval=interval, snapshots=6)

    one, other = timeline(20_000), timeline(3_333)
    one.run(260_000)
    domain = one.hypervisor.domains[0]
    assert domain.vcpus[1].account.ran > 1_000
    hashes = {}
    for time in (250_000, 40_000, 180_000, 70_000, 5_000, 110_001):
        one.seek(time)
        hashes[time] = one.machine_hash(), one.events()
    assert len({found for found, _events in hashes.values()}) == len(hashes)
    one.seek(5_000)
    assert not one.hypervisor.domains[0].vcpus[1].initialised
    for time, found in sorted(hashes.items()):
        other.run(time - other.position)
        assert (other.machine_hash(), other.events()) == found
