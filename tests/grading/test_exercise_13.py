"""Exercise 13: which rule of the policy or the driver costs what, when it is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from exercise_bench import (
    SEEDS,
    Grade,
    all_guests,
    assert_a_replay_is_the_recorded_run,
    changed,
    messages,
    more,
    names_in,
    plain_data,
    points_by_check,
    self_checks,
    solution_of,
    tried,
    tried_with,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from xenlab.grading.balloons import change_of, targets_of
from xenlab.grading.decisions import Unusable
from xenlab.grading.instances import seed_of
from xenlab.grading.lessons import lesson
from xenlab.grading.lessons.lesson_13 import _ORDERS

FULL = {"13.1": 3, "13.2": 3, "13.3": 2, "13.4": 2}
STUDENTS = ("", "grace")


# What is left out, and what that leaves, at most, of each check.
OMISSIONS: dict[str, tuple[str, str, dict[str, int]]] = {
    "margin": ('abs(target - have) < RULES["margin"]', "target == have", {"13.1": 2}),
    "keep": (' - RULES["keep"]', "", {"13.1": 1}),
    "step": ('max(-RULES["step"], min(RULES["step"], pages))', "pages", {"13.1": 2}),
    "extra": (' + RULES["extra"]', "", {"13.1": 2}),
    "reserve": (' - RULES["reserve"]', "", {"13.2": 0, "13.3": 0, "13.4": 0}),
    "headroom": (' + row["need"] // RULES["headroom"]', "", {"13.2": 1, "13.4": 1}),
    "maximum": ('return min(max(wanted, row["least"]), row["most"])', 'return max(wanted, row["least"])', {}),
    "order": ('ORDERS[RULES["order"]](row), row["domid"]', '-row["domid"]', {"13.2": 0, "13.3": 0, "13.4": 0}),
}


def rest_stays_free(student: str) -> bool:
    return bool(lesson("13", seed_of(student)).rest == "stays free")  # type: ignore[attr-defined]


# Where the solution deals the rest out up to the maxima, that repairs what is left out of them.
CASES = [(omitted, STUDENTS[0]) for omitted in OMISSIONS if omitted != "maximum"]
CASES += [("maximum", student) for student in STUDENTS if rest_stays_free(student)][:1]
MORE_CASES = [(omitted, STUDENTS[1]) for omitted in OMISSIONS if (omitted, STUDENTS[1]) not in CASES]


@pytest.mark.parametrize(("omitted", "student"), [*CASES, *more(*MORE_CASES)])
def test_each_omitted_rule_costs(omitted: str, student: str) -> None:
    if omitted == "maximum" and not rest_stays_free(student):
        pytest.skip("no mistake for this student")
    left = OMISSIONS[omitted][2]
    report = tried_with("13", OMISSIONS[omitted], student)
    found = points_by_check(report)
    assert report.score < 10, report.text()
    assert all(found[check] <= most for check, most in left.items()), report.text()
    untouched = ["13.2", "13.3", "13.4"] if "13.1" in left else ["13.1"]
    assert all(found[check] == FULL[check] for check in untouched), report.text()
    assert "first wrong step: instruction" in messages(report)


def test_every_rule_is_left_out_for_somebody() -> None:
    assert {omitted for omitted, _student in CASES} == set(OMISSIONS)


ONLY_DRIVER = ('free + sum(row["have"] for row in domains)', "undefined")
ONLY_POLICY = ("missing - free", "undefined - free")


@pytest.mark.parametrize(
    ("broken", "earned"),
    [(ONLY_DRIVER, {**FULL, "13.2": 0, "13.3": 0, "13.4": 0}), (ONLY_POLICY, {**FULL, "13.1": 1})],
)
def test_half_right_13_earns_its_half(judged: Grade, broken: tuple[str, str], earned: dict[str, int]) -> None:
    report = judged("13", changed("13", *broken), "ada")
    assert points_by_check(report) == earned, report.text()
    assert "NameError" in messages(report)


OURS = "from xenlab.toolstack.balloon import MoveUnderPressure\nclass MyBalloon(MoveUnderPressure): pass"
NOTHING = """
class MyBalloon:
    def change(self, target, have, free, missing):
        return 0

    def targets(self, free, domains):
        return {}
"""
MINIMA = NOTHING.replace("return {}", 'return {row["domid"]: row["least"] for row in domains}')
FOLLOW = NOTHING.replace("return 0", "return target - have").replace(
    "return {}", 'return {row["domid"]: row["need"] for row in domains}'
)


@pytest.mark.parametrize("answer", [OURS, NOTHING, MINIMA, FOLLOW])
@pytest.mark.parametrize("student", [STUDENTS[0], *more(*STUDENTS[1:])])
def test_the_shipped_policy_and_answers_without_thought_earn_nothing(judged: Grade, answer: str, student: str) -> None:
    report = judged("13", answer, student)
    assert report.score == 0, report.text()


ODD = (
    "None",
    "'many'",
    "{0: 2.5}",
    "{0: 1 << 40}",
    "{0: 0}",
    "{99: 5, 0: 100}",
    "{'0': 5}",
    "[1, 2]",
    "{row['domid']: [1] for row in domains}",
)


@pytest.mark.parametrize("value", ODD)
def test_what_is_no_decision_is_told(value: str) -> None:
    report = tried("13", NOTHING.replace("return {}", f"return {value}").replace("return 0", "return 0.5"))
    assert report.score == 0
    assert "change must return a whole number, it returned 0.5" in messages(report)
    assert "expected" in messages(report).split("13.1")[-1] or "targets must" in messages(report)


@given(st.dictionaries(st.sampled_from(["targets", "change", "unusable"]), plain_data() | st.floats()))
def test_any_decision_is_usable_or_named(decision: dict[str, Any]) -> None:
    reads: tuple[Callable[[], Any], ...] = (lambda: change_of(decision), lambda: targets_of(decision, {0, 1}))
    for read in reads:
        try:
            found = read()
        except Unusable:
            continue
        if isinstance(found, Mapping):
            assert set(found) <= {0, 1}
        else:
            assert isinstance(found, int)


@pytest.mark.parametrize("student", ["ada", *more("", "grace", "linus")])
def test_replay_is_the_recorded_run(student: str) -> None:
    made, part = lesson("13", seed_of(student)), names_in("13", solution_of("13"), student)["MyBalloon"]
    for guest in all_guests(made):
        run = assert_a_replay_is_the_recorded_run(made, guest, part)
        assert made.judge(guest, run, []).passed
        assert not any(domain.crashed for domain in run.xen.domains.values())


@given(SEEDS)
@settings(max_examples=200)
def test_every_instance_can_keep_its_promises(seed: int) -> None:
    made = lesson("13", seed)
    for guest in all_guests(made):
        scenario = made.slot.scenarios[guest.name]
        # Each of the domains begins with 256 pages of a machine of 1024, of which the hypervisor has some 23.
        assert sum(row["least"] for row in scenario["domains"]) <= 1000 - made.parameters["reserve"]
        assert all(row["least"] <= row["most"] for row in scenario["domains"])


def test_all_orders_and_rests_occur() -> None:
    made = [lesson("13", seed_of(f"student-{number}")).parameters for number in range(60)]
    assert {parameters["order"] for parameters in made} == set(_ORDERS)
    assert len({parameters["rest"] for parameters in made}) == 2


@pytest.mark.parametrize("omitted", ["headroom", "maximum"])
def test_self_checks_of_13_look_at_less_than_grading(omitted: str) -> None:
    passed = self_checks("13", OMISSIONS[omitted], "ada")
    assert passed[0]
    assert sum(passed) >= 2
