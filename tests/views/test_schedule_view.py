"""Who ran when: the picture says what the machine's accounts say, now and in the past, and sliders are inputs."""

from __future__ import annotations

from itertools import pairwise
from xml.etree import ElementTree

import pytest

from xenlab import Hypervisor, Machine, XenlabError, boot, guests
from xenlab.hypervisor.accounting import usage
from xenlab.hypervisor.inputs import Typed
from xenlab.hypervisor.schedulers import Bvt, Diary, RoundRobin, Scheduler
from xenlab.hypervisor.trace import Trace
from xenlab.timeline import Destroy, Timeline
from xenlab.toolstack.schedule import SetSchedule, SetScheduler
from xenlab.views import ScheduleView, allowance_slider, live, parameter_slider
from xenlab.views.schedule import Lane
from xenlab.views.widget import LiveView

SVG = "{http://www.w3.org/2000/svg}"
KEYS = (9_111, 19_222, 29_333)


def machine(scheduler: Scheduler | None = None, *, trace: bool = True, name: str = "keys") -> Hypervisor:
    """Two that always work, and one that works for 400 instructions after each key."""
    xen = Hypervisor(Machine(8), scheduler=scheduler or Diary(Bvt(50_000, 1_000)), trace=Trace() if trace else None)
    for place, work in enumerate((0, 0, 400)):
        boot(xen, guests.source("worker"), name=name if work else f"busy {place}", command_line=str(work))
    for time in KEYS:
        xen.inputs.submit(time, Typed(2, b"."))
    return xen


def lanes(xen: Hypervisor, span: int = 1 << 40) -> list[Lane]:
    return ScheduleView(xen, span=span).lanes()


def texts(view: ScheduleView) -> str:
    root = ElementTree.fromstring(view.svg())
    return "\n".join("".join(node.itertext()) for node in root.iter(f"{SVG}text"))


@pytest.mark.parametrize("scheduler", [Diary(Bvt(50_000, 1_000)), Diary(RoundRobin(1_500)), RoundRobin(1_500)])
def test_blocks_are_the_time_that_each_had(scheduler: Scheduler) -> None:
    xen = machine(scheduler)
    xen.run(40_000)
    for lane in lanes(xen):
        assert lane.ran == usage(xen, xen.domains[lane.domid]).running
        assert all(start < end for start, end in lane.runs)
    stretches = sorted(stretch for lane in lanes(xen) for stretch in lane.runs)
    assert stretches[0][0] == 0
    assert stretches[-1][1] == xen.now
    assert all(one[1] == two[0] for one, two in pairwise(stretches))


def test_lines_are_the_time_in_which_each_could_run() -> None:
    xen = machine()
    xen.run(40_000)
    for lane in lanes(xen):
        counted = usage(xen, xen.domains[lane.domid])
        assert sum(end - start for start, end in lane.ready) == counted.running + counted.runnable


def test_wakes_and_waits_are_those_of_the_keys() -> None:
    xen = machine()
    xen.run(40_000)
    busy, _other, keys = lanes(xen)
    assert busy.wakes == []
    assert [time for time, _wait in keys.wakes] == list(KEYS)
    assert 0 < max(keys.waits) <= 2_000
    xen.submit(SetSchedule(2, {"warp": 5_000}))
    xen.inputs.submit(45_678, Typed(2, b"."))
    xen.run(10_000)
    assert lanes(xen)[2].waits[-1] == 0
    line = next(line for line in ScheduleView(xen).text().splitlines() if line.startswith("2 "))
    assert line.split()[2:6] == ["blocked", f"{lanes(xen)[2].ran / xen.now:.1%}", "256", "5,000"]


def test_one_that_waits_has_no_wait_yet() -> None:
    xen = machine(Diary(RoundRobin(3_000)))
    xen.run(KEYS[1] + 1_000)
    assert lanes(xen)[2].wakes[-1][1] is None
    assert "2       keys    runnable" in ScheduleView(xen).text()
    ElementTree.fromstring(ScheduleView(xen).svg())


def test_clocks_move_only_while_their_vcpu_runs_and_by_its_weight() -> None:
    xen = machine()
    xen.submit(SetSchedule(1, {"weight": 512}))
    xen.run(40_000)
    for lane, weight in zip(lanes(xen)[:2], (256, 512), strict=True):
        for (time, actual, _evt), (later, after, _after) in pairwise(lane.clocks):
            ran = sum(max(0, min(end, later) - max(start, time)) for start, end in lane.runs)
            assert after - actual == pytest.approx(ran * 256 / weight, abs=1)


def test_the_window_shows_the_last_part_of_the_same() -> None:
    xen = machine()
    xen.run(40_000)
    for whole, part in zip(lanes(xen), lanes(xen, 7_500), strict=True):
        assert part.ran == sum(max(0, end - max(start, 32_500)) for start, end in whole.runs)
        assert all(start >= 32_500 for start, _end in part.runs + part.ready)
        assert part.clocks[-1] == whole.clocks[-1]
        assert part.clocks[0][0] == 32_500


def test_the_past_shows_nothing_of_the_future() -> None:
    timeline = Timeline(machine(), interval=1_000)
    timeline.submit(Typed(2, b"."))
    timeline.run(15_000)
    early = ScheduleView(timeline.hypervisor)
    then = (early.text(), early.svg())
    timeline.run(25_000)
    assert early.text() != then[0]
    timeline.seek(15_000)
    assert (early.text(), early.svg()) == then


def test_picture_and_text_say_the_same() -> None:
    xen = machine()
    xen.run(40_000)
    view = ScheduleView(xen, span=20_000)
    for lane in lanes(xen, 20_000):
        share = f"{lane.ran / 20_000:.1%}"
        assert share in texts(view)
        assert share in view.text()
    assert "instructions 20,000 to 40,000, Bvt, allowance 1,000" in texts(view)
    assert "instructions 20,000 to 40,000, Bvt, allowance 1,000" in view.text()


@pytest.mark.parametrize("moment", [0, 1])
def test_a_machine_that_has_hardly_begun(moment: int) -> None:
    xen = machine()
    xen.run(moment)
    ElementTree.fromstring(ScheduleView(xen).svg())
    assert "keys" in ScheduleView(xen).text()


def test_no_domain_no_trace_no_diary_and_an_ended_domain() -> None:
    for xen in (Hypervisor(Machine(4)), machine(RoundRobin(500), trace=False)):
        xen.run(1_000)
        ElementTree.fromstring(ScheduleView(xen).svg())
    xen = machine()
    xen.run(10_000)
    xen.destroy(xen.domains[1])
    xen.run(10_000)
    assert [lane.domid for lane in lanes(xen)] == [0, 2]
    ElementTree.fromstring(ScheduleView(xen).svg())


def test_a_guest_s_name_is_only_text() -> None:
    xen = machine(name='<script>"&\x07')
    xen.run(5_000)
    assert "<script>" in texts(ScheduleView(xen))
    assert "\x07" not in ScheduleView(xen).text()


def test_many_domains_are_counted() -> None:
    xen = Hypervisor(Machine(16), scheduler=Diary(Bvt(5_000, 500)), trace=Trace())
    for _ in range(11):
        boot(xen, guests.source("worker"))
    xen.run(20_000)
    assert "and 3 more domains" in texts(ScheduleView(xen))
    assert len(ScheduleView(xen).text().splitlines()) == 4 + 11


# Sliders ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def view() -> LiveView:
    xen = machine()
    return live(
        Timeline(xen, interval=1_000),
        ScheduleView(xen),
        sliders=(
            parameter_slider(xen, 1, "weight", low=64, high=1_024, step=64),
            parameter_slider(xen, 2, "warp", low=0, high=9_000, step=500),
            allowance_slider(xen, low=500, high=5_000, step=500),
        ),
    )


def values(view: LiveView) -> list[int]:
    return [frame["value"] for frame in view.sliders]


def slide(view: LiveView, place: object, value: object) -> None:
    view.command({"do": "slide", "slider": place, "n": value})


def test_sliders_show_the_machine_and_set_it(view: LiveView) -> None:
    assert values(view) == [256, 0, 1_000]
    view.command({"do": "step", "n": 5_000})
    for place, value in enumerate((512, 3_000, 2_000)):
        slide(view, place, value)
    # Shown at once, done when the run goes on.
    assert values(view) == [512, 3_000, 2_000]
    xen = view.player.timeline.hypervisor
    view.command({"do": "step", "n": 1})
    assert values(view) == [512, 3_000, 2_000]
    assert isinstance(xen.scheduler, Diary)
    assert xen.scheduler.parameters(32)["weight"] == 512
    assert xen.scheduler.parameters(64)["warp"] == 3_000
    assert xen.scheduler.scheduler.allowance == 2_000


def test_a_slider_in_the_past_begins_another_future(view: LiveView) -> None:
    view.command({"do": "step", "n": 20_000})
    slide(view, 0, 512)
    view.command({"do": "step", "n": 20_000})
    old = view.frames
    view.command({"do": "seek", "n": 10_000})
    assert values(view)[0] == 256
    assert view.end == 40_000
    slide(view, 0, 1_024)
    assert (view.position, view.end, view.status) == (10_000, 10_000, "From here on another future.")
    view.command({"do": "step", "n": 30_000})
    assert values(view)[0] == 1_024
    assert view.frames != old
    view.command({"do": "seek", "n": 9_000})
    assert values(view)[0] == 256


@pytest.mark.parametrize(("given", "set_to"), [(0, 64), (-5, 64), (1 << 50, 1_024), (100, 100)])
def test_a_slider_stays_in_its_range(view: LiveView, given: int, set_to: int) -> None:
    slide(view, 0, given)
    view.command({"do": "step", "n": 10})
    assert values(view)[0] == set_to


@pytest.mark.parametrize(("place", "value"), [(9, 5), (-1, 5), ("0", 5), (None, 5), (0, "x"), (0, None), ([], 1)])
def test_nonsense_from_the_page_moves_nothing(view: LiveView, place: object, value: object) -> None:
    slide(view, place, value)
    view.command({"do": "step", "n": 10})
    assert values(view) == [256, 0, 1_000]


def test_sliders_of_what_is_gone_are_off_and_say_so(view: LiveView) -> None:
    timeline = view.player.timeline
    timeline.submit(Destroy(1))
    timeline.submit(SetScheduler(RoundRobin(500)))
    view.command({"do": "step", "n": 10})
    assert [frame["off"] for frame in view.sliders] == [True, True, True]
    slide(view, 0, 512)
    assert view.status == "weight of domain 1: there is no such domain, or the scheduler has no such parameter"
    with pytest.raises(XenlabError, match="allowance"):
        view._sliders[2].move(timeline, 700)
