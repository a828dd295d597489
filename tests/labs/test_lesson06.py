"""The scenes of lesson 06 show what the machine did."""

from __future__ import annotations

import pytest

from xenlab import XenlabError
from xenlab.abi.numbers import Shutdown
from xenlab.hypervisor.auditor import Invariant, audit
from xenlab.hypervisor.tlb import RETYPED
from xenlab.labs import lesson06
from xenlab.machine.accesses import AccessKind
from xenlab.machine.tlb import Tlb, TlbCost
from xenlab.timeline.access_log import Flush, Touch
from xenlab.views.tlb import TlbView


class NeverFlush:
    def must_flush(self, _reason: str, _left: int, _flushes: int) -> bool:
        return False


def columns(text: str) -> list[list[str]]:
    """The cells of a table below its heading; cells are two spaces apart."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()[2:]]


@pytest.mark.parametrize("pages", [1, 5, 60])
def test_a_walker_that_fits_misses_each_page_once(pages: int) -> None:
    run = lesson06.record(lesson06.walker(pages, rounds=4))
    assert run.through(Tlb(64, None)).misses == pages + 1
    assert run.xen.domains[0].ended


def test_working_sets_count_what_a_tlb_does() -> None:
    rows = columns(lesson06.working_sets((3, 9), lambda: Tlb(8, None), rounds=5))
    assert [(row[0], row[2], row[3]) for row in rows] == [("3", "4", "0.8"), ("9", "46", "9.2")]


def test_each_new_tlb_is_made_for_its_run() -> None:
    made: list[Tlb] = []

    def make() -> Tlb:
        made.append(Tlb())
        return made[-1]

    lesson06.working_sets((1, 2, 3), make)
    assert len({id(tlb) for tlb in made}) == 3


def test_without_its_flush_a_switch_leads_to_the_other_domain() -> None:
    run = lesson06.record(*lesson06.twins("xy"), instructions=200)
    assert {domain.console[:2] for domain in run.xen.domains.values()} == {"xx", "yy"}
    assert lesson06.wrong_answers(run, ()) == []
    wrong = lesson06.wrong_answers(run, ("switch",))
    assert {touch.kind for touch in wrong} == set(AccessKind)
    # Leaving out what did not happen changes nothing.
    assert lesson06.wrong_answers(run, ("retyped",)) == []


def test_wrong_answers_follow_the_flush_of_a_page() -> None:
    _timeline, run = lesson06.remap_timeline()
    changed = [entry for entry in run.log.entries if type(entry) is Flush and entry.reason == "page"]
    assert len(changed) == 1
    kept, left_out = lesson06.wrong_answers(run, ()), lesson06.wrong_answers(run, ("page",))
    # Once between change and flush; and without the flush, when it is read again.
    assert (len(kept), len(left_out)) == (1, 2)
    assert {touch.page for touch in left_out} == {run.xen.domains[0].symbols["window"] >> 12}


def test_the_window_is_stale_between_change_and_flush() -> None:
    timeline, run = lesson06.remap_timeline()
    view = run.view()
    assert isinstance(view, TlbView)
    stale = {}
    for label in ("flushed", "changed", "over", "start"):
        lesson06.run_to(timeline, label)
        stale[label] = [slot for slot in view.slots() if slot.now]
    assert [label for label, found in stale.items() if found] == ["changed"]
    timeline.run(200)
    keeps = lesson06.cpu_keeps_stale_entries()
    assert run.xen.domains[0].console == ("aab" if keeps else "abb")
    assert bool(run.log.stale()) is keeps
    # So that End leads to the end, and not into an endless loop.
    assert run.xen.domains[0].shutdown is Shutdown.POWEROFF


def test_a_label_that_is_never_reached_is_reported() -> None:
    timeline, _run = lesson06.remap_timeline()
    with pytest.raises(XenlabError, match="never came to 'window'"):
        lesson06.run_to(timeline, "window")


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("ask for the version", {}),
        ("have the version written to a page", {}),
        ("read a control register", {}),
        ("take an exception, and return", {}),
        ("change a page-table entry", {}),
        ("give up the CPU", {"switch": 6}),
        ("load a base pointer", {"base pointer": 3}),
        ("flush one page", {"page": 3}),
        ("flush all", {"asked": 3}),
        ("make an unmapped page a table", {"retyped": 3}),
        ("flush, and then make it a table", {"asked": 3}),
        ("give a page back, take another", {"freed": 3}),
    ],
)
def test_flushes_of_each_action(name: str, reasons: dict[str, int]) -> None:
    count = lesson06.flushes_of(lesson06.ACTIONS[name], rounds=3)
    assert count.reasons == reasons
    assert count.entered >= 3


def test_the_table_has_a_row_for_each_action() -> None:
    rows = columns(lesson06.flush_table({"nothing": "nop", "two exceptions": "ud2; ud2"}, rounds=5))
    assert rows == [["nothing", "0", "none"], ["two exceptions", "20", "none"]]
    assert set(lesson06.ACTIONS) == {row[0] for row in columns(lesson06.flush_table(rounds=1))}


def test_an_action_that_ends_the_guest_is_reported_with_its_crash() -> None:
    with pytest.raises(XenlabError, match=r"(?s)never came to 'done'.*exception 13"):
        lesson06.flushes_of("invlpg [spare]")


def test_a_policy_is_asked_and_obeyed() -> None:
    asked: list[tuple[str, int, int]] = []

    class Always:
        def must_flush(self, reason: str, left: int, flushes: int) -> bool:
            asked.append((reason, left, flushes))
            return True

    count = lesson06.flushes_of(lesson06.ACTIONS["flush, and then make it a table"], rounds=2, flush_policy=Always())
    assert count.reasons == {"asked": 2, "retyped": 2}
    assert [(reason, left < flushes) for reason, left, flushes in asked if left >= 0] == [(RETYPED, True)] * 2


def test_the_thief_is_refused_by_one_flush() -> None:
    xen, thief = lesson06.theft()
    assert thief.console == "-"
    assert audit(xen) == []
    assert xen.tlb.counts[RETYPED] == 1


@pytest.mark.parametrize("text", ["the plan", "another one"])
def test_without_that_flush_the_thief_gets_the_secret(text: str) -> None:
    xen, thief = lesson06.theft(NeverFlush(), text)
    if lesson06.cpu_keeps_stale_entries():
        assert thief.console == text
        assert {violation.invariant for violation in audit(xen)} >= {Invariant.OWNERSHIP}
    else:
        assert thief.console == "-"


def test_calls_are_as_many_as_asked_and_end_there() -> None:
    run = lesson06.calls(pages=3, count=7)
    assert run.log.traps() == 7
    assert run.xen.domains[0].vcpus[0].state.eip == run.xen.domains[0].symbols["stay"]
    pages = {entry.page for entry in run.log.entries if type(entry) is Touch and entry.kind is AccessKind.READ}
    assert len(pages) == 3


def test_the_price_of_a_call_follows_pages_and_prices() -> None:
    rows = columns(lesson06.price_of_a_call((1, 4)))
    assert [row[0] for row in rows] == ["1", "4"]
    # Each page more is one miss more, of two tables at 25 cycles; the two loads are the same.
    first, second = (float(row[3].replace(",", "")) for row in rows)
    assert second - first == pytest.approx(3 * 50, rel=0.02)
    free = columns(lesson06.price_of_a_call((1, 4), cost=TlbCost(level_cycles=0, flush_cycles=7)))
    assert [row[3] for row in free] == ["14", "14"]
    alone = columns(lesson06.price_of_a_call((1,), hypervisor_pages=0))
    assert float(alone[0][2]) == pytest.approx(2.0)
