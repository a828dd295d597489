"""A run can be taken back: the state at a time does not depend on the way there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_guests import PIECES, machine, pairs, slices, source_of

from xenlab.hypervisor.inputs import Typed
from xenlab.hypervisor.trace import Kind
from xenlab.timeline import Timeline, machine_hash


def everything() -> tuple[str, str]:
    first, second = sorted(PIECES)[::2], sorted(PIECES)[1::2]
    return tuple(source_of([(name, 7 + number) for number, name in enumerate(names)]) for names in (first, second))


def digest() -> str:
    """Trace and machine of a fixed run, for another process to compare."""
    timeline = Timeline(machine(everything(), 17), interval=100)
    timeline.run(3000)
    timeline.submit(Typed(0, b"abc"))
    timeline.run(3000)
    return f"{timeline.machine_hash()} {[(e.time, int(e.kind), e.domain, e.values) for e in timeline.events()]}"


def test_the_pieces_do_what_they_are_for() -> None:
    xen = machine(everything(), 50)
    xen.run(20_000)
    assert not any(domain.ended for domain in xen.domains.values())
    vectors = {event.vector for event in xen.trace.events(Kind.TRAP)}
    assert {0, 6, 13, 14} <= vectors
    assert {event.vector for event in xen.trace.events(Kind.GATE)} == {0x80}
    assert xen.trace.events(Kind.EMULATE)
    assert xen.domains[0].console or xen.domains[1].console


@settings(max_examples=30)
@given(sources=pairs, slice_instructions=slices, there=st.integers(0, 700), steps=st.integers(1, 250))
def test_steps_forward_and_back_lead_to_the_same_machine(
    sources: tuple[str, str], slice_instructions: int, there: int, steps: int
) -> None:
    timeline = Timeline(machine(sources, slice_instructions), interval=64, snapshots=5)
    timeline.run(there)
    before, events = timeline.machine_hash(), timeline.events()
    timeline.step(steps)
    after = timeline.machine_hash()
    assert after != before
    for _ in range(min(steps, 5)):
        timeline.back()
    timeline.back(max(0, steps - 5))
    assert (timeline.position, timeline.machine_hash(), timeline.events()) == (there, before, events)
    timeline.step(steps)
    assert timeline.machine_hash() == after


@settings(max_examples=25)
@given(
    sources=pairs,
    slice_instructions=slices,
    route=st.lists(st.integers(0, 900), min_size=2, max_size=8),
    interval=st.sampled_from((1, 30, 200, 5000)),
    snapshots=st.integers(2, 6),
)
def test_the_way_to_a_time_does_not_matter(
    sources: tuple[str, str], slice_instructions: int, route: list[int], interval: int, snapshots: int
) -> None:
    timeline = Timeline(machine(sources, slice_instructions), interval=interval, snapshots=snapshots)
    seen = {}
    for time in [*route, *reversed(route)]:
        timeline.seek(time)
        found = timeline.machine_hash(), timeline.events()
        assert seen.setdefault(time, found) == found
    straight = Timeline(machine(sources, slice_instructions), interval=interval)
    straight.run(max(route))
    assert straight.all_events() == timeline.all_events()
    assert straight.machine_hash() == seen[max(route)][0]


@settings(max_examples=15)
@given(sources=pairs, slice_instructions=slices, cut=st.integers(1, 60))
def test_cutting_a_run_into_pieces_changes_nothing(sources: tuple[str, str], slice_instructions: int, cut: int) -> None:
    whole, pieces = machine(sources, slice_instructions), machine(sources, slice_instructions)
    whole.run(1000)
    while pieces.now < 1000:
        pieces.run(min(cut, 1000 - pieces.now))
    assert machine_hash(whole) == machine_hash(pieces)
    assert whole.trace.raw() == pieces.trace.raw()


def test_one_instruction_at_a_time_is_the_same_run() -> None:
    whole, steps = Timeline(machine(everything(), 23)), Timeline(machine(everything(), 23))
    whole.run(1500)
    for _ in range(1500):
        steps.step()
    assert steps.machine_hash() == whole.machine_hash()
    assert steps.events() == whole.events()


def test_the_timeline_does_not_change_the_run() -> None:
    alone, watched = machine(everything(), 23), machine(everything(), 23)
    alone.run(5000)
    Timeline(watched, interval=70).run(5000)
    assert machine_hash(alone) == machine_hash(watched)


@pytest.mark.parametrize("seed", ["0", "12345"])
def test_another_process_sees_the_same_run(seed: str) -> None:
    code = f"import runpy; print(runpy.run_path({__file__!r})['digest']())"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ
        | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), *sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == digest()
