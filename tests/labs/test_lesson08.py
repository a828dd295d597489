"""The scenes of lesson 08 show what the machine did."""

from __future__ import annotations

import pytest

from xenlab import XenlabError
from xenlab.hypervisor.event_bits import XenBits
from xenlab.labs import lesson08
from xenlab.labs.lesson08 import HEARD, OVER_ITS_BIT, OVER_ITS_WORK


def columns(text: str) -> list[list[str]]:
    """The cells of a table below its heading; cells are two spaces apart."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()[2:]]


def test_only_stores_leave_a_kernel_alone() -> None:
    assert columns(lesson08.price_of_silence(7)) == [
        ["cli and sti", "none, it ended", "1"],
        ["two stores", "7", "0"],
    ]


def test_the_steps_of_one_event() -> None:
    run = lesson08.scene(lesson08.receiver(), lesson08.sender(1, pause=20))
    rows = columns(run.changes(0))
    assert [(row[1].split(",")[0], row[2]) for row in rows] == [
        ("Xen", "upcalls unmasked"),
        ("Xen", "port 1 pending, selector bit 0 set, upcall pending"),
        ("Xen", "upcalls masked"),
        ("the guest", "upcall flag cleared"),
        ("the guest", "selector bit 0 cleared"),
        ("the guest", "port 1 taken"),
        ("Xen", "upcalls unmasked"),
    ]
    assert run.at("port 1 taken") == int(rows[5][0]) == run.timeline.position
    with pytest.raises(XenlabError, match="'port 7 pending' did not happen in domain 0"):
        run.at("port 7 pending")


@pytest.mark.parametrize("count", [1, 30])
def test_sends_of_one_turn_are_one_upcall(count: int) -> None:
    xen = lesson08.many_sends(count, turn=10_000)
    assert (lesson08.upcalls(xen), lesson08.word(xen, "served", 1)) == (1, 1)
    assert sum(lesson08.events_by_end(xen).values()) == count


def test_a_storm_makes_fewer_upcalls_with_longer_turns() -> None:
    rows = columns(lesson08.storm((30, 300), count=100))
    assert [row[:2] for row in rows] == [["30", "100"], ["300", "100"]]
    assert int(rows[0][2]) > 3 * int(rows[1][2])


def test_with_time_between_each_send_is_heard() -> None:
    xen = lesson08.heard(count=4)
    assert (lesson08.upcalls(xen), lesson08.word(xen, "served", 1)) == (4, 4)


@pytest.mark.parametrize(
    ("way", "served", "over"), [("a store", 0, [1]), ("a store, and a look", 1, []), ("the hypercall", 1, [])]
)
def test_ways_to_open_a_port(way: str, served: int, over: list[int]) -> None:
    for part in (None, XenBits()):
        xen = lesson08.opened_by(way, part)
        assert (lesson08.word(xen, "served", 1), lesson08.waiting(xen)) == (served, over)


def test_ways_to_open_all() -> None:
    assert lesson08.delay("a store", turn=500) > 500
    assert lesson08.delay("a store, and a look", turn=500) < 20


def test_a_look_with_upcalls_open_loses_what_comes_behind_it() -> None:
    moments = lesson08.every_moment(lesson08.alone(lesson08.LOOKS_WITH_UPCALLS_OPEN))
    outcomes = [moment.outcome for moment in moments.all]
    assert outcomes == [HEARD] * 2 + [OVER_ITS_WORK] * 6
    assert "int 0x82" in moments.lost[-1].instruction
    assert "8 moments: heard at 2, lost at 6" in str(moments)
    closed = lesson08.every_moment(lesson08.alone(lesson08.LOOKS_WITH_UPCALLS_CLOSED))
    assert {moment.outcome for moment in closed.all} == {HEARD}
    assert str(closed) == "8 moments: heard at 8, lost at 0"


def test_clearing_behind_the_look_loses_the_bit() -> None:
    right = lesson08.every_moment(lesson08.alone(lesson08.OPEN_AND_SLEEP), woken=True)
    wrong = lesson08.every_moment(
        lesson08.alone(lesson08.OPEN_AND_SLEEP, callback=lesson08.CALLBACK_THAT_TIDIES_UP), woken=True
    )
    assert len(right.all) == len(wrong.all) == 26
    assert not right.lost
    assert {moment.outcome for moment in wrong.lost} == {OVER_ITS_BIT}
    assert "(next+0xf)" in wrong.lost[0].instruction
    assert "(done+0xa)" in wrong.lost[-1].instruction


def test_the_deaf_guest_never_hears_again() -> None:
    run = lesson08.deaf()
    assert lesson08.waiting(run.xen) == [1]
    assert lesson08.upcalls(run.xen) == 1
    assert lesson08.events_by_end(run.xen)["its bit was 1 already"] == 3
    # The view can be taken through all of it.
    run.timeline.seek(0)
    assert run.timeline.seek(10_000) == run.timeline.end


def test_polling_takes_no_upcall() -> None:
    xen = lesson08.polled(3)
    assert (lesson08.upcalls(xen), lesson08.word(xen, "served", 1)) == (0, 3)


@pytest.mark.parametrize(
    ("lifetimes", "told"), [((100, 200, 3_000), "EEE"), ((10, 10, 3_000), "EE"), ((10, 10, 10), "E"), ((), "")]
)
def test_domain_0_is_told_once_for_all_that_ended_before_its_turn(lifetimes: tuple[int, ...], told: str) -> None:
    xen = lesson08.deaths(lifetimes)
    assert xen.domains[0].console == told
    assert [domain.crashed for domain in xen.domains.values()] == [False] + [True] * len(lifetimes)


def test_a_guest_that_never_sleeps_is_reported() -> None:
    with pytest.raises(XenlabError, match="expected the guest to sleep by now"):
        lesson08.every_moment(lesson08.alone("again: jmp again\n"), woken=True)
