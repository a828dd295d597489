"""Further guests for exercise 09: at a step, at the end of a turn, while asleep, set twice, far off, many at once."""

from __future__ import annotations

from xenlab.grading.lessons.base import Guest
from xenlab.grading.lessons.lesson_09 import REAL_TIME, SETTING, TOGETHER, VIRTUAL_TIME, AlarmTimers
from xenlab.hypervisor.alarms import REAL, VIRTUAL


def guests(lesson: AlarmTimers) -> list[Guest]:
    """What the judge runs besides the guests of the self-checks."""
    return [*_real(lesson), *_virtual(lesson), *_setting(lesson), *_together(lesson)]


def _real(lesson: AlarmTimers) -> list[Guest]:
    working = " ".join(f"R {lesson.at(REAL, time, 31)} w 3000" for time in (1_500, 5_000, 9_000))
    staggered = [f"w {100 * number} {lesson.real(3_000 + 1_500 * number)}" for number in range(4)]
    return [
        lesson.guest(REAL_TIME, "working", f"{working} q"),
        lesson.guest(REAL_TIME, "exactly", f"{lesson.real(2_500, 6_000, before=0)} {lesson.real(8_000)} q"),
        lesson.guest(REAL_TIME, "between-turns", lesson.real(4_000, 8_500), lesson.real(6_000, 10_500), "w 9000 q"),
        lesson.guest(REAL_TIME, "soon", "r 190 s w 333 r 150 s w 77 r 170 s q"),
        lesson.guest(REAL_TIME, "staggered", *staggered),
    ]


def _virtual(lesson: AlarmTimers) -> list[Guest]:
    turn = 10 * lesson.rules.step[VIRTUAL]
    times = ((1_200, 4_000), (2_000, 5_000), (900, 3_000))
    at_the_step = lesson.virtual(1_800, 4_500, before=0)
    at_the_end = f"V {turn} w {turn} V {2 * turn} w {turn} V {lesson.at(VIRTUAL, 3 * turn + 900)} w 4000 q"
    both = f"R {lesson.at(REAL, 7_000)} V {lesson.at(VIRTUAL, 2_500)} w 9000 q"
    return [
        lesson.guest(VIRTUAL_TIME, "taking-turns", *(f"{lesson.virtual(*pair)} q" for pair in times)),
        lesson.guest(VIRTUAL_TIME, "asleep", f"V {lesson.at(VIRTUAL, 1_500)} p 9000 w 2000 q"),
        lesson.guest(VIRTUAL_TIME, "on-the-step", f"{at_the_step} {lesson.virtual(7_500)} q", "w 9000 q"),
        lesson.guest(VIRTUAL_TIME, "last-instruction", at_the_end, "w 9000 q", turn=turn),
        lesson.guest(VIRTUAL_TIME, "both-clocks", both, "w 5000 q"),
    ]


def _setting(lesson: AlarmTimers) -> list[Guest]:
    real, virtual = lesson.at(REAL, 4_000), lesson.at(VIRTUAL, 4_000)
    last = "r 3000 p 9000"
    return [
        lesson.guest(SETTING, "behind", f"V {virtual} w 600 V 5 w 5000 V 4 w 1000 {last} q"),
        lesson.guest(
            SETTING, "already-past", f"w 500 R 7 w 3000 V 9 w 2000 R {lesson.at(REAL, 9_000)} R 3 w 5000 {last} q"
        ),
        lesson.guest(SETTING, "out-of-reach", f"V {virtual} w 200 V 50000 w 3500 e w 22000 {last} q"),
        lesson.guest(SETTING, "waiting", f"R 27000 V 24500 w 32000 {last} q"),
        lesson.guest(SETTING, "taken-away", f"R {real} x w 3000 V {lesson.at(VIRTUAL, 6_000)} y w 3000 {last} q"),
        lesson.guest(SETTING, "later-then-sooner", f"R {real} R 9000 w 3000 R 12000 R 9500 w 7000 {last} q"),
        lesson.guest(SETTING, "on-both-clocks", f"V {virtual} V 7000 R {real} w 7000 V 11000 V 9000 w 5000 {last} q"),
    ]


def _together(lesson: AlarmTimers) -> list[Guest]:
    step, both = lesson.rules.step[REAL], lesson.meeting(3_000)
    four = [lesson.real(7_000, 12_000, before=3 * number + 1) for number in range(4)]
    # One more than may go off, and another one a step later, when the one that was left over is due again.
    chain = [lesson.real(7_000)] * (lesson.rules.most + 1) + [lesson.real(7_000 + step)]
    return [
        lesson.guest(TOGETHER, "four", *four, turn=600),
        lesson.guest(TOGETHER, "next-in-line", *chain, turn=600),
        lesson.guest(TOGETHER, "next-in-line-too", *reversed(chain), turn=600),
        lesson.guest(TOGETHER, "both-at-once", f"R {both - 5} V {both - 3} w 6000 q"),
        lesson.guest(TOGETHER, "both-again", f"V {both} R {both} w 6000 {lesson.real(15_000)} q"),
    ]
