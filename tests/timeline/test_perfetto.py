"""The exported file: every domain has its track, and slices nest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xenlab import Hypervisor, Machine, boot
from xenlab.hypervisor.inputs import Typed
from xenlab.hypervisor.schedulers import RoundRobin
from xenlab.timeline import Timeline, save_perfetto, to_perfetto

GUEST = """
start:  mov ebx, CONSOLEIO_write
        mov ecx, 2
        mov edx, offset message
        mov eax, __HYPERVISOR_console_io
        int 0x82
        mov eax, cr0
        mov ebx, SCHEDOP_yield
        mov eax, __HYPERVISOR_sched_op
        int 0x82
        mov ecx, 40
wait:   loop wait
        jmp start
message: .ascii "hi"
"""


@pytest.fixture(scope="module")
def timeline() -> Timeline:
    xen = Hypervisor(Machine(8), scheduler=RoundRobin(33))
    for name in ("first", "second"):
        boot(xen, GUEST, name=name)
    timeline = Timeline(xen)
    timeline.run(500)
    timeline.submit(Typed(1, b"x"))
    timeline.run(500)
    return timeline


@pytest.fixture(scope="module")
def lines(timeline: Timeline) -> list[dict[str, Any]]:
    written = to_perfetto(timeline.events(), {0: "first", 1: "second"}, timeline.position)
    assert written["displayTimeUnit"] == "ns"
    found: list[dict[str, Any]] = written["traceEvents"]
    return found


def test_every_domain_has_its_track(lines: list[dict[str, Any]]) -> None:
    names = {line["pid"]: line["args"]["name"] for line in lines if line["name"] == "process_name"}
    assert names == {0: "outside", 1: "domain 0 first", 2: "domain 1 second"}
    threads = {(line["pid"], line["tid"]) for line in lines if line["name"] == "thread_name"}
    assert {(line["pid"], line["tid"]) for line in lines} == threads


def test_slices_of_a_thread_nest(lines: list[dict[str, Any]]) -> None:
    for thread in {(line["pid"], line["tid"]) for line in lines if line["ph"] == "X"}:
        slices = [
            (round(line["ts"] * 1000), round((line["ts"] + line["dur"]) * 1000))
            for line in lines
            if line["ph"] == "X" and (line["pid"], line["tid"]) == thread
        ]
        open_until: list[int] = []
        for start, end in sorted(slices, key=lambda found: (found[0], -found[1])):
            while open_until and open_until[-1] <= start:
                open_until.pop()
            assert not open_until or end <= open_until[-1]
            open_until.append(end)


def test_running_slices_fill_the_whole_time(lines: list[dict[str, Any]]) -> None:
    assert sum(line["args"]["instructions"] for line in lines if line["name"] == "running") == 1000


def test_each_line_has_what_the_importer_needs(lines: list[dict[str, Any]]) -> None:
    for line in lines:
        assert line["ph"] in ("X", "i", "M")
        assert {"name", "ts", "pid", "tid"} <= line.keys()
        assert line["ts"] >= 0
        assert line["ph"] != "X" or line["dur"] > 0
        assert line["ph"] != "i" or line["s"] == "t"


def test_hypercalls_and_instants_carry_what_happened(lines: list[dict[str, Any]]) -> None:
    calls = [line for line in lines if line["name"] == "console_io"]
    assert calls
    assert all(line["args"]["result"] == 0 for line in calls)
    assert {"console", "emulate", "input", "trap"} <= {line["name"] for line in lines if line["ph"] == "i"}
    (typed,) = (line for line in lines if line["name"] == "input")
    assert (typed["pid"], typed["ts"]) == (0, 0.5)


def test_the_file_is_json(timeline: Timeline, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    save_perfetto(path, timeline.events())
    assert json.loads(path.read_text("utf-8")) == to_perfetto(timeline.events())
