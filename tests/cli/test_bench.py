"""``xenlab bench``: the shape of its output, and that the guests do what is said to be measured.  No times."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from typer.testing import Result

from xenlab.cli.bench import Results, measure, select
from xenlab.cli.benchmarks import Benchmark, Unit, catalogue, floor, guests, past
from xenlab.errors import XenlabError
from xenlab.hypervisor.trace import Kind

Run = Callable[..., Result]


def test_json_has_the_agreed_shape(xenlab: Run) -> None:
    result = xenlab("bench", "hypercall", "compute", "--json", "--repeat", 1)
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert sorted(found) == ["floor_ns", "results"]
    assert found["floor_ns"] > 0
    assert list(found["results"]) == ["hypercall", "compute"]
    for name, unit in (("hypercall", "floors"), ("compute", "ratio")):
        entry = found["results"][name]
        assert sorted(entry) == ["target", "unit", "value"]
        assert entry["unit"] == unit
        assert entry["value"] > 0


@pytest.mark.parametrize(
    "name", ["hypercall_traced", "fault_bounce", "page_fault_bounce", "domain_switch", "cold_start", "view_update"]
)
def test_each_quick_benchmark_gives_a_value(xenlab: Run, name: str) -> None:
    found = json.loads(xenlab("bench", name, "--json", "--repeat", 1).stdout)
    assert found["results"][name]["value"] > 0


def test_unknown_name_is_2_with_the_list(xenlab: Run) -> None:
    result = xenlab("bench", "hypercal")
    assert result.exit_code == 2
    assert "hypercal;" in result.stderr
    assert all(name in result.stderr for name in catalogue())


def test_slow_ones_are_left_out_unless_named() -> None:
    assert "lab_check" not in [benchmark.name for benchmark in select([])]
    assert "lab_check" in [benchmark.name for benchmark in select([], everything=True)]
    assert [benchmark.name for benchmark in select(["lab_check", "compute", "compute"])] == ["lab_check", "compute"]
    with pytest.raises(XenlabError, match="no benchmark is called fast, faster;"):
        select(["fast", "compute", "faster"])


def fixed(name: str, unit: Unit, value: float, **options: int) -> Benchmark:
    return Benchmark(name, unit, 10.0, lambda: lambda: value, **options)


def test_only_floors_are_divided_by_the_floor() -> None:
    for unit in (Unit.SECONDS, Unit.MILLISECONDS, Unit.RATIO):
        assert measure([fixed("a", unit, 3.0)], repeat=1).values[0][1] == 3.0
    results = measure([fixed("a", Unit.FLOORS, 3.0)], repeat=1)
    assert results.values[0][1] == pytest.approx(3.0 / results.floor_ns)


def test_samples_and_floors_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def noting(name: str) -> Callable[[], float]:
        def sample() -> float:
            order.append(name)
            return float(len(order))

        return sample

    monkeypatch.setattr(floor, "floor", lambda: noting("floor"))
    often = Benchmark("often", Unit.SECONDS, 1.0, lambda: noting("often"))
    once = Benchmark("once", Unit.SECONDS, 1.0, lambda: noting("once"), most=1)
    results = measure([often, once], repeat=3)
    warm_up, *turns = order
    assert warm_up == "floor"
    assert turns == ["floor", "often"] * 3 + ["floor", "once"]
    assert [value for _, value in results.values] == [5.0, 9.0]


def test_verdict_is_a_word(xenlab: Run) -> None:
    low, high = fixed("low", Unit.RATIO, 9.0), fixed("high", Unit.FLOORS, 11.0)
    assert not low.met(9.0, 1000)
    assert low.met(10.0, 1000)
    assert not high.met(11.0, 1000)
    assert high.met(10.0, 1000)
    from rich.console import Console

    console = Console(width=100)
    with console.capture() as capture:
        console.print(Results(1000.0, ((low, 9.0), (high, 10.0))).table())
    rows = [line for line in capture.get().splitlines() if "low" in line or "high" in line]
    assert "missed" in rows[0]
    assert "≥ 10" in rows[0]
    assert "met" in rows[1]
    assert "≤ 10" in rows[1]


def test_table_names_what_was_measured(xenlab: Run) -> None:
    result = xenlab("bench", "domain_switch", "--repeat", 1)
    assert result.exit_code == 0
    assert "domain_switch" in result.stdout
    assert "1 floor =" in result.stdout


def test_hypercall_guest_makes_one_a_round() -> None:
    xen = guests.hypervisor_with(guests.ROUND, traced=True)
    assert xen.trace is not None
    xen.trace.clear()
    xen.run(10 * guests.ROUND_INSTRUCTIONS)
    results = [event.result for event in xen.trace.events(Kind.RETURN)]
    assert results == [4 << 16 | 17] * 10


@pytest.mark.parametrize(("source", "vector"), [(guests.FAULT, 6), (guests.PAGE_FAULT, 14)])
def test_fault_guests_bounce_one_a_round(source: str, vector: int) -> None:
    xen = guests.hypervisor_with(source, traced=True)
    assert xen.trace is not None
    xen.trace.clear()
    xen.run(10 * guests.FAULT_ROUND_INSTRUCTIONS)
    faults = [(event.vector, event.ring) for event in xen.trace.events(Kind.TRAP)]
    crossings = [(event.from_ring, event.to_ring) for event in xen.trace.events(Kind.DELIVER)]
    assert faults == [(vector, 3)] * 10
    assert crossings == [(3, 1)] * 10


@pytest.mark.parametrize("source", [guests.SYSCALL_DIRECT, guests.SYSCALL_BOUNCED])
def test_system_calls_go_the_way_that_they_are_named_for(source: str) -> None:
    xen = guests.hypervisor_with(source, traced=True)
    assert xen.trace is not None
    xen.trace.clear()
    xen.run(10 * guests.SYSCALL_ROUND_INSTRUCTIONS)
    kinds = [event.kind for event in xen.trace.events()]
    assert kinds == ([Kind.GATE] * 10 if source is guests.SYSCALL_DIRECT else [Kind.TRAP, Kind.DELIVER] * 10)


def test_yielding_guests_switch_once_a_round() -> None:
    xen = guests.hypervisor_with(guests.YIELD, guests.YIELD, traced=True)
    assert xen.trace is not None
    xen.trace.clear()
    xen.run(10 * guests.YIELD_INSTRUCTIONS)
    assert len(xen.trace.events(Kind.SWITCH)) == len(xen.trace.events(Kind.RETURN)) == 10


def test_long_run_has_two_domains_that_take_turns() -> None:
    timeline = past.long_run(50_000)
    assert timeline.position == timeline.end == 50_000
    switches = [event for event in timeline.events() if event.kind is Kind.SWITCH]
    assert len(switches) >= 7
    assert len({event.to_vcpu for event in switches}) == 2
    assert timeline.back(1) == 49_999


def test_step_back_goes_back_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(past, "RUN_INSTRUCTIONS", 100_000)
    timeline = past.long_run(100_000)
    monkeypatch.setattr(past, "long_run", lambda: timeline)
    assert past.step_back()() > 0
    assert timeline.position == past._STRIDE % 100_000 - 1


def test_scrubbing_goes_to_any_moment_of_a_run_of_sixteen_domains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(past, "SCRUB_INSTRUCTIONS", 400_000)
    xen = past.wanderers()
    monkeypatch.setattr(past, "wanderers", lambda: xen)
    assert past.scrub()() > 0
    place = xen.now
    assert 0 < place < 400_000
    assert past.scrub_worst()() > 0
    assert xen.now != place
    assert {event.to_vcpu // 32 for event in xen.trace.events(Kind.SWITCH)} == set(range(16))
    assert not any(domain.ended for domain in xen.domains.values())


def test_recording_is_measured_beside_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(past, "RECORDED_INSTRUCTIONS", 100_000)
    assert 0 < past.recording()() < 10


def test_computing_guest_does_not_trap() -> None:
    xen = guests.hypervisor_with(guests.COMPUTE, traced=True)
    assert xen.trace is not None
    xen.trace.clear()
    xen.run(50_000)
    assert not xen.trace.events(Kind.TRAP) + xen.trace.events(Kind.HYPERCALL)
    assert xen.current is not None
