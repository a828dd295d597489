"""``xenlab bench``: medians of interleaved repetitions, as ratios to a floor measured beside each.

The problem: hosts differ, and one host differs from minute to minute.  So samples and floors
take turns, and a sample that counts floors is divided by the floor measured just before it.
What breaks without it: a busy second of the host counts as a slow hypercall.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from xenlab.cli.benchmarks import Benchmark, Sample, Unit, catalogue
from xenlab.errors import XenlabError

if TYPE_CHECKING:
    from rich.table import Table

DEFAULT_REPEAT = 51


@dataclass(frozen=True, slots=True)
class Results:
    """What a run of benchmarks gave.

    Attributes:
        floor_ns: median of the floor, in nanoseconds a trap.
        values: each benchmark with its median, in its own unit.
    """

    floor_ns: float
    values: tuple[tuple[Benchmark, float], ...]

    def to_json(self) -> str:
        """One JSON object, as the command prints it."""
        results = {
            benchmark.name: {
                "value": round(value, 4),
                "unit": benchmark.unit.value,
                "target": round(benchmark.target_at(self.floor_ns), 4),
            }
            for benchmark, value in self.values
        }
        return json.dumps({"floor_ns": round(self.floor_ns, 1), "results": results}, indent=2)

    def table(self) -> Table:
        """The same for people."""
        from rich.table import Table

        table = Table(caption=f"1 floor = {self.floor_ns:,.0f} ns on this host now")
        for heading in ("benchmark", "value", "unit", "target", "verdict"):
            table.add_column(heading, justify="right" if heading in ("value", "target") else "left")
        for benchmark, value in self.values:
            sign, target = "≥" if benchmark.at_least else "≤", benchmark.target_at(self.floor_ns)
            verdict = "[green]met[/]" if benchmark.met(value, self.floor_ns) else "[yellow]missed[/]"
            table.add_row(benchmark.name, f"{value:,.2f}", benchmark.unit.value, f"{sign} {target:,.4g}", verdict)
        return table


def select(names: Sequence[str], *, everything: bool = False) -> list[Benchmark]:
    """The named benchmarks; without names all that do not ask to be named.

    Raises:
        XenlabError: a name is unknown; the message lists the known ones.
    """
    known = catalogue()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise XenlabError(f"no benchmark is called {', '.join(unknown)}; there are: {', '.join(known)}")
    if names:
        return [known[name] for name in dict.fromkeys(names)]
    return [benchmark for benchmark in known.values() if everything or not benchmark.on_request]


def measure(
    benchmarks: Sequence[Benchmark], repeat: int = DEFAULT_REPEAT, progress: Callable[[str], None] = lambda _: None
) -> Results:
    """Take ``repeat`` samples of each benchmark and the floor, in turns; ``progress`` is told what is being done."""
    from xenlab.cli.benchmarks.floor import floor

    take_floor = floor()
    take_floor()
    floors: list[float] = []
    values = []
    for benchmark in benchmarks:
        progress(benchmark.name)
        # One at a time: the caches and the memory that another one holds would be measured too.
        take = benchmark.prepare()
        samples = []
        for _ in range(min(repeat, benchmark.most)):
            floors.append(take_floor())
            samples.append(_value(benchmark, take, floors[-1]))
        values.append((benchmark, median(samples)))
        del take
        gc.collect()
    return Results(median(floors), tuple(values))


def _value(benchmark: Benchmark, take: Sample, floor_ns: float) -> float:
    return take() / floor_ns if benchmark.unit is Unit.FLOORS else take()
