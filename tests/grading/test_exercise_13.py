"""Exercise 13: which rule of the policy or the driver costs what, when it is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenlab.grading import exercise
from xenlab.grading.balloons import change_of, targets_of
from xenlab.grading.decisions import Unusable
from xenlab.grading.guests import image_from_source, record, replay
from xenlab.grading.hidden import lesson_13 as hidden
from xenlab.grading.instances import seed_of
from xenlab.grading.lessons import lesson
from xenlab.grading.lessons.lesson_13 import _ORDERS
from xenlab.grading.report import Report

Grade = Callable[..., Report]
FULL = {"13.1": 3, "13.2": 3, "13.3": 2, "13.4": 2}


def points(report: Report) -> dict[str, int]:
    return {check.id: check.points for check in report.checks}


def messages(report: Report) -> str:
    return "\n".join(check.message for check in report.checks)


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


@pytest.mark.parametrize("student", ["", "grace"])
@pytest.mark.parametrize("omitted", OMISSIONS)
def test_each_omitted_rule_costs(judged: Grade, solution: Callable[[str], str], omitted: str, student: str) -> None:
    there, instead, left = OMISSIONS[omitted]
    if omitted == "maximum" and lesson("13", seed_of(student)).rest != "stays free":
        pytest.skip("the solution deals the rest out up to the maxima, which repairs it")
    answer = solution("13")
    assert answer.count(there) == 1
    report = judged("13", answer.replace(there, instead), student)
    found = points(report)
    assert report.score < 10, report.text()
    assert all(found[check] <= most for check, most in left.items()), report.text()
    untouched = ["13.2", "13.3", "13.4"] if "13.1" in left else ["13.1"]
    assert all(found[check] == FULL[check] for check in untouched), report.text()
    assert "first wrong step: instruction" in messages(report)


ONLY_DRIVER = ('free + sum(row["have"] for row in domains)', "undefined")
ONLY_POLICY = ("missing - free", "undefined - free")


@pytest.mark.parametrize(
    ("broken", "earned"),
    [(ONLY_DRIVER, {**FULL, "13.2": 0, "13.3": 0, "13.4": 0}), (ONLY_POLICY, {**FULL, "13.1": 1})],
)
def test_half_right_13_earns_its_half(
    judged: Grade, solution: Callable[[str], str], broken: tuple[str, str], earned: dict[str, int]
) -> None:
    there, instead = broken
    report = judged("13", solution("13").replace(there, instead), "ada")
    assert points(report) == earned, report.text()
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
@pytest.mark.parametrize("student", ["", "grace"])
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
def test_what_is_no_decision_is_told(judged: Grade, value: str) -> None:
    report = judged("13", NOTHING.replace("return {}", f"return {value}").replace("return 0", "return 0.5"))
    assert report.error is None
    assert report.score == 0
    assert "change must return a whole number, it returned 0.5" in messages(report)
    assert "expected" in messages(report).split("13.1")[-1] or "targets must" in messages(report)


@given(
    st.dictionaries(
        st.sampled_from(["targets", "change", "unusable"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        ),
    )
)
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


@pytest.mark.parametrize("student", ["", "ada", "grace", "linus"])
def test_replay_is_the_recorded_run(solution: Callable[[str], str], student: str) -> None:
    made = lesson("13", seed_of(student))
    namespace: dict[str, Any] = {"exercise": exercise("13", student)}
    exec(solution("13"), namespace)
    for guest in made.guests() + hidden.guests(made):
        image = image_from_source(guest.source, guest.name)
        decisions = record(image, made.slot, namespace["MyBalloon"])
        one, two = (replay(image, made.slot, decisions) for _number in range(2))
        assert one.events == two.events
        assert made.judge(guest, one, decisions).passed
        assert not any(domain.crashed for domain in one.xen.domains.values())


@given(st.integers(0, (1 << 32) - 1))
@settings(max_examples=200)
def test_every_instance_can_keep_its_promises(seed: int) -> None:
    made = lesson("13", seed)
    for guest in made.guests() + hidden.guests(made):
        scenario = made.slot.scenarios[guest.name]
        # Each of the domains begins with 256 pages of a machine of 1024, of which the hypervisor has some 23.
        assert sum(row["least"] for row in scenario["domains"]) <= 1000 - made.parameters["reserve"]
        assert all(row["least"] <= row["most"] for row in scenario["domains"])


def test_all_orders_and_rests_occur() -> None:
    made = [lesson("13", seed_of(f"student-{number}")).parameters for number in range(60)]
    assert {parameters["order"] for parameters in made} == set(_ORDERS)
    assert len({parameters["rest"] for parameters in made}) == 2


@pytest.mark.parametrize("omitted", ["headroom", "maximum"])
def test_self_checks_of_13_look_at_less_than_grading(solution: Callable[[str], str], omitted: str) -> None:
    there, instead, _left = OMISSIONS[omitted]
    namespace: dict[str, Any] = {"exercise": exercise("13", "ada")}
    exec(solution("13").replace(there, instead), namespace)
    passed = [bool(namespace["exercise"].check(check, namespace["MyBalloon"])) for check in FULL]
    assert passed[0]
    assert sum(passed) >= 2
