"""Further guests for exercise 13: changing needs, three domains, minima that bind, out of memory while shrinking."""

from __future__ import annotations

from xenlab.grading.lessons.base import Guest
from xenlab.grading.lessons.lesson_13 import LIMITS, ORDER, REST, Ballooning


def guests(lesson: Ballooning) -> list[Guest]:
    """What the judge runs besides the guests of the self-checks."""
    near = lesson.margin - 1
    return [
        lesson.driver(
            "hardly-told", "2: 5x999", ((15_000, 256 + near), (30_000, 256 - near), (45_000, 256 - lesson.margin))
        ),
        lesson.driver("to-the-bottom", "1: 3x999", ((15_000, 1), (70_000, 60))),
        lesson.driver("needs-it-back", "5: 20x8, 150x999", ((15_000, 60),)),
        lesson.driver("more-than-it-may", "9: 350x999", ((15_000, 300),), 290),
        lesson.policy(LIMITS, "greedy", ("9: 600x999", 70, 450), ("9: 600x999", 110, 430), ("9: 600x999", 90, 300)),
        lesson.policy(LIMITS, "unequal", ("9: 10x20, 500x60", 200, 420), ("9: 300x20, 10x60", 30, 310)),
        lesson.policy(ORDER, "three", ("8: 400x40, 20x40", 60, 480), ("8: 20x40, 420x40", 80, 480), _steady()),
        lesson.policy(
            ORDER, "minima-bind", ("9: 500x999", 150, 500), ("9: 10x999", 330, 400), ("9: 450x999", 100, 500)
        ),
        lesson.policy(ORDER, "one-small", ("9: 600x999", 60, 300), ("9: 180x999", 70, 450), ("9: 600x999", 60, 400)),
        lesson.policy(ORDER, "alike", ("8: 450x999", 60, 500), ("8: 450x999", 60, 500), ("8: 450x999", 60, 500)),
        lesson.policy(REST, "nobody", ("", 40, 260), ("", 60, 300)),
        lesson.policy(
            REST, "three-small", ("6: 40x30, 90x30", 50, 340), ("6: 80x999", 40, 280), ("6: 20x999", 60, 500)
        ),
    ]


def _steady() -> tuple[str, int, int]:
    return "8: 250x999", 70, 480
