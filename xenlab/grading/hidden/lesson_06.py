"""Further guests for exercise 06: every lag of the copies, the end of a turn, whole turns, no flush too many."""

from __future__ import annotations

from xenlab.grading.lessons.base import Guest
from xenlab.grading.lessons.flush_guests import Story
from xenlab.grading.lessons.lesson_06 import FlushDecision
from xenlab.hypervisor.tlb import FREED, RETYPED


def guests(lesson: FlushDecision) -> list[Guest]:
    """What the judge runs besides the guests of the self-checks."""
    return [
        *_attacks(lesson, "06.1", RETYPED, "table"),
        *_attacks(lesson, "06.2", FREED, "give-up"),
        lesson.guest("06.3", "edges", _edges(lesson)),
        lesson.guest("06.3", "long-ago", _long_ago(lesson)),
        lesson.guest("06.3", "new-turn", _new_turn(lesson)),
        lesson.guest("06.3", "never-mapped", _never_mapped(lesson)),
        lesson.guest("06.3", "two-reasons", _two_reasons(lesson)),
    ]


def _attacks(lesson: FlushDecision, check: str, reason: str, name: str) -> list[Guest]:
    behind = lesson.clock.behind(reason)
    every = lesson.story()
    for lag in reversed(range(behind)):
        _step(every.lag(reason, lag), reason)
    turned = _step(lesson.latest(reason).turned(reason), reason)
    turned = _step(turned.turned(reason), reason)
    waiting = _step(lesson.latest(reason).lag(reason, 0), reason, lesson.clock.top)
    return [
        lesson.guest(check, f"{name}-at-every-lag", every),
        lesson.guest(check, f"{name}-in-a-new-turn", turned),
        lesson.guest(check, f"{name}-after-a-turn", waiting),
    ]


def _step(story: Story, reason: str, since: int = 0) -> Story:
    return story.table(since) if reason == RETYPED else story.given_up(since)


def _edges(lesson: FlushDecision) -> Story:
    """The first flush after which there is no doubt, and the last one before it."""
    story = lesson.story()
    for reason in (FREED, RETYPED):
        behind = lesson.clock.behind(reason)
        for lag in range(behind):
            _step(story.lag(reason, lag), reason, behind - lag)
            _step(story.lag(reason, lag), reason, behind - lag - 1)
    return story


def _long_ago(lesson: FlushDecision) -> Story:
    """Half a turn, and a turn but for one reading."""
    story, top = lesson.story(), lesson.clock.top
    for reason in (RETYPED, FREED):
        _step(story.lag(reason, 1), reason, top // 2)
        _step(story.lag(reason, 0), reason, top - 1)
    return story


def _new_turn(lesson: FlushDecision) -> Story:
    """Stamps from the turn before, with the clock past them."""
    story = lesson.story()
    for reason in (FREED, RETYPED):
        behind = lesson.clock.behind(reason)
        _step(story.turned(reason), reason, behind)
        _step(story.where(lambda count: count % lesson.clock.top == lesson.clock.top - 1), reason, behind)
    return story


def _never_mapped(lesson: FlushDecision) -> Story:
    """Frames without a stamp, asked about when a turn of the clock begins: 0 is no reading just before."""
    top, since = lesson.clock.top, max(lesson.clock.retyped, lesson.clock.freed) + 1
    return lesson.story().where(lambda count: count % top == top - since).exchanged(since)


def _two_reasons(lesson: FlushDecision) -> Story:
    """The clock equally far from both stamps: enough for one reason, too little for the other."""
    story, distance = lesson.story(), min(lesson.clock.retyped, lesson.clock.freed)
    for reason in (RETYPED, FREED, RETYPED):
        _step(story.lag(reason, 0), reason, distance)
    return story
