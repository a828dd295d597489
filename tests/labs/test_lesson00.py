"""The scenes of lesson 00 say what the machine did."""

from __future__ import annotations

import base64
import json
import re

import pytest

from xenlab import guests
from xenlab.hypervisor.core import Hypervisor
from xenlab.labs import lesson00
from xenlab.timeline import Timeline
from xenlab.views.machine import MachineView

PAGE = 4096


@pytest.fixture
def counters() -> Hypervisor:
    counter = guests.source("counter")
    return lesson00.start({"one": counter, "two": counter})


def rows(text: str) -> list[list[str]]:
    """The cells of a table below its headings."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.split("\n")[2:]]


def test_start_boots_in_order(counters: Hypervisor) -> None:
    assert [domain.name for domain in counters.domains.values()] == ["one", "two"]
    assert counters.now == 0


def test_listing_has_the_bytes_that_are_loaded() -> None:
    source = guests.source("hello")
    xen = lesson00.start({"hello": source})
    found = rows(lesson00.listing(source))
    guest = xen.domains[0]
    for address, shown, *_ in found:
        code = bytes.fromhex(shown.removesuffix(" …"))
        assert xen.guest_memory.read(guest.vcpus[0], int(address, 16), len(code)) == code
    assert [row[2] for row in found].count("int 0x82") == 2


@pytest.mark.parametrize(
    ("line", "meaning"),
    [("start: nop", "nop"), (".long 7", "(4 bytes of data)"), ('a: b: .ascii "nop"', "(3 bytes of data)")],
)
def test_listing_tells_data_from_code(line: str, meaning: str) -> None:
    assert rows(lesson00.listing(line))[0][2] == meaning


def test_listing_covers_every_byte_once() -> None:
    source = guests.source("rings")
    found = rows(lesson00.listing(source))
    addresses = [int(row[0], 16) for row in found]
    assert addresses == sorted(set(addresses))


def test_turns_follow_the_scheduler(counters: Hypervisor) -> None:
    counters.run(250_000)
    assert rows(lesson00.turns(counters)) == [
        ["0", "nobody", "0 one", "100,000"],
        ["100,000", "0 one", "1 two", "100,000"],
        ["200,000", "1 two", "0 one", "100,000"],
    ]
    assert len(rows(lesson00.turns(counters, most=1))) == 1


def test_start_info_is_what_the_guest_finds(counters: Hypervisor) -> None:
    domain = counters.domains[1]
    info = lesson00.start_info(counters, domain)
    assert info.nr_pages == len(domain.frames)
    assert info.shared_info == domain.shared_info_mfn * PAGE
    assert f"{info.mfn_list:#010x}" in lesson00.start_info_table(info)


def test_frames_show_the_same_bytes_both_ways(counters: Hypervisor) -> None:
    for domain in counters.domains.values():
        for pfn, mfn, _virtual, seen, machine, there in rows(lesson00.frames(counters, domain, [0, 2, 3, 4])):
            assert domain.frames[int(pfn)] == int(mfn, 16) == int(machine, 16) // PAGE
            assert seen == there


def test_trace_file_is_a_trace(counters: Hypervisor) -> None:
    timeline = Timeline(counters)
    timeline.seek(150_000)
    file = lesson00.TraceFile(timeline, 'run".json')
    link = file._repr_html_()
    assert 'download="run&quot;.json"' in link
    found = re.search(r"base64,([^\"]*)\"", link)
    assert found is not None
    events = json.loads(base64.b64decode(found[1]))["traceEvents"]
    running = [event["dur"] for event in events if event["name"] == "running"]
    assert running == [100.0, 50.0]


def test_the_four_of_the_lesson() -> None:
    four = {
        "endless": "start: jmp start",
        "nowhere": "mov eax, 0x40000000\njmp eax",
        "hello": guests.source("hello"),
        "counter": guests.source("counter"),
    }
    xen = lesson00.start(four)
    xen.run(1_000_000)
    endless, nowhere, hello, counter = xen.domains.values()
    assert nowhere.crashed
    assert "0x40000000" in nowhere.report
    assert hello.console == "Hello from ring 1\n"
    assert not endless.ended
    assert counter.console
    assert [row.state for row in MachineView(xen).rows()][1] == "crashed"
