"""Exercise 07: what a bounce is asked, and what becomes of right, half-right, empty and hostile ones."""

from __future__ import annotations

from typing import Any

import pytest
from exercise_bench import (
    POSIX,
    SEEDS,
    Grade,
    assert_no_decision_passes,
    changed,
    messages,
    more,
    plain_data,
    points,
    scores,
    self_checks,
    solution_of,
    tried,
    tried_with,
)
from hypothesis import given, settings

from xenlab.grading import exercise
from xenlab.grading.bounce_slot import frame_of
from xenlab.grading.decisions import Unusable
from xenlab.grading.instances import Choices, seed_of
from xenlab.grading.lessons import lesson
from xenlab.grading.lessons.agreement import IN_FRAME, Agreement
from xenlab.hypervisor.bounce import XenBounce

# Between them: both places of the error code and of the address, with and without a word for no error code.
STUDENTS = ("", "ada", "bob")


def test_the_students_of_these_tests_have_different_agreements() -> None:
    made = [Agreement.chosen(Choices(seed_of(student), "07")) for student in STUDENTS]
    assert {each.error for each in made} == {"below", "above"}
    assert {each.address == IN_FRAME for each in made} == {True, False}
    assert {bool(each.no_error) for each in made} == {True, False}
    assert {each.clears_direction for each in made} == {True, False}


# What is changed in the solution, the most points that are left, and what the report says.
GATE = 'masked | gate["masks_events"]'
MISTAKES: dict[str, tuple[str, str, tuple[int, int, int, int], str]] = {
    "no writable": (" or not writable(esp, size)", "", (3, 3, 2, 0), "expected None, found a frame"),
    "a word too few asked": ("writable(esp, size)", "writable(esp + 4, size - 4)", (3, 3, 2, 1), "expected None"),
    "a word too many asked": (
        "writable(esp, size)",
        "writable(esp - 4, size + 4)",
        (3, 3, 2, 1),
        "it can be delivered",
    ),
    "stack of another ring": (
        'stack["ss"] & 3 != to_ring or ',
        "",
        (3, 3, 2, 1),
        "the kernel's stack has the selector",
    ),
    "trap flag left": ("0x54100", "0x54000", (3, 3, 1, 2), "in the handler EFLAGS has to be"),
    "nested task left": ("0x54100", "0x50100", (3, 3, 1, 2), "in the handler EFLAGS has to be"),
    "flags of the handler": ("words = [", 'saved["eflags"] &= ~0x54500\n        words = [', (3, 3, 1, 2), "is eflags"),
    "mask not kept": ('masked << RULES["mask_bit"]', "0", (3, 3, 1, 2), "expected"),
    "mask of Xen": ('RULES["mask_bit"]', "16", (3, 3, 1, 2), "expected"),
    "IF never clear": ("(0 if masked else 0x200)", "0x200", (3, 3, 1, 2), "is eflags: expected"),
    "gate unmasks": (GATE, 'gate["masks_events"]', (3, 3, 1, 2), "the event mask has to be 1"),
    "gate never masks": (GATE, "masked", (3, 3, 1, 2), "the event mask has to be 1, it is 0"),
    "kernel's stack always": ("stack = registers", "stack = kernel", (1, 0, 1, 0), "in the handler ESP has to be"),
    "kernel's stack never": ("stack = kernel", "stack = registers", (0, 0, 0, 0), "it can be delivered"),
    "one word too low": ("- size &", "- size - 4 &", (0, 0, 0, 0), "in the handler ESP has to be"),
    "into ring 0": ('"cs": gate["cs"]', '"cs": gate["cs"] & ~3', (0, 0, 0, 0), "in the handler CS has to be"),
    "order of Xen": ('RULES["words"]', '("eip", "cs", "eflags")', (0, 0, 0, 0), "from below is"),
    "gives up always": ("stack = registers", "return None", (0, 0, 0, 0), "and the answer was None"),
}
# Where a student's agreement happens to be Xen's in this one point, the mistake is none.
MAY_BE_RIGHT = {
    "direction": ('0x400 if RULES["clears_direction"] else 0', "0"),
    "address of Xen": ('shared[RULES["address"]]', "shared[8]"),
    "no address": ('elif "address" in trap:', "elif False:"),
    "error below": ('if RULES["error"] == "below" else', "if True else"),
}


@pytest.mark.parametrize("student", [STUDENTS[0], *more(*STUDENTS[1:])])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_costs_where_it_is_one(mistake: str, student: str) -> None:
    report = tried_with("07", MISTAKES[mistake], student)
    _there, _instead, left, said = MISTAKES[mistake]
    assert points(report) == left, report.text()
    assert said in messages(report)


@pytest.mark.parametrize("mistake", MAY_BE_RIGHT)
def test_a_mistake_that_may_be_right_costs_somebody(mistake: str) -> None:
    found = {tried_with("07", MAY_BE_RIGHT[mistake], student).score for student in STUDENTS}
    assert min(found) < max(found) == 10


@pytest.mark.parametrize("student", STUDENTS)
def test_frames_without_error_codes_are_not_looked_at_in_the_first_check(student: str) -> None:
    wrong = 'else RULES["no_error"]', 'else [0x77] * (1 - len(RULES["no_error"]))'
    assert points(tried_with("07", wrong, student))[:3] == (3, 0, 0)


def test_a_half_right_submission_keeps_the_other_half(judged: Grade) -> None:
    there, instead, left, said = MISTAKES["no writable"]
    report = judged("07", changed("07", there, instead), "ada")
    assert points(report) == left
    assert said in messages(report)


OURS = "from xenlab.hypervisor.bounce import XenBounce as MyBounce"
OURS_AS_BASE = "from xenlab.hypervisor.bounce import XenBounce\nclass MyBounce(XenBounce): pass"
NOTHING = "class MyBounce:\n    def frame(self, *question):\n        return None"


@pytest.mark.parametrize("answer", [OURS, OURS_AS_BASE, NOTHING])
def test_the_shipped_bounce_and_giving_up_earn_nothing(judged: Grade, answer: str) -> None:
    assert judged("07", answer, "ada").score == 0


@settings(max_examples=3)
@given(SEEDS)
def test_any_seed_tells_the_solution_from_xens_own_agreement(seed: int) -> None:
    made = lesson("07", seed)
    names: dict[str, Any] = {"exercise": made}
    exec(solution_of("07"), names)
    assert scores(made, names["MyBounce"]) == tuple(plan.points for plan in made.plan)
    assert sum(scores(made, XenBounce)) == 0


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("1 / 0", "raised ZeroDivisionError: division by zero (line "),
        ("raise SystemExit(3)", "raised SystemExit"),
        pytest.param("while True: pass", "no answer within 0.05 s of CPU time", marks=POSIX),
        ("return 7", "frame for #PF page fault: expected None, or a mapping with words"),
        ("return {'words': [1], 'registers': {}}", "expected registers: all of eip cs eflags esp ss"),
        ("return {'words': [-1], 'registers': registers}", "expected words: a list of 1 to 16"),
        ("return {'words': [1], 'registers': registers, 'shared': {0: 1}}", "expected shared: whole numbers"),
        ("return {'words': [1], 'registers': registers, 'event_mask': 9}", "expected event_mask: 0 or 1"),
        ("return {'words': [1], 'registers': registers, 'score': 10}", "no other name"),
        ("registers['eip'] = gate['eip']; return {'words': [1] * 9, 'registers': registers}", "found 9 words"),
        ("return {'words': [type('W', (int,), {})(5)], 'registers': registers}", "expected words: a list"),
    ],
)
def test_nonsense_is_named_at_its_step(body: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xenlab.grading.bounce_slot.ANSWER_SECONDS", 0.05)  # of each guest
    source = f"class MyBounce:\n    def frame(self, trap, registers, gate, kernel, writable):\n        {body}"
    report = tried("07", source, "ada")
    assert report.score == 0
    assert "first wrong step: instruction" in messages(report)
    assert said in messages(report)


def test_nonsense_is_reported_by_the_judge_too(judged: Grade) -> None:
    report = judged("07", "class MyBounce:\n    def frame(self, *question):\n        return question")
    assert (report.score, report.error) == (0, None)
    assert "expected None, or a mapping with words" in messages(report)


def test_a_part_that_cannot_be_made_is_named(judged: Grade) -> None:
    report = judged("07", "class MyBounce:\n    def __init__(self):\n        raise ValueError('not today')")
    assert report.score == 0
    assert "MyBounce() raised ValueError: not today" in messages(report)


WRONG = "class MyBounce:\n    def frame(self, *question):\n        return None\n"
TAMPERED = {
    "the judge's verdict": """
import xenlab.grading.lessons.lesson_07 as judge
from xenlab.grading.lessons.base import Finding
judge.PageFaultBounce.judge = lambda self, guest, run, decisions: Finding(guest.check, True)
""",
    "what is asked": """
import xenlab.grading.bounce_slot as slot
slot.BounceSlot._ask = lambda self, asked, writable: {"words": [], "registers": {}, "shared": [], "score": 10}
""",
    "what is checked": """
import xenlab.grading.bounce_slot as slot, xenlab.hypervisor.bounce as bounce
slot.unusable = bounce.unusable = lambda found: ""
class MyBounce:
    def frame(self, *question):
        return {"words": [1 << 40], "registers": dict.fromkeys(("eip", "cs", "eflags", "esp", "ss"), -1)}
""",
    "what equality is": """
class Equal(int):
    __eq__ = __ge__ = __le__ = lambda self, other: True
    __hash__ = int.__hash__
class MyBounce:
    def frame(self, trap, registers, gate, kernel, writable):
        return {"words": [Equal(1)] * 6, "registers": {name: Equal(value) for name, value in registers.items()}}
""",
    "what it was given": """
class MyBounce:
    def frame(self, *question):
        for given in question[:4]:
            given.clear()
        return None
""",
}


@pytest.mark.parametrize("tampered", TAMPERED)
def test_tampering_in_the_students_process_earns_nothing(judged: Grade, tampered: str) -> None:
    report = judged("07", WRONG + TAMPERED[tampered], "ada")
    assert report.score == 0, report.text()
    assert report.error is None


def test_forged_decisions_are_only_wrong_decisions() -> None:
    frame = {"words": [1], "registers": dict.fromkeys(("eip", "cs", "eflags", "esp", "ss"), 1), "shared": []}
    forged = ([], [{"end": 1}], ["end"], [{"end": True}] * 200, [frame], [{**frame, "shared": 3}], 7)
    assert_no_decision_passes(lesson("07", 5), forged)


@given(plain_data("end", "words", "registers", "shared", "unusable"))
def test_any_decision_is_usable_or_named(decision: Any) -> None:
    if isinstance(decision, dict) and "unusable" not in decision and decision.get("end") is True:
        assert frame_of(decision) is None
    else:
        with pytest.raises(Unusable):
            frame_of(decision)


def test_self_checks_name_the_first_wrong_step_and_the_word() -> None:
    made = exercise("07", "ada")
    failed = made.check("07.1", XenBounce)
    assert not failed
    assert "first wrong step: instruction" in repr(failed)
    assert "#PF page fault with error code 0x4 at address 0xc0203000, from ring 3 to ring 1" in repr(failed)
    assert "the frame has to be address cs eip eflags error ss esp" in repr(failed)


@pytest.mark.parametrize("mistake", ["trap flag left", "gate never masks", "a word too few asked"])
def test_self_checks_do_not_give_all_away(mistake: str) -> None:
    assert self_checks("07", MISTAKES[mistake], "ada") == [True] * 4
