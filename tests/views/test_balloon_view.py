"""Memory against targets: what the picture says is what the domains have, and what the trace remembers."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from xenlab import Hypervisor, Machine, boot, guests
from xenlab.hypervisor.trace import Trace
from xenlab.timeline import Timeline
from xenlab.toolstack.balloon import Balance, SetMaximum, SetMinimum, SetTarget
from xenlab.views import BalloonView

SVG = "{http://www.w3.org/2000/svg}"


def machine(*plans: str, trace: bool = True) -> Hypervisor:
    xen = Hypervisor(Machine(4), trace=Trace() if trace else None)
    for number, plan in enumerate(plans):
        domain = boot(xen, guests.source("balloon"), name=f"guest {number}", command_line=plan)
        xen.submit(SetMinimum(domain.domid, 50))
        xen.submit(SetMaximum(domain.domid, 420))
    xen.run(1)
    return xen


def drawn(view: BalloonView) -> str:
    root = ElementTree.fromstring(view.svg())
    return "\n".join("".join(node.itertext()) for node in root.iter(f"{SVG}text"))


def test_numbers_are_those_of_the_domains() -> None:
    xen = machine("", "")
    xen.run(100_000)
    xen.submit(SetTarget(1, 100))
    xen.run(100_000)
    untold, told = BalloonView(xen).rows()
    assert (untold.has, untold.target, told.has, told.target) == (256, None, 100, 100)
    assert (told.least, told.most, told.need) == (50, 420, 14)
    assert told.history[0] == (0, 256)
    assert told.history[-1][1] == 100
    assert [pages for _time, pages in told.targets] == [100]
    assert "1       guest 1  100    100     14     50       420      100            256" in BalloonView(xen).text()
    assert "100 → 100" in drawn(BalloonView(xen))
    assert "needs 14" in drawn(BalloonView(xen))


def test_the_curve_shows_the_past_up_to_now_only() -> None:
    timeline = Timeline(machine("4: 20x20, 300x60"))
    timeline.submit(Balance(interval=5_000))
    timeline.run(150_000)
    view = BalloonView(timeline.hypervisor)
    late = view.rows()[0]
    timeline.seek(30_000)
    early = view.rows()[0]
    assert early.history == [point for point in late.history if point[0] <= 30_000]
    assert early.has == early.history[-1][1] < late.has


def test_a_span_leaves_out_what_is_older() -> None:
    xen = machine("4: 300x20, 20x20")
    xen.submit(Balance(interval=5_000))
    xen.run(200_000)
    assert "150,001" in drawn(BalloonView(xen, span=50_000))
    assert "0\n200,001 instructions" in drawn(BalloonView(xen))
    assert len(BalloonView(xen, span=50_000).svg()) <= len(BalloonView(xen).svg())


def test_a_long_past_makes_no_long_picture() -> None:
    xen = machine("")
    xen.run(50_000)
    for turn in range(3_000):
        xen.submit(SetTarget(0, 200 + turn % 7))
        xen.run(50)
    assert len(BalloonView(xen).svg()) < 20_000


@pytest.mark.parametrize("count", [1, 5, 9])
def test_many_domains(count: int) -> None:
    xen = Hypervisor(Machine(16), trace=Trace())
    for _number in range(count):
        boot(xen, "start: jmp start")
    assert ("and 3 more domains" in drawn(BalloonView(xen))) == (count == 9)
    assert len(BalloonView(xen).rows()) == count


def test_both_forms_are_there_small_and_repeatable() -> None:
    one, other = (BalloonView(machine("4: 20x20, 300x60")) for _number in range(2))
    bundle = one._repr_mimebundle_()
    assert set(bundle) == {"image/svg+xml", "text/plain"}
    assert bundle == other._repr_mimebundle_()
    assert bundle != BalloonView(machine("", "", ""))._repr_mimebundle_()


def test_the_height_stays_while_a_run_goes_on() -> None:
    xen = machine("4: 300x20, 20x20", "")
    xen.submit(Balance(interval=5_000))
    heights = set()
    for _turn in range(20):
        xen.run(5_000)
        heights.add(ElementTree.fromstring(BalloonView(xen).svg()).get("viewBox"))
    assert len(heights) == 1


def test_names_are_harmless_and_a_machine_may_be_empty() -> None:
    xen = Hypervisor(Machine(4))
    assert "No domain yet." in drawn(BalloonView(xen))
    boot(xen, "start: jmp start", name='"><script>\x07')
    assert not list(ElementTree.fromstring(BalloonView(xen).svg()).iter(f"{SVG}script"))


def test_without_a_trace_there_is_still_now() -> None:
    xen = machine("", trace=False)
    xen.run(100_000)
    (row,) = BalloonView(xen).rows()
    assert (row.has, row.target, row.history) == (256, None, [])
    assert "256" in drawn(BalloonView(xen))
