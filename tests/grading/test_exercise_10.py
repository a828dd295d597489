"""Exercise 10: what each law of the scheduler costs when it is left out, and what is no decision at all."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from exercise_bench import (
    SEEDS,
    Grade,
    all_guests,
    assert_a_replay_is_the_recorded_run,
    changed,
    findings_of,
    messages,
    more,
    names_in,
    plain_data,
    played,
    points_by_check,
    self_checks,
    solution_of,
    tried,
    tried_with,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from xenlab.grading.decisions import Unusable
from xenlab.grading.instances import seed_of
from xenlab.grading.lessons import lesson
from xenlab.grading.lessons.clocks import Rules, first_astray
from xenlab.grading.lessons.lesson_10 import BorrowedTime
from xenlab.grading.schedules import MAX_PICKS, Call, choice_of
from xenlab.grading.timetable import Turn, Wait, timetable

FULL = {"10.1": 3, "10.2": 3, "10.3": 2, "10.4": 2}
# One student of each law: price, base, doubling.
STUDENTS = ("linus", "grace", "ada")


def exercise_of(student: str) -> BorrowedTime:
    made = lesson("10", seed_of(student))
    assert isinstance(made, BorrowedTime)
    return made


CHARGE = '(ran + borrowed * (RULES["factor"] - 1))'
FORWARD = 'self.floor - RULES["credit"] * mine["cost"]'
# What is left out, what that leaves of each check, and what the student reads.
OMISSIONS: dict[str, tuple[str, str, dict[str, int], str]] = {
    "price of borrowing": (CHARGE, "ran", {**FULL, "10.2": 2}, "paid"),
    "savings": (FORWARD, "self.floor", {**FULL, "10.2": 1}, "it saved"),
    "put forward": (f'max(mine["clock"], {FORWARD})', 'mine["clock"]', {**FULL, "10.2": 1}, "it saved"),
    "warp": (' - mine["warp"] * mine["cost"] * (mine["left"] > 0)', "", {**FULL, "10.2": 2}, "in one go"),
    "interruption": (" and first != self.urgent", "", {**FULL, "10.2": 1, "10.4": 1}, "expected at most 10"),
    "turns go on": (
        "self.running is not None and now < self.turn_end and first != self.urgent",
        "False",
        {**FULL, "10.2": 2},
        "a turn has",
    ),
    "length of turns": ('length, left = RULES["turn"]', 'length, left = RULES["turn"] // 2', {}, "a turn has"),
}


@pytest.mark.parametrize("omitted", OMISSIONS)
def test_each_omitted_law_costs(omitted: str) -> None:
    there, _instead, left, read = OMISSIONS[omitted]
    assert solution_of("10").count(there) == 1
    report = tried_with("10", OMISSIONS[omitted], STUDENTS[list(OMISSIONS).index(omitted) % 3])
    assert not left or points_by_check(report) == left, report.text()
    assert report.score < 10, report.text()
    assert read in messages(report)
    assert "instruction" in messages(report)


def test_a_half_right_submission_keeps_the_other_half(judged: Grade) -> None:
    there, instead, left, read = OMISSIONS["savings"]
    report = judged("10", changed("10", there, instead), "grace")
    assert points_by_check(report) == left
    assert read in messages(report)


@pytest.mark.parametrize("student", [STUDENTS[0], *more(*STUDENTS[1:])])
def test_weights_by_another_law_earn_nothing(student: str) -> None:
    by_weight = "def share(weight):\n    return weight\n\n\ndef unused(weight):"
    report = tried_with("10", ("def share(weight):", by_weight), student)
    assert report.score == 0, report.text()
    assert "may be off by 4 %" in messages(report)
    assert "first wrong step: instruction" in messages(report)


SHARES_ONLY = """
class MyScheduler:
    def __init__(self):
        self.clocks, self.costs, self.ready, self.running, self.since = {}, {}, set(), None, 0

    def account(self, now):
        if self.running is not None:
            self.clocks[self.running] += (now - self.since) * self.costs[self.running]
        self.since = now

    def told(self, vcpu, now, weight, warp):
        self.account(now)
        self.costs[vcpu] = 1 / share(weight)
        self.clocks.setdefault(vcpu, 0)

    def wake(self, vcpu, now):
        self.account(now)
        self.clocks[vcpu] = max([self.clocks[vcpu], *(self.clocks[other] for other in list(self.ready)[:1])])
        self.ready.add(vcpu)

    def sleep(self, vcpu, now):
        self.account(now)
        self.ready.discard(vcpu)
        self.running = None if self.running == vcpu else self.running

    def pick(self, now):
        self.account(now)
        self.running = min(self.ready, key=lambda vcpu: (self.clocks[vcpu], vcpu), default=None)
        return None if self.running is None else (self.running, RULES["turn"])

RULES = exercise.parameters
"""


def test_shares_alone_earn_their_part() -> None:
    share = solution_of("10")[solution_of("10").index("def share") :]
    report = tried("10", SHARES_ONLY + share, "ada")
    assert points_by_check(report)["10.1"] == 3, report.text()
    assert points_by_check(report)["10.2"] <= 1
    assert 3 < report.score < 9


PLAIN = "\n    def told(self, vcpu, now, weight, warp):\n        pass\n"
OURS = "from xenlab.hypervisor.schedulers import Bvt as MyScheduler"
OURS_TOLD = """
from xenlab.hypervisor.schedulers import Bvt


class MyScheduler(Bvt):
    def __init__(self):
        super().__init__(exercise.parameters["turn"], exercise.parameters["turn"])

    def told(self, vcpu, now, weight, warp):
        self.add(vcpu)
        limits = {"warp_limit": exercise.parameters["window"]}
        self.set_parameters(vcpu, now, {"weight": weight, "warp": warp, **limits})
"""
ROUND_ROBIN = f"""
from xenlab.hypervisor.schedulers import RoundRobin


class MyScheduler(RoundRobin):
    def __init__(self):
        super().__init__(exercise.parameters["turn"])
{PLAIN}
"""
IDLE = f"class MyScheduler:{PLAIN}    wake = sleep = pick = lambda self, *times: None"


@pytest.mark.parametrize(
    ("answer", "student"),
    [
        (OURS, "grace"),
        (OURS_TOLD, "ada"),
        (ROUND_ROBIN, "ada"),
        (IDLE, ""),
        *more((OURS_TOLD, "grace"), (OURS_TOLD, "linus")),
    ],
)
def test_ours_and_answers_without_thought_earn_nothing(judged: Grade, answer: str, student: str) -> None:
    report = judged("10", answer, student)
    assert (report.score, report.error) == (0, None), report.text()


# What a scheduler may do wrong, and what is then read.
ODD = {
    "return 32, 100": "pick chose vCPU 32, which is not runnable; runnable: ",
    "return None": "pick left the CPU idle (None) while 0, 32",
    "return 4711, 100": "pick chose vCPU 4711, which is not runnable",
    "return min(self.ready, default=0), 0": "a turn of 0 instructions; expected 1 or more",
    "return min(self.ready, default=0), -5": "a turn of -5 instructions",
    "return min(self.ready, default=0), 1 << 50": "a turn of 1125899906842624 instructions",
    "return 'web', 100": "must return whole numbers, it returned ('web', 100)",
    "return 7": "must return (vcpu, instructions) or None, it returned 7",
    "raise KeyError(now)": "raised KeyError",
    "while True: pass": "pick(now=0) did not return within 0.25 s of CPU time",
    "exit()": "raised SystemExit",
    "return min(self.ready, default=None), 1": f"asked {MAX_PICKS:,} times",
}
ODD_SCHEDULER = """
class MyScheduler:
    def __init__(self):
        self.ready = set()

    def told(self, vcpu, now, weight, warp):
        pass

    def wake(self, vcpu, now):
        self.ready.add(vcpu)

    def sleep(self, vcpu, now):
        self.ready.discard(vcpu)

    def pick(self, now):
        {body}
"""


def said_of(answer: str, name: str) -> str:
    """What is said of an answer on one of the machines."""
    made, part = exercise_of("ada"), names_in("10", answer, "ada")["MyScheduler"]
    (finding,) = findings_of(made, part, [guest for guest in made.guests() if guest.name == name])
    assert not finding.passed
    return finding.message


@pytest.mark.parametrize("body", ODD)
def test_what_is_no_turn_is_told(body: str) -> None:
    name = "late-riser" if "vCPU 32" in ODD[body] else "four"
    message = said_of(ODD_SCHEDULER.format(body=body.replace("32", "96")), name)
    assert ODD[body].replace("vCPU 32", "vCPU 96") in message if name == "late-riser" else ODD[body] in message
    assert "first wrong step: " in message


@pytest.mark.parametrize("method", ["told", "wake", "sleep"])
def test_what_it_does_wrong_when_it_is_told_shows_in_its_next_answer(method: str) -> None:
    answer = ODD_SCHEDULER.format(body="return min(self.ready, default=0), 500")
    broken = f"    def {method}(self, vcpu, now{', weight, warp' if method == 'told' else ''}):\n        "
    message = said_of(answer.replace(broken, f"{broken}undefined(vcpu)\n        "), "naps")
    assert f"first wrong step: {method}(" in message
    assert "raised NameError" in message


@pytest.mark.slow
def test_a_part_that_loops_costs_seconds_and_not_the_report(judged: Grade) -> None:
    report = judged("10", ODD_SCHEDULER.format(body="while True: pass"))
    assert (report.score, report.error) == (0, None)
    assert "did not return within 0.25 s" in messages(report)


FORGED = (
    ODD_SCHEDULER.format(body="return None")
    + """
import xenlab.grading.schedules as schedules
import xenlab.grading.lessons.lesson_10 as lesson
schedules._patiently = lambda call, action: (None, [0, 1 << 30])
lesson.BorrowedTime.judge = lambda *_: lesson.Finding("10.1", True)
"""
)


def test_a_forged_decision_is_only_a_wrong_one(judged: Grade) -> None:
    report = judged("10", FORGED)
    assert (report.score, report.error) == (0, None), report.text()


@given(plain_data("idle", "unusable") | st.floats(), st.sets(st.sampled_from([0, 32, 64])))
def test_any_decision_is_usable_or_named(decision: Any, runnable: set[int]) -> None:
    try:
        found = choice_of(decision, 5, runnable)
    except Unusable:
        return
    assert found is None if not runnable else found is not None
    assert found is None or (found[0] in runnable and found[1] > 0)


@pytest.mark.parametrize("student", ["ada", *more("", "grace", "linus")])
def test_the_solution_keeps_all_numbers(student: str) -> None:
    made, part = exercise_of(student), names_in("10", solution_of("10"), student)["MyScheduler"]
    checked: set[str] = set()
    for guest in all_guests(made):
        run, decisions = played(made, guest, part)
        finding = made.judge(guest, run, decisions)
        assert finding.passed, finding.message
        assert len(decisions) < MAX_PICKS / 2
        if guest.check not in checked:  # each turn with fractions, which takes longer than the run
            assert first_astray(run.scheduled, made.rules) is None
            checked.add(guest.check)


def test_a_replay_is_the_recorded_run() -> None:
    made, part = exercise_of("grace"), names_in("10", solution_of("10"), "grace")["MyScheduler"]
    run = assert_a_replay_is_the_recorded_run(made, all_guests(made)[-1], part)
    assert len(run.scheduled) > 100


def test_self_checks_look_at_less_than_grading() -> None:
    assert self_checks("10", OMISSIONS["price of borrowing"], "ada") == [True] * 4


@given(SEEDS)
@settings(max_examples=200)
def test_every_instance_differs_from_plain_weights(seed: int) -> None:
    made = lesson("10", seed)
    assert isinstance(made, BorrowedTime)
    weights = [made.weight(size) for size in range(4)]
    assert all(1 <= weight <= 65_535 for weight in weights)
    assert [made.rules.share(weight) / made.rules.share(weights[0]) for weight in weights] == [1, 2, 4, 8]
    for sizes in (2, 3, 4):  # among as many as there are in one scenario or another
        whole, parts = sum(weights[:sizes]), (1 << sizes) - 1
        plain = [Fraction(weights[size], whole) / Fraction(1 << size, parts) for size in range(sizes)]
        assert max(abs(share - 1) for share in plain) > Fraction(8, 100)
    assert made.rules.credit >= 5 * made.rules.turn
    assert (made.rules.factor - 1) * made.rules.window >= 4 * made.rules.turn


def test_all_laws_occur() -> None:
    laws = {exercise_of(f"student-{number}").rules.law for number in range(30)}
    assert laws == {"price", "base", "doubling"}
    assert [exercise_of(student).rules.law for student in STUDENTS] == ["price", "base", "doubling"]


# The timetable ------------------------------------------------------------------------------------------------------

LOG = [
    Call(0, "wake", 0),
    Call(0, "wake", 32),
    Call(0, "pick", 0, 10),
    Call(10, "pick", 32, 10),
    Call(15, "sleep", 32),
    Call(15, "pick", 0, 10),
    Call(20, "wake", 32),
    Call(20, "pick", 0, 5),
    Call(25, "pick", 32, 10),
]


def test_turns_and_waits_of_a_log() -> None:
    table = timetable(LOG, 30)
    assert table.turns == [
        Turn(0, 0, 10, cut=False),
        Turn(32, 10, 15, cut=True),
        Turn(0, 15, 25, cut=False),
        Turn(32, 25, 30, cut=True),
    ]
    assert table.waits == [
        Wait(0, 0, 0, woke=True, served=True),
        Wait(32, 0, 10, woke=True, served=True),
        Wait(0, 10, 15, woke=False, served=True),
        Wait(32, 20, 25, woke=True, served=True),
        Wait(0, 25, 30, woke=False, served=False),
    ]
    assert [table.ran(vcpu, 5, 27) for vcpu in (0, 32)] == [15, 7]
    assert [wait.length for wait in table.after_waking(32)] == [10, 5]


def test_the_first_turn_that_was_not_by_the_rules() -> None:
    rules = Rules("base", 0, 0, 10, 4, 0, 2)
    told = [Call(0, "told", vcpu, weight=1) for vcpu in (0, 32)]
    assert first_astray([*told, *LOG], rules) is None
    late = [*told, *LOG[:5], Call(15, "pick", 0, 10), Call(25, "wake", 32), Call(25, "pick", 0, 10)]
    assert first_astray(late, rules) is None  # the same goes on
    astray = first_astray(
        [*told, *LOG[:3], Call(10, "pick", 32, 10), Call(30, "pick", 0, 10), Call(50, "pick", 32, 9)], rules
    )
    assert astray is None
    astray = first_astray([*told, *LOG[:3], Call(10, "pick", 32, 5), Call(15, "pick", 0, 10)], rules)
    assert astray is not None
    assert (astray.time, astray.chosen, astray.expected) == (15, 0, 32)
    assert astray.clocks == {0: 10, 32: 5}
