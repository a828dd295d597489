"""The benchmarks: what is measured, in what unit, and what is aimed at.

A number of nanoseconds says more about the host than about the code, so the short paths are
given as ratios to a floor that is measured in the same run, right beside each repetition:
see `xenlab.cli.benchmarks.floor`.  Each benchmark's docstring says exactly what is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

Sample = Callable[[], float]


class Unit(Enum):
    """What a value counts.  A sample in FLOORS is in nanoseconds until it is divided by the floor."""

    FLOORS = "floors"
    RATIO = "ratio"
    SECONDS = "s"
    MILLISECONDS = "ms"
    BYTES = "bytes"
    PER_SECOND = "1/s"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One named measurement.

    Attributes:
        name: as on the command line and in the JSON.
        unit: of the value and the target.
        target: what is aimed at: at most this, for a RATIO or something PER_SECOND at least this.
        or_ns: for FLOORS, so many nanoseconds instead where that is more.
        prepare: builds what is needed, untimed, and returns the function that takes one sample.
        most: how many samples are taken at most, however many were asked for.
        on_request: left out unless it is named.
    """

    name: str
    unit: Unit
    target: float
    prepare: Callable[[], Sample]
    most: int = 1000
    on_request: bool = False
    or_ns: float = 0

    @property
    def at_least(self) -> bool:
        """Whether more is better."""
        return self.unit in (Unit.RATIO, Unit.PER_SECOND)

    def target_at(self, floor_ns: float) -> float:
        """The target on a host with this floor."""
        return max(self.target, self.or_ns / floor_ns)

    def met(self, value: float, floor_ns: float) -> bool:
        """Whether ``value`` reaches the target."""
        target = self.target_at(floor_ns)
        return value >= target if self.at_least else value <= target


def catalogue() -> dict[str, Benchmark]:
    """All benchmarks by name, in the order in which they are shown."""
    from xenlab.cli.benchmarks import guests, host, many, memory, past

    benchmarks = (
        Benchmark("hypercall", Unit.FLOORS, 1.6, guests.hypercall),
        Benchmark("hypercall_traced", Unit.FLOORS, 2.2, guests.hypercall_traced),
        Benchmark("fault_bounce", Unit.FLOORS, 4.0, guests.fault_bounce),
        Benchmark("page_fault_bounce", Unit.FLOORS, 4.0, guests.page_fault_bounce),
        Benchmark("syscall_direct", Unit.FLOORS, 3.5, guests.syscall_direct),
        Benchmark("syscall_bounced", Unit.FLOORS, 4.5, guests.syscall_bounced),
        Benchmark("domain_switch", Unit.FLOORS, 4.0, guests.domain_switch),
        Benchmark("domain_switch_128", Unit.FLOORS, 4.0, many.domain_switch_128),
        Benchmark("domain_switch_bvt", Unit.FLOORS, 6.0, many.domain_switch_bvt),
        Benchmark("event_upcall", Unit.FLOORS, 4.0, many.event_upcall),
        Benchmark("mmu_update_1", Unit.FLOORS, 8.0, memory.mmu_update_1),
        Benchmark("mmu_update_8", Unit.FLOORS, 8.0, memory.mmu_update_8),
        Benchmark("mmu_update_64", Unit.FLOORS, 2.0, memory.mmu_update_64),
        Benchmark("mmu_update_512", Unit.FLOORS, 1.0, memory.mmu_update_512),
        Benchmark("mmu_update_gain", Unit.RATIO, 8.0, memory.mmu_update_gain),
        Benchmark("update_va_mapping", Unit.FLOORS, 8.0, memory.update_va_mapping),
        Benchmark("table_write", Unit.FLOORS, 60.0, memory.table_write),
        Benchmark("pin_table", Unit.FLOORS, 20.0, memory.pin_table, or_ns=60_000),
        Benchmark("build_space", Unit.PER_SECOND, 1_000_000, memory.build_space, most=15),
        Benchmark("domain_bytes", Unit.BYTES, 20_000, memory.domain_bytes, most=3),
        Benchmark("domains_128_boot", Unit.SECONDS, 4.0, many.domains_128_boot, most=5),
        Benchmark("domains_128_throughput", Unit.RATIO, 0.925, many.domains_128_throughput, most=9),
        Benchmark("domains_128_throughput_50", Unit.RATIO, 0.97, many.domains_128_throughput_50, most=5),
        Benchmark("compute", Unit.RATIO, 0.95, guests.compute, most=15),
        Benchmark("cold_start", Unit.SECONDS, 0.5, host.cold_start, most=5),
        Benchmark("view_update", Unit.MILLISECONDS, 50.0, past.view_update),
        Benchmark("step_back", Unit.MILLISECONDS, 100.0, past.step_back),
        Benchmark("scrub", Unit.MILLISECONDS, 200.0, past.scrub, most=51),
        Benchmark("scrub_worst", Unit.MILLISECONDS, 1000.0, past.scrub_worst, most=1),
        Benchmark("recording", Unit.RATIO, 0.8, past.recording, most=21),
        Benchmark("lab_check", Unit.SECONDS, 60.0, host.lab_check, most=1, on_request=True),
    )
    return {benchmark.name: benchmark for benchmark in benchmarks}
