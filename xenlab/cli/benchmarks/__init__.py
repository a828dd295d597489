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


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One named measurement.

    Attributes:
        name: as on the command line and in the JSON.
        unit: of the value and the target.
        target: what is aimed at: at most this, for a RATIO at least this.
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

    def met(self, value: float) -> bool:
        """Whether ``value`` reaches the target."""
        return value >= self.target if self.unit is Unit.RATIO else value <= self.target


def catalogue() -> dict[str, Benchmark]:
    """All benchmarks by name, in the order in which they are shown."""
    from xenlab.cli.benchmarks import guests, host, past

    benchmarks = (
        Benchmark("hypercall", Unit.FLOORS, 1.6, guests.hypercall),
        Benchmark("hypercall_traced", Unit.FLOORS, 2.2, guests.hypercall_traced),
        Benchmark("fault_bounce", Unit.FLOORS, 4.0, guests.fault_bounce),
        Benchmark("page_fault_bounce", Unit.FLOORS, 4.0, guests.page_fault_bounce),
        Benchmark("domain_switch", Unit.FLOORS, 4.0, guests.domain_switch),
        Benchmark("compute", Unit.RATIO, 0.95, guests.compute, most=15),
        Benchmark("cold_start", Unit.SECONDS, 0.5, host.cold_start, most=5),
        Benchmark("view_update", Unit.MILLISECONDS, 50.0, past.view_update),
        Benchmark("step_back", Unit.MILLISECONDS, 100.0, past.step_back),
        Benchmark("lab_check", Unit.SECONDS, 60.0, host.lab_check, most=1, on_request=True),
    )
    return {benchmark.name: benchmark for benchmark in benchmarks}
