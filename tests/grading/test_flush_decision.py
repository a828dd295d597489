"""Exercise 06: what a flush policy is told, and what becomes of right, half-right, empty and hostile ones."""

from __future__ import annotations

import json

import pytest
from exercise_bench import (
    POSIX,
    SEEDS,
    Grade,
    all_guests,
    assert_no_decision_passes,
    changed,
    messages,
    more,
    plain_data,
    points,
    runs,
    scores,
    self_checks,
    tried,
    tried_with,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from xenlab.grading import exercise
from xenlab.grading.decisions import Unusable
from xenlab.grading.flush_slot import NEVER, NOT_MAPPED, FlushClock, FlushSlot, flush_of
from xenlab.grading.lessons import lesson
from xenlab.grading.lessons.flush_guests import STOPPED, Step
from xenlab.grading.lessons.lesson_06 import FlushDecision
from xenlab.hypervisor.tlb import FREED, RETYPED, FlushIfStale
from xenlab.machine.layout import ProbeError

STUDENTS = ("", "ada", "grace")
PASSED, EVERY = 'passed % RULES["top"]', 'RULES["every"]'
LIMIT = f"{PASSED} < {EVERY}[reason]"


class Right:
    """The rule, of one seed."""

    def __init__(self, made: FlushDecision) -> None:
        self.clock = made.clock

    def must_flush(self, reason: str, left: int, now: int) -> bool:
        passed = left - now if self.clock.down else now - left
        return left != NEVER and passed % self.clock.top < self.clock.behind(reason)


class Never:
    def must_flush(self, _reason: str, _left: int, _now: int) -> bool:
        return False


class Always:
    def must_flush(self, _reason: str, _left: int, _now: int) -> bool:
        return True


# What is changed in the solution, the points that are left (for the last check, at most), and what the report says.
MISTAKES: dict[str, tuple[str, str, tuple[int, int, int], str]] = {
    "wrap forgotten, unsafe": (LIMIT, f"passed in range({EVERY}[reason])", (3, 2, 3), "-in-a-new-turn'"),
    "wrap forgotten, dear": (LIMIT, f"passed < {EVERY}[reason]", (4, 3, 1), "a flush for nothing"),
    "distance without a sign": (LIMIT, f"abs(passed) < {EVERY}[reason]", (3, 2, 2), "-in-a-new-turn'"),
    "never forgotten": ("if left == 0:", "if False:", (4, 3, 2), "no TLB can hold a translation of it"),
    "one too many": (LIMIT, LIMIT.replace("<", "<="), (4, 3, 1), "a flush for nothing"),
    "one too few": (LIMIT, LIMIT + " - 1", (0, 0, 0), "no frame is at the same time a page table"),
    "larger lag for both": (LIMIT, f"{PASSED} < max({EVERY}.values())", (4, 3, 1), "for nothing"),
    "retyped only": ("if left == 0:", 'if left == 0 or reason == "freed":', (4, 0, 2), "is free and not all zeros"),
    "freed only": ("if left == 0:", 'if left == 0 or reason == "retyped":', (0, 3, 0), "only with some success"),
    "the other direction": ('== "up"', '!= "up"', (0, 0, 0), "must answer True, it answered False"),
}


@pytest.mark.parametrize("student", [STUDENTS[0], *more(*STUDENTS[1:])])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_costs_where_it_is_one(mistake: str, student: str) -> None:
    report = tried_with("06", MISTAKES[mistake], student)
    _there, _instead, left, said = MISTAKES[mistake]
    assert points(report)[:2] == left[:2], report.text()
    assert points(report)[2] <= left[2]
    assert said in messages(report), report.text()


def test_a_half_right_submission_keeps_the_other_half(judged: Grade) -> None:
    there, instead, left, said = MISTAKES["retyped only"]
    report = judged("06", changed("06", there, instead), "ada")
    assert points(report)[:2] == left[:2]
    assert said in messages(report)


@pytest.mark.parametrize("student", STUDENTS)
def test_the_smaller_lag_for_both_is_unsafe_for_one_reason(student: str) -> None:
    report = tried_with("06", (LIMIT, f"{PASSED} < min({EVERY}.values())"), student)
    every = exercise("06", student).parameters["every"]
    safe = (4, 0) if every[RETYPED] < every[FREED] else (0, 3)
    assert points(report)[:2] == safe


OURS = "from xenlab.hypervisor.tlb import FlushIfStale as MyFlushPolicy"
OURS_AS_BASE = "from xenlab.hypervisor.tlb import FlushIfStale\nclass MyFlushPolicy(FlushIfStale): pass"
NEVER_FLUSH = "class MyFlushPolicy:\n    def must_flush(self, reason, left, now):\n        return False"


@pytest.mark.parametrize("student", [STUDENTS[0], *more(*STUDENTS[1:])])
@pytest.mark.parametrize("answer", [OURS, OURS_AS_BASE, NEVER_FLUSH])
def test_the_shipped_policy_and_never_flushing_earn_nothing(judged: Grade, answer: str, student: str) -> None:
    assert judged("06", answer, student).score == 0


@pytest.mark.parametrize("student", STUDENTS)
def test_always_flushing_is_safe_and_dear(student: str) -> None:
    report = tried("06", NEVER_FLUSH.replace("False", "True"), student)
    assert points(report) == (4, 3, 0)
    assert "must answer False, it answered True: a flush for nothing" in messages(report)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("1 / 0", "raised ZeroDivisionError: division by zero (line 3"),
        ("raise SystemExit(3)", "raised SystemExit"),
        pytest.param("while True: pass", "did not answer within 0.05 s of CPU time", marks=POSIX),
        ("pass", "must return True or False, it returned None"),
        ("return now - left", "must return True or False, it returned"),
        ("return {'flush': True}", "must return True or False, it returned {'flush': True}"),
        ("return type('B', (), {'__class__': bool})()", "must return True or False, it returned <"),
    ],
)
def test_nonsense_is_named_at_its_step(body: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xenlab.grading.flush_slot.ANSWER_SECONDS", 0.05)  # of each guest
    report = tried("06", f"class MyFlushPolicy:\n    def must_flush(self, reason, left, now):\n        {body}", "ada")
    assert report.score == 0
    assert "first wrong step: instruction" in messages(report)
    assert said in messages(report)


def test_a_part_that_cannot_be_made_is_named(judged: Grade) -> None:
    report = judged("06", "class MyFlushPolicy:\n    def __init__(self):\n        raise ValueError('not today')")
    assert report.score == 0
    assert "MyFlushPolicy() raised ValueError: not today" in messages(report)


def test_nonsense_is_reported_by_the_judge_too(judged: Grade) -> None:
    report = judged("06", "class MyFlushPolicy:\n    def must_flush(self, *told):\n        return told", "ada")
    assert (report.score, report.error) == (0, None)
    assert "must return True or False, it returned (" in messages(report)


def test_forged_decisions_are_only_wrong_decisions() -> None:
    forged = ([], [{"flush": 1}], ["flush"], [{"flush": False}] * 9, [{"flush": True}], [None], 7)
    assert_no_decision_passes(lesson("06", 5), forged)


@given(plain_data("flush", "unusable"))
def test_any_decision_is_usable_or_named(decision: object) -> None:
    usable = isinstance(decision, dict) and "unusable" not in decision and isinstance(decision.get("flush"), bool)
    if usable:
        assert flush_of(decision) is decision["flush"]  # type: ignore[index]
    else:
        with pytest.raises(Unusable):
            flush_of(decision)


def test_self_checks_name_the_first_wrong_step_and_what_came_of_it() -> None:
    made = exercise("06", "ada")
    failed = made.check("06.1", Never)
    assert not failed
    assert "first wrong step: instruction" in repr(failed)
    assert "int 0x82" in repr(failed)
    assert "the TLB has not been emptied since then" in repr(failed)
    assert "the guest then stored through the translation that was left; the auditor:" in repr(failed)
    written = repr(made.check("06.2", Never))
    assert "the guest then had the hypervisor write through the translation that was left" in written
    assert made.check("06.1", Always)
    assert made.check("06.2", Always)
    assert "a flush for nothing" in repr(made.check("06.3", Always))


@pytest.mark.parametrize("forgotten", ["wrap forgotten, unsafe", "wrap forgotten, dear", "never forgotten"])
def test_self_checks_do_not_give_all_away(forgotten: str) -> None:
    assert self_checks("06", MISTAKES[forgotten], "grace")[:2] == [True, True]


def test_a_cpu_that_forgets_by_itself_judges_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ProbeError("forced")

    made = lesson("06", 0)
    assert isinstance(made, FlushDecision)
    on_probed = [scores(made, part) for part in (lambda: Right(made), Always, FlushIfStale)]
    monkeypatch.setattr("xenlab.machine.machine.probe", fail)
    assert [scores(made, part) for part in (lambda: Right(made), Always, FlushIfStale)] == on_probed
    tried = exercise("06", "ada")
    assert "this machine's CPU had dropped the translation by itself" in repr(tried.check("06.1", Never))
    # The hypervisor's own translations are the same on each.
    assert "had the hypervisor write" in repr(tried.check("06.2", Never))


# What the guests are, for any seed.


@given(SEEDS)
@settings(max_examples=6, deadline=None)
def test_any_seed_tells_right_from_ours_never_and_always(seed: int) -> None:
    made = lesson("06", seed)
    assert isinstance(made, FlushDecision)
    assert scores(made, lambda: Right(made)) == (4, 3, 3)
    assert scores(made, Always) == (4, 3, 0)
    assert sum(scores(made, FlushIfStale)) == sum(scores(made, Never)) == 0


def told(clock: FlushClock, step: Step) -> tuple[str, int, int, int]:
    if step.left == NOT_MAPPED:
        return step.reason, NEVER, clock.reading(step.now), NOT_MAPPED
    return step.reason, clock.stamp(step.reason, step.left), clock.reading(step.now), step.now - step.left


@given(SEEDS)
@settings(max_examples=6, deadline=None)
def test_guests_ask_what_their_story_says(seed: int) -> None:
    made = lesson("06", seed)
    assert isinstance(made, FlushDecision)
    for guest, run in runs(made, lambda: Right(made)):
        expected = [told(made.clock, step) for step in guest.steps]
        assert [(asked.reason, asked.left, asked.now, asked.since) for asked in run.flushes] == expected
        assert run.domain.console == STOPPED * len(guest.steps)
        counts = run.xen.tlb.counts
        assert counts[RETYPED] + counts[FREED] == sum(bool(asked.answer) for asked in run.flushes)


@given(SEEDS)
def test_guests_of_any_seed_cross_every_edge(seed: int) -> None:
    made = lesson("06", seed)
    assert isinstance(made, FlushDecision)
    clock = made.clock
    for check, reason in (("06.1", RETYPED), ("06.2", FREED)):
        steps = [step for guest in all_guests(made) if guest.check == check for step in guest.steps]
        behind = clock.behind(reason)
        stale = [step for step in steps if step.left == step.now]
        assert {step.left % behind for step in stale} == set(range(behind))
        # The copy still says what the clock said in the turn before.
        assert any((step.now - step.now % behind) // clock.top != step.now // clock.top for step in stale)
        assert any(step.now - step.left >= clock.top for step in steps)
    for guest in all_guests(made):
        if guest.check != "06.3":
            # Whoever compares stamp and clock is wrong in each.
            assert any(clock.stamp(step.reason, step.left) != clock.reading(step.now) for step in guest.steps)


@given(SEEDS)
def test_the_rule_is_what_can_be_known(seed: int) -> None:
    made = lesson("06", seed)
    assert isinstance(made, FlushDecision)
    right, top = Right(made), made.clock.top
    for reason in (RETYPED, FREED):
        for left in range(top + 1):
            for now in range(1, top + 1):
                assert right.must_flush(reason, left, now) == made.clock.may_be_stale(reason, left, now)


@given(
    st.builds(FlushClock, st.integers(2, 30), st.integers(0, 1), st.integers(1, 6), st.integers(1, 6)),
    st.integers(-50, 500),
    st.integers(0, 40),
)
def test_a_mapping_that_just_went_away_may_always_be_stale(clock: FlushClock, count: int, later: int) -> None:
    for reason in (RETYPED, FREED):
        assert 1 <= clock.reading(count) <= clock.top
        assert clock.may_be_stale(reason, clock.stamp(reason, count), clock.reading(count))
        assert clock.stamp(reason, count + later) in {
            clock.reading(count + later - lag) for lag in range(clock.behind(reason))
        }


def test_the_part_is_not_asked_before_a_guest_runs() -> None:
    slot = FlushSlot(None, FlushClock(11, 0, 2, 3), None)  # type: ignore[arg-type]
    assert slot.must_flush(RETYPED, 4, 4) is False
    assert slot.asked == []


def test_the_slot_reaches_the_students_process_as_plain_numbers() -> None:
    slot = lesson("06", 1).slot
    assert json.loads(json.dumps(list(slot.rules))) == list(slot.rules)
    assert FlushClock(*slot.rules) == lesson("06", 1).clock  # type: ignore[attr-defined]
