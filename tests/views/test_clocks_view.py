"""Three clocks side by side: what the picture says is what the guests could read, and what the trace remembers."""

from __future__ import annotations

from itertools import pairwise
from xml.etree import ElementTree

import pytest

from xenlab import Hypervisor, Machine, boot, guests
from xenlab.hypervisor.accounting import usage
from xenlab.hypervisor.clocks import to_ns
from xenlab.hypervisor.schedulers import RoundRobin
from xenlab.hypervisor.trace import Trace
from xenlab.timeline import Timeline
from xenlab.toolstack.clock import SetWallClock
from xenlab.views import ClocksView
from xenlab.views.clock_rows import RAN, SLEPT, WAITED, time_by
from xenlab.views.clocks import clock_face, milliseconds

SVG = "{http://www.w3.org/2000/svg}"
PLANS = ("t 100000 w 4000000000", "t 0 ( v 150000 w 150000 )", "t 0 ( r 250000 s w 20000 )")


def machine(*plans: str, trace: bool = True, turn: int = 100_000) -> Hypervisor:
    xen = Hypervisor(Machine(8), scheduler=RoundRobin(turn), trace=Trace() if trace else None)
    for number, plan in enumerate(plans):
        boot(xen, guests.source("clocks"), name=f"guest {number}", command_line=plan)
    return xen


def drawn(view: ClocksView) -> str:
    root = ElementTree.fromstring(view.svg())
    return "\n".join("".join(node.itertext()) for node in root.iter(f"{SVG}text"))


def axis(view: ClocksView) -> list[str]:
    """The numbers below the lanes."""
    return [line for line in drawn(view).splitlines() if line.replace(".", "").removesuffix(" ms").isdigit()]


def test_clocks_are_those_of_the_guest() -> None:
    xen = machine("n w 100000 n", "w 4000000000", turn=30_000)
    xen.run(400_000)
    first = ClocksView(xen).rows()[0]
    at = xen.domains[0].symbols["notes"]
    real, virtual = (
        int.from_bytes(xen.guest_memory.read(xen.domains[0].vcpus[0], at + place, 8), "little") for place in (16, 24)
    )
    assert real < first.real_ns == to_ns(xen.now) == time_by(first.record, xen.now)
    assert virtual <= first.virtual_ns == to_ns(usage(xen, xen.domains[0]).running)
    assert first.virtual_ns < first.real_ns
    assert f"virtual {milliseconds(first.virtual_ns)} ms" in drawn(ClocksView(xen))


def test_stretches_add_up_and_are_the_hypervisor_s_own_account() -> None:
    xen = machine(*PLANS)
    xen.run(1_234_567)
    for row in ClocksView(xen).rows():
        account = usage(xen, xen.domains[row.domid])
        for what, total in ((RAN, account.running), (WAITED, account.runnable), (SLEPT, account.blocked)):
            assert sum(until - since for said, since, until in row.stretches if said == what) == total
        assert all(before[2] == after[1] for before, after in pairwise(row.stretches))
        assert row.stretches[-1][2] == xen.now


def test_alarms_and_ticks_are_where_they_went_off() -> None:
    xen = machine(*PLANS)
    xen.run(1_200_000)
    ticks, works, sleeps = ClocksView(xen).rows()
    assert {name for _time, name in ticks.went_off} == {"tick"}
    assert ticks.ticks + len(ticks.missed) in (10, 11, 12)
    assert len(ticks.missed) > 2
    running = [(since, until) for what, since, until in ticks.stretches if what == RAN]
    assert not any(since < time < until for time in ticks.missed for since, until in running)
    assert list(works.alarms) == ["virtual"]
    assert list(sleeps.alarms) == ["real"]
    assert len(works.sets) == len(works.went_off) + 1
    text = ClocksView(xen).text()
    assert f"{len(sleeps.went_off)}               0        0      0" in text
    assert "ticks: " in drawn(ClocksView(xen))


def test_alarms_that_were_taken_away_are_gone() -> None:
    xen = machine("r 50000 v 60000 w 1000 x w 10000 y w 10000")
    xen.run(1_000)
    assert set(ClocksView(xen).rows()[0].alarms) == {"real", "virtual"}
    assert "real alarm at 0.50" in drawn(ClocksView(xen))
    xen.run(4_000)
    assert set(ClocksView(xen).rows()[0].alarms) == {"virtual"}
    xen.run(20_000)
    assert not ClocksView(xen).rows()[0].alarms


def test_the_wall_clock_is_that_of_the_shared_page() -> None:
    xen = machine("")
    xen.run(100)
    before = ClocksView(xen).rows()[0].wall
    assert clock_face(before).startswith("2003-10-20 00:00:00.000")
    xen.submit(SetWallClock(0, 7_000_000))
    xen.run(100)
    assert clock_face(ClocksView(xen).rows()[0].wall).startswith("1970-01-01 00:00:00.007")
    xen.submit(SetWallClock((1 << 62) - 1))
    xen.run(1)
    assert "wall" in drawn(ClocksView(xen))


def test_the_past_is_shown_up_to_now_only() -> None:
    timeline = Timeline(machine(*PLANS))
    timeline.run(900_000)
    view = ClocksView(timeline.hypervisor)
    late = view.text()
    timeline.seek(400_000)
    assert all(time <= 400_000 for row in view.rows() for time, _name in row.went_off)
    assert "4.00000 ms since power-on" in view.text()
    timeline.seek(900_000)
    assert view.text() == late


def test_a_span_leaves_out_what_is_older() -> None:
    xen = machine(*PLANS)
    xen.run(1_000_000)
    assert "\n5.00000\n" in drawn(ClocksView(xen, span=500_000))
    assert len(ClocksView(xen, span=100_000).svg()) < len(ClocksView(xen).svg())


def test_a_long_past_makes_no_long_picture() -> None:
    xen = machine("t 0 ( r 500 s )", "t 0 ( v 500 w 500 )", turn=1_000)
    xen.run(3_000_000)
    assert len(ClocksView(xen).svg()) < 150_000


@pytest.mark.parametrize("count", [1, 5, 7])
def test_many_domains(count: int) -> None:
    xen = Hypervisor(Machine(16), trace=Trace())
    for _number in range(count):
        boot(xen, "start: jmp start")
    xen.run(1_000)
    assert ("and 2 more domains" in drawn(ClocksView(xen))) == (count == 7)
    assert len(ClocksView(xen).rows()) == count


def test_a_domain_that_came_later_and_one_that_ended() -> None:
    xen = machine("w 1000 q", "w 4000000000")
    xen.run(300_000)
    late = boot(xen, guests.source("clocks"), command_line="w 4000000000")
    xen.run(300_000)
    ended, _other, newcomer = ClocksView(xen).rows()
    assert (ended.state, newcomer.domid) == ("ended", late.domid)
    assert newcomer.stretches[0][1] == 300_000
    assert ended.stretches[-1][2] < 2_000


def test_a_new_domain_with_the_number_of_an_old_one_begins_afresh() -> None:
    xen = machine("t 0 ( r 1000 s )")
    xen.run(20_000)
    xen.destroy(xen.domains[0])
    boot(xen, "start: jmp start")
    xen.run(1_000)
    (row,) = ClocksView(xen).rows()
    assert (row.went_off, row.sets, row.alarms) == ([], [], {})


def test_both_forms_are_there_small_and_repeatable() -> None:
    one, other = machine(*PLANS), machine(*PLANS)
    one.run(500_000)
    other.run(500_000)
    bundle = ClocksView(one)._repr_mimebundle_()
    assert set(bundle) == {"image/svg+xml", "text/plain"}
    assert bundle == ClocksView(other)._repr_mimebundle_()


def test_the_axis_grows_in_steps() -> None:
    timeline = Timeline(machine(*PLANS))
    ends = set()
    for _step in range(40):
        timeline.run(30_000)
        ends.add(axis(ClocksView(timeline.hypervisor))[-1])
    assert "12.00000 ms" in ends
    assert len(ends) < 20
    timeline.seek(0)
    assert axis(ClocksView(timeline.hypervisor)) == ["0.00000", "0.00250", "0.00500", "0.00750", "0.01000 ms"]


def test_a_mark_is_explained_with_the_instruction_that_set_it() -> None:
    timeline = Timeline(machine(*PLANS))
    timeline.run(1_200_000)
    view = ClocksView(timeline.hypervisor)
    keys = [group.get("data-event") for group in ElementTree.fromstring(view.svg()).iter(f"{SVG}g")]
    sleeps = next(key for key in keys if key and key.startswith("2.") and key.endswith(".real"))
    assert view.select(sleeps)
    text = view.text()
    assert "domain 2: the alarm on real time goes off; it was set to" in text
    called = next(line for line in text.splitlines() if line.startswith("▶"))
    assert "int 0x82" in called
    assert "set_real" in called
    assert called in drawn(view).splitlines()
    assert not view.select("2.7.real")
    # What has not happened yet cannot be explained; then the newest mark is.
    timeline.seek(201_000)
    assert "domain 2: the alarm on real time goes off" not in view.text()
    assert "ms, domain" in view.text()


def test_names_are_harmless_and_a_machine_may_be_empty() -> None:
    xen = Hypervisor(Machine(4))
    assert "No domain yet." in drawn(ClocksView(xen))
    boot(xen, "start: jmp start", name='"><script>\x07')
    assert not list(ElementTree.fromstring(ClocksView(xen).svg()).iter(f"{SVG}script"))


def test_without_a_trace_there_is_still_now() -> None:
    xen = machine("w 4000000000", trace=False)
    xen.run(10_000)
    (row,) = ClocksView(xen).rows()
    assert (row.virtual_ns, row.went_off) == (100_000, [])
