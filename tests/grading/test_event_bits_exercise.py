"""Exercise 08: what event bits are told, and what becomes of right, half-right, empty and hostile ones."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

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
from xenlab.grading.event_slot import EventRules, answer_of, effect
from xenlab.grading.lessons import lesson
from xenlab.grading.lessons.lesson_08 import INSISTENT, LOUD, QUIET, SendMaskBlock
from xenlab.hypervisor.domain import RunState
from xenlab.hypervisor.event_bits import XenBits, bits_of
from xenlab.hypervisor.trace import Kind

STUDENTS = ("", "ada", "grace")


class Right:
    """The rules, of one seed."""

    def __init__(self, rules: EventRules) -> None:
        self.rules = rules

    def send(self, *told: int) -> Any:
        return self.rules.right("send", told)

    def unmask(self, *told: int) -> Any:
        return self.rules.right("unmask", told)

    def block(self, *told: int) -> Any:
        return self.rules.right("block", told)


def made_for(seed: int) -> SendMaskBlock:
    made = lesson("08", seed)
    assert isinstance(made, SendMaskBlock)
    return made


# What is changed in the solution, which checks then keep all their points (1), lose some or all (0), and what is said.
IS_OPEN = 'bool(mask & bit) == bool(RULES["open"])'
MISTAKES: dict[str, tuple[str, str, tuple[int, int, int], str]] = {
    "insistent forgotten": ('not is_kind(port, "insistent")', "True", (0, 0, 0), "is insistent"),
    "all insistent": ('not is_kind(port, "insistent")', "False", (0, 0, 0), "for nothing"),
    "quiet forgotten": ('asleep or not is_kind(port, "quiet")', "True", (0, 0, 0), "for nothing"),
    "quiet while asleep": ('asleep or not is_kind(port, "quiet")', 'not is_kind(port, "quiet")', (1, 1, 0), "wakes"),
    "group of a word": ('port // RULES["group"]', "port // 32", (0, 0, 0), "broken: no event is lost"),
    "the other sense": (IS_OPEN, IS_OPEN.replace("==", "!="), (0, 0, 0), "broken: no event is lost"),
    "mask not looked at": ("if is_open(mask, bit):", "if True:", (1, 0, 0), "for nothing"),
    "no wake": ('{"wake": True} if asleep else {}', "{}", (1, 1, 0), "wakes a guest that sleeps"),
    "no look behind unmask": (
        "if pending & bit and not is_open(mask, bit):",
        "if False:",
        (1, 0, 0),
        "no event is lost",
    ),
    "always on at unmask": ("if pending & bit and not is_open(mask, bit):", "if pending & bit:", (1, 0, 1), "nothing"),
    "unmask without event": ("if pending & bit and not", "if not", (1, 0, 1), "for nothing"),
    "unmask does not open": ('mask | bit if RULES["open"] else mask & ~bit', "mask", (1, 0, 0), "a port's own bits"),
    "block looks at upcall only": (
        "if selector and not upcall:",
        "if False:",
        (1, 1, 0),
        "goes to sleep over an event",
    ),
    "block always sleeps": (
        'return {"sleep": not upcall}',
        'return {"sleep": True}',
        (1, 1, 0),
        "to sleep over an event",
    ),
    "block never sleeps": (
        'return {"sleep": not upcall}',
        'return {"sleep": False}',
        (1, 1, 0),
        "kept awake for nothing",
    ),
    "stops at the selector": (
        "    return changes\n",
        '    return {} if selector & 1 << port // RULES["group"] else changes\n',
        (0, 0, 0),
        "no event is lost",
    ),
}


@pytest.mark.parametrize("student", [STUDENTS[0], *more(STUDENTS[1])])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_costs_where_it_is_one(mistake: str, student: str) -> None:
    _there, _instead, kept, said = MISTAKES[mistake]
    report = tried_with("08", MISTAKES[mistake], student)
    whole = [check.points == check.max_points for check in report.checks]
    assert all(found for found, expected in zip(whole, kept, strict=True) if expected), report.text()
    # What is wrong in one rule shows in one of the checks at least.
    assert not all(found for found, expected in zip(whole, kept, strict=True) if not expected), report.text()
    assert said in messages(report)
    assert "first wrong step: instruction" in messages(report)


HALF = """
class MyEventBits:
    def send(self, port, pending, mask, selector, upcall, asleep):
        bit, rules = 1 << port % 32, exercise.parameters
        if pending & bit:
            return {}
        if bool(mask & bit) != bool(rules["open"]):
            return {"pending": pending | bit}
        selector |= 1 << port // rules["group"]
        return {"pending": pending | bit, "selector": selector, "upcall": 1, "wake": asleep}

    def unmask(self, port, pending, mask, selector, upcall):
        bit = 1 << port % 32
        return {"mask": mask | bit if exercise.parameters["open"] else mask & ~bit}

    def block(self, selector, upcall):
        return {"sleep": not upcall}
"""
OURS = "from xenlab.hypervisor.event_bits import XenBits as MyEventBits"
OURS_AS_BASE = "from xenlab.hypervisor.event_bits import XenBits\nclass MyEventBits(XenBits): pass"
NOTHING = "class MyEventBits:\n    def send(self, *told):\n        return {}\n    unmask = block = send"
FORGED_RIGHT = """
from xenlab.grading.event_slot import EventRules
EventRules.right = lambda *_: {}
import xenlab.grading.lessons.lesson_08 as lesson
lesson.SendMaskBlock.judge = lambda *_: lesson.Finding("08.1", True)
"""


@pytest.mark.parametrize("student", STUDENTS)
def test_half_of_the_rules_are_a_part_of_the_points(student: str) -> None:
    report = tried("08", HALF, student)
    assert 0 < points(report)[0] < 4
    assert 0 <= points(report)[1] < 3
    assert report.score < 8
    assert "first wrong step: instruction" in messages(report)


@pytest.mark.parametrize("student", [STUDENTS[0], *more(STUDENTS[1])])
@pytest.mark.parametrize("answer", [OURS, OURS_AS_BASE, NOTHING, FORGED_RIGHT + NOTHING, FORGED_RIGHT + OURS])
def test_the_shipped_part_nothing_and_tampering_earn_nothing(judged: Grade, answer: str, student: str) -> None:
    assert judged("08", answer, student).score == 0


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("1 / 0", "raised ZeroDivisionError: division by zero (line 3"),
        ("raise SystemExit(3)", "raised SystemExit"),
        pytest.param("while True: pass", "did not answer within 0.05 s of CPU time", marks=POSIX),
        ("pass", "must return a dict of what changes"),
        ("return [pending]", "must return a dict of what changes"),
        ("return {'mask': 0}", "must return a dict of what changes"),
        ("return {'pending': -1}", "'pending', 'selector', 'upcall' as numbers of 32 bits"),
        ("return {'wake': 1}", "and 'wake': True or False"),
        ("return type('D', (dict,), {'__contains__': lambda *_: True})(x=1)", "must return a dict of what changes"),
    ],
)
def test_nonsense_is_named_at_its_step(body: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xenlab.grading.event_slot.ANSWER_SECONDS", 0.05)  # of each guest
    answer = f"class MyEventBits:\n    def send(self, port, pending, *told):\n        {body}\n    unmask = block = send"
    report = tried("08", answer, "ada")
    assert report.score == 0
    assert "first wrong step: instruction" in messages(report)
    assert said in messages(report)


def test_a_half_right_submission_keeps_the_other_half(judged: Grade) -> None:
    there, instead, _kept, said = MISTAKES["no wake"]
    report = judged("08", changed("08", there, instead), "ada")
    assert points(report)[:2] == (4, 3)
    assert report.score < 10
    assert said in messages(report)


def test_nonsense_is_reported_by_the_judge_too(judged: Grade) -> None:
    nonsense = "class MyEventBits:\n    def send(self, *told):\n        return told\n    unmask = block = send"
    report = judged("08", nonsense, "ada")
    assert (report.score, report.error) == (0, None)
    assert "must return a dict of what changes" in messages(report)


def test_a_part_that_cannot_be_made_is_named(judged: Grade) -> None:
    report = judged("08", "class MyEventBits:\n    def __init__(self):\n        raise ValueError('not today')")
    assert report.score == 0
    assert "MyEventBits() raised ValueError: not today" in messages(report)


def test_forged_decisions_are_only_wrong_decisions() -> None:
    forged = (
        [], 7, [None], ["changes"], [{"changes": 1}], [{"changes": {"upcall": 300}}], [{"changes": {}}] * 500,
        [{"changes": {"pending": True}}], [{"changes": {"upcall": 1, "passed": True}}],
    )  # fmt: skip
    assert_no_decision_passes(made_for(5), forged)


@given(plain_data("changes", "unusable", "wake"), st.sampled_from(["send", "unmask", "block"]))
def test_any_decision_is_usable_or_named(decision: Any, question: str) -> None:
    try:
        answer = answer_of(question, decision)
    except Unusable:
        return
    assert decision["changes"] is answer
    assert all(type(value) in (int, bool) for value in answer.values())


def test_self_checks_name_the_first_wrong_step_and_what_came_of_it() -> None:
    tried = exercise("08", "ada")
    failed = repr(tried.check("08.1", XenBits))
    assert "first wrong step: instruction" in failed
    assert "int 0x82" in failed
    assert "an event is sent; send(port=" in failed
    assert "expected, found" in failed
    assert "broken: " in failed
    assert "in the end: port" in failed


@pytest.mark.parametrize("mistake", ["insistent forgotten", "stops at the selector", "always on at unmask"])
def test_self_checks_do_not_give_all_away(mistake: str) -> None:
    assert self_checks("08", MISTAKES[mistake], "grace") == [True] * 3


# What the guests are, for any seed.


@given(SEEDS)
@settings(max_examples=3, deadline=None)
def test_any_seed_tells_right_from_xens(seed: int) -> None:
    made = made_for(seed)
    assert scores(made, lambda: Right(made.rules)) == (4, 3, 3)
    assert scores(made, XenBits) == (0, 0, 0)


@given(SEEDS)
@settings(max_examples=3, deadline=None)
def test_with_the_right_rules_nothing_is_lost(seed: int) -> None:
    made = made_for(seed)
    for guest, run in runs(made, lambda: Right(made.rules)):
        assert run.problem == ""
        assert run.domain.vcpus[0].run_state is RunState.BLOCKED, guest.name
        bits, counts = bits_of(run.xen, run.domain), Counter(event.port for event in run.of(Kind.EVENT))
        assert (bits.selector, bits.upcall) == (0, 0)
        for port, sent in counts.items():
            served = run.xen.guest_memory.read_word(run.domain.vcpus[0], run.domain.symbols[f"served{port}"])
            assert served > 0, (guest.name, port)
            assert served <= sent or made.kind(port) == INSISTENT, (guest.name, port)
            assert not bits.pending >> port & 1 or made.kind(port) == INSISTENT, (guest.name, port)


@given(SEEDS)
@settings(max_examples=4, deadline=None)
def test_the_questions_of_any_seed_reach_every_rule(seed: int) -> None:
    made, reached = made_for(seed), Counter[str]()
    for _guest, run in runs(made, lambda: Right(made.rules)):
        for asked in run.event_questions:
            told = dict(zip(("port", "pending", "mask", "selector", "upcall", "asleep"), asked.told, strict=False))
            if asked.question == "block":
                selector, upcall = asked.told
                reached[f"block {bool(selector)} {bool(upcall)}"] += 1
                continue
            port = told["port"]
            was = told["pending"] >> port % 32 & 1
            state = "open" if made.rules.is_open(port, told["mask"]) else "closed"
            asleep = " asleep" if told.get("asleep") else ""
            again = " pending" if was else ""
            reached[f"{asked.question} {made.kind(port)} {state}{again}{asleep}"] += 1
            if told["selector"] >> port // made.rules.group & 1:
                reached[f"{asked.question} selected"] += 1
    expected = [
        *(f"send {kind} open" for kind in (LOUD, INSISTENT, QUIET)),
        *(f"send {kind} open asleep" for kind in (LOUD, INSISTENT, QUIET)),
        *(f"send {kind} closed" for kind in (LOUD, INSISTENT, QUIET)),
        *(f"send {kind} open pending" for kind in (LOUD, INSISTENT, QUIET)),
        *(f"unmask {kind} closed pending" for kind in (LOUD, INSISTENT, QUIET)),
        "unmask loud open pending", "unmask insistent open pending", "send selected", "send loud closed asleep",
        "block False False", "block True False",
    ]  # fmt: skip
    assert not [name for name in expected if not reached[name]], reached


@given(SEEDS, st.integers(1, 45), *[st.integers(0, 2**32 - 1)] * 3, st.integers(0, 1), st.booleans())
def test_the_right_answer_keeps_its_promises(
    seed: int, port: int, pending: int, mask: int, selector: int, upcall: int, asleep: bool
) -> None:
    rules = made_for(seed).rules
    told = (port, pending, mask, selector, upcall, asleep)
    after = effect("send", told, rules.right("send", told))
    bit = 1 << port % 32
    assert after["pending"] == pending | bit
    assert after["selector"] | 1 << port // rules.group == selector | 1 << port // rules.group
    if rules.is_open(port, mask) and not pending & bit:
        assert after["selector"] >> port // rules.group & 1
        assert after["upcall"] or (rules.is_quiet(port) and not asleep)
    opened = effect("unmask", told[:5], rules.right("unmask", told[:5]))
    assert rules.is_open(port, opened["mask"])
    assert (opened["mask"] ^ mask) & ~bit == 0
    slept = effect("block", (selector, upcall), rules.right("block", (selector, upcall)))
    assert slept["sleep"] == (not selector and not upcall)
    assert slept["sleep"] or slept["upcall"]


def test_the_slot_reaches_the_students_process_as_plain_data() -> None:
    made = made_for(1)
    all_guests(made)
    slot = made.slot
    assert json.loads(json.dumps(dict(slot.scenarios))) == dict(slot.scenarios)
    assert {guest.name for guest in all_guests(made)} == set(slot.scenarios)
