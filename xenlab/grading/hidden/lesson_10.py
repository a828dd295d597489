"""Further guests for exercise 10: changed weights, debts, a greedy borrower, crowds, an idle one beside a hundred."""

from __future__ import annotations

from xenlab.grading.lessons.base import Guest
from xenlab.grading.lessons.lesson_10 import HUNDRED, SHARES, WAITING, WAKING, WITHOUT_END, BorrowedTime


def guests(lesson: BorrowedTime) -> list[Guest]:
    """What the judge runs besides the guests of the self-checks."""
    return [
        _eight(lesson),
        _changed(lesson),
        _small_riser(lesson),
        _borrower(lesson),
        _twice(lesson),
        _greedy(lesson),
        lesson.crowd("larger-crowd", 11),
        _beside_a_borrower(lesson),
        _beside_a_hundred(lesson),
    ]


def _warp(lesson: BorrowedTime) -> int:
    return 2 * lesson.rules.factor * lesson.rules.window


def _eight(lesson: BorrowedTime) -> Guest:
    rows = [lesson.row(size) for size in (2, 0, 1, 2, 3, 0, 1, 3)]
    return lesson.guest(SHARES, "eight", rows, 2_200, lesson.look.shares(), lesson.look.lengths)


def _changed(lesson: BorrowedTime) -> Guest:
    """Weights change in the middle of turns; shares follow from then on."""
    turn = lesson.rules.turn
    sets = [(500 * turn + 5 + place, place, lesson.weight(size), 0) for place, size in enumerate((2, 0, 1))]
    looks = (lesson.look.shares(0, 500), lesson.look.shares(504, 1_000))
    return lesson.guest(SHARES, "changed", [lesson.row(size) for size in range(3)], 1_000, *looks, sets=sets)


def _small_riser(lesson: BorrowedTime) -> Guest:
    rows = [lesson.row(0), lesson.row(0), lesson.row(0, WITHOUT_END)]
    keys = [(150 * lesson.rules.turn + 77, 2)]
    looks = (lesson.look.head_start(2), lesson.look.latency(2, lesson.rules.turn), lesson.look.lengths)
    return lesson.guest(WAKING, "late-and-small", rows, 420, *looks, keys=keys)


def _borrower(lesson: BorrowedTime) -> Guest:
    """Wakes once, borrows all it may, and works on: it has to pay."""
    rows = [*[lesson.row(2)] * 3, lesson.row(2, WITHOUT_END, _warp(lesson))]
    keys = [(80 * lesson.rules.turn + 123, 3)]
    looks = (lesson.look.latency(3, 10), lesson.look.in_one_go(3), lesson.look.head_start(3, borrowed=True))
    return lesson.guest(WAKING, "borrower", rows, 320, *looks, keys=keys)


def _twice(lesson: BorrowedTime) -> Guest:
    """Comes back when its clock is far ahead, which is what a warp is for, and again when it is not."""
    turn, window = lesson.rules.turn, lesson.rules.window
    rows = [*[lesson.row(2)] * 3, lesson.row(2, window - 60, _warp(lesson))]
    visits = [lesson.odd_time(number, 260) for number in range(1, 4)]
    keys = [(visit + later, 3) for visit in visits for later in (0, window + 3 * turn)]
    return lesson.guest(
        WAKING, "comes-back", rows, 900, lesson.look.latency(3, 10), lesson.look.in_one_go(3), keys=keys
    )


def _greedy(lesson: BorrowedTime) -> Guest:
    """Falls asleep in time to borrow again, and again."""
    window = lesson.rules.window
    rows = [lesson.row(1), lesson.row(1), lesson.row(1, window - 60, window)]
    keys = [(lesson.odd_time(number, 1), 2) for number in range(1, 1_190)]
    return lesson.guest(WAKING, "greedy", rows, 1_200, lesson.look.paid(2), keys=keys)


def _beside_a_borrower(lesson: BorrowedTime) -> Guest:
    window = lesson.rules.window
    rows = [lesson.row(0), lesson.row(1), lesson.row(2, window - 60, window)]
    keys = [(lesson.odd_time(number, 1), 2) for number in range(1, 290)]
    return lesson.guest(WAITING, "beside-a-borrower", rows, 300, lesson.look.conserved, lesson.look.waits, keys=keys)


def _beside_a_hundred(lesson: BorrowedTime) -> Guest:
    """The paper's experiment: a hundred that always work, and one that is hardly ever there."""
    rows = [*lesson.hundred(), lesson.row(1, lesson.rules.turn // 3, _warp(lesson))]
    keys = [(lesson.odd_time(number, 140), 100) for number in range(1, 40)]
    return lesson.guest(
        HUNDRED, "beside-a-hundred", rows, 5_600, lesson.look.latency(100, 10), lesson.look.shares(), keys=keys
    )
