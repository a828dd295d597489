"""Exercise 09: which rule of the alarms costs what, when it is left out, and what its guests are worth."""

from __future__ import annotations

from typing import Any

import pytest
from exercise_bench import (
    SEEDS,
    Grade,
    changed,
    image_of,
    messages,
    more,
    plain_data,
    points_by_check,
    runs,
    scores,
    self_checks,
    tried,
    tried_with,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from xenlab.grading.alarms_slot import MAX_ANSWERS, Told, called, read_decision
from xenlab.grading.decisions import Unusable
from xenlab.grading.guests import Run, replay
from xenlab.grading.instances import seed_of
from xenlab.grading.lessons import lesson
from xenlab.grading.lessons.alarm_ledger import COUNTS, DROPS, EARLIEST, IGNORED, REAL, VIRTUAL, Ledger, Rules
from xenlab.grading.lessons.lesson_09 import AlarmTimers
from xenlab.hypervisor.alarms import AlarmClocks

FULL = {"09.1": 3, "09.2": 3, "09.3": 2, "09.4": 2}


class Right:
    """The rules once more, each alarm kept with the moment at which it was set: nothing of the ledger in it."""

    def __init__(self, rules: dict[str, Any]) -> None:
        self._rules = rules
        self._due: dict[tuple[int, str], int] = {}
        self._runs: int | None = None
        self._behind = 0

    def set(self, vcpu: int, clock: str, at: int | None, now: int, ran: int) -> None:
        says, step, key = (now if clock == REAL else ran), self._rules["step"][clock], (vcpu, clock)
        stood = self._due.pop(key, None)
        if at is None:
            return
        fate = (
            self._rules["past"] if at <= says else self._rules["beyond"] if at - says > self._rules["reach"] else COUNTS
        )
        if fate == IGNORED:
            new = stood
        elif fate == DROPS:
            new = None
        else:
            wanted = min(max(at, says + 1), says + self._rules["reach"])
            new = (wanted + step - 1) // step * step
            if stood is not None and self._rules["again"] == EARLIEST:
                new = min(new, stood)
        if new is not None:
            self._due[key] = new

    def run(self, vcpu: int, now: int, ran: int) -> None:
        self._runs, self._behind = vcpu, now - ran

    def stop(self, _vcpu: int, _now: int, _ran: int) -> None:
        self._runs = None

    def _at(self, key: tuple[int, str]) -> float:
        if key[1] == REAL:
            return self._due[key]
        return self._due[key] + self._behind if key[0] == self._runs else float("inf")

    def next(self) -> int | None:
        first = min(map(self._at, self._due), default=float("inf"))
        return None if first == float("inf") else int(first)

    def expire(self, now: int) -> list[tuple[int, str]]:
        due = sorted((key for key in self._due if self._at(key) <= now), reverse=self._rules["vcpus"] == "highest")
        due = sorted(due, key=lambda key: key[1] != self._rules["first"])
        for number, key in enumerate(due):
            step = self._rules["step"][key[1]]
            if number < self._rules["most"]:
                del self._due[key]
            else:
                self._due[key] += step
        return due[: self._rules["most"]]


def made(seed: int) -> AlarmTimers:
    found = lesson("09", seed)
    assert isinstance(found, AlarmTimers)
    return found


# What is left out, and what that costs: only in these checks, and in these at least a point.
OMISSIONS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "rounding": ("-(-at // step) * step", "at", tuple(FULL)),
    "a multiple already": ("-(-at // step) * step", "at // step * step + step", ("09.1", "09.2", "09.4")),
    "the past": ('fate, at = RULES["past"], reading + 1', "pass", ("09.3",)),
    "reach": ('fate, at = RULES["beyond"], reading + RULES["reach"]', "pass", ("09.3",)),
    "set anew": ('RULES["again"] == "earliest"', 'RULES["again"] == "newest"', ("09.3",)),
    "the order of clocks": ('alarm[1] != RULES["first"]', 'alarm[1] == RULES["first"]', ("09.4",)),
    "the order of vCPUs": ("sign * alarm[0]", "-sign * alarm[0]", ("09.4",)),
    "not too many": ('[: RULES["most"]]', "[:]", ("09.4",)),
    "a step later": ('+= RULES["step"][alarm[1]]', "+= 1", ("09.4",)),
    "who runs": ("self.running = None\n        ### END SOLUTION\n\n    def next", "pass\n\n    def next", ("09.2",)),
    "the other clock": ('now if clock == "real" else ran', "now", ("09.2",)),
}


@pytest.mark.parametrize("student", ["ada", *more("grace")])
@pytest.mark.parametrize("omitted", OMISSIONS)
def test_each_omitted_rule_costs(omitted: str, student: str) -> None:
    report = tried_with("09", OMISSIONS[omitted], student)
    found, costs = points_by_check(report), OMISSIONS[omitted][2]
    assert all(found[check] < FULL[check] for check in costs), report.text()
    assert all(found[check] == FULL[check] for check in FULL if check not in costs), report.text()
    assert "first wrong step: " in messages(report)


def test_half_right_09_knows_real_time_only(judged: Grade) -> None:
    there = "elif alarms.running is not None and alarms.running[0] == vcpu:"
    report = judged("09", changed("09", there, "elif False:"), "ada")
    assert points_by_check(report) == {"09.1": 3, "09.2": 0, "09.3": 1, "09.4": 1}
    assert "on virtual time (set to" in messages(report)
    assert "must go off; it did not" in messages(report)


OURS = "from xenlab.hypervisor.alarms import AlarmClocks as MyAlarms"
OURS_AS_BASE = "from xenlab.hypervisor.alarms import AlarmClocks\nclass MyAlarms(AlarmClocks): pass"
SILENT = """
class MyAlarms:
    def set(self, vcpu, clock, at, now, ran): pass
    def run(self, vcpu, now, ran): pass
    def stop(self, vcpu, now, ran): pass
    def next(self): return None
    def expire(self, now): return []
"""


@pytest.mark.parametrize("answer", [OURS, OURS_AS_BASE, SILENT])
@pytest.mark.parametrize("student", ["", *more("grace")])
def test_the_shipped_part_and_no_alarm_at_all_earn_nothing(judged: Grade, answer: str, student: str) -> None:
    assert judged("09", answer, student).score == 0


ODD = (
    ("return None", "return 2.5", "must return a whole number of instructions or None, it returned 2.5"),
    ("return None", "return True", "it returned True"),
    ("return None", "return -7", "expected for next a time from 0 on"),
    ("return None", "return 1 << 100", "expected for next a time from 0 on"),
    ("return None", "return 500", "expire named no alarm"),
    ("return None", "return 1 // 0", "ZeroDivisionError"),
    ("return None", "\n        while True: pass", "did not answer within 0.05 s"),
    ("ran): pass", "ran): raise SystemExit", "SystemExit"),
    ("return None", "return {}.get(0, 0)", "expire named no alarm"),
)


@pytest.mark.parametrize(("there", "instead", "said"), ODD)
def test_what_is_no_decision_is_told(there: str, instead: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xenlab.grading.alarms_slot.ANSWER_SECONDS", 0.05)  # of each guest
    report = tried("09", SILENT.replace(there, instead))
    assert report.score == 0
    assert said in messages(report)


@pytest.mark.parametrize(
    ("off", "said"),
    [
        ("None", "must return a list of pairs"),
        ("[(0, 'unreal')]", "must return a list of pairs"),
        ("[7]", "must return a list of pairs"),
        ("[(7, 'real')]", "expire(600) = [(7, 'real')]\nnothing goes off"),
        ("[(0, 'real')] * 100", "expected at most 64 alarms"),
    ],
)
def test_alarms_that_are_none_are_told(off: str, said: str) -> None:
    report = tried("09", SILENT.replace("return None", "return 600").replace("return []", f"return {off}"))
    assert report.score == 0
    assert said in messages(report)


def test_nonsense_is_reported_by_the_judge_too(judged: Grade) -> None:
    report = judged("09", SILENT.replace("return None", "return 2.5"))
    assert (report.error, report.score) == (None, 0)
    assert "must return a whole number of instructions or None, it returned 2.5" in messages(report)


def test_an_alarm_that_is_never_over_is_told() -> None:
    report = tried_with("09", ("del self.due[alarm]", "pass"), "ada")
    assert report.score == 0
    assert "what is due by then has gone off" in messages(report)


PATCHES = (
    "import xenlab.grading.lessons.alarm_ledger as ledger\nledger.Ledger.problem = lambda *_: ''\n",
    "import xenlab.grading.alarms_slot as slot\nslot._encoded = lambda *_: {'off': [], 'score': 10}\n",
    # Loops until the limit of CPU time.
    pytest.param(
        "import xenlab.hypervisor.timers as timers\ntimers.Timers.expire = lambda self: None\n", marks=pytest.mark.storm
    ),
    'import json\njson.dumps = lambda value, **_: \'{"answer": {}, "score": 10}\'\n',
    "class Same(int):\n    def __eq__(self, other): return True\n    __hash__ = None\n",
)


@pytest.mark.parametrize("patch", PATCHES)
def test_tampering_with_the_own_process_earns_nothing(judged: Grade, patch: str) -> None:
    answer = patch + SILENT.replace("return None", "return globals().get('Same', int)(900)")
    assert judged("09", answer).score == 0


PLAIN = plain_data() | st.floats()


@given(st.sampled_from(("set", "run", "stop", "next", "expire")), PLAIN | st.fixed_dictionaries({"off": PLAIN}))
def test_any_decision_is_read_or_refused(method: str, decision: Any) -> None:
    try:
        answer = read_decision(method, decision)
    except Unusable:
        return
    if method == "expire":
        assert all(type(vcpu) is int and clock in (REAL, VIRTUAL) for vcpu, clock in answer)
    else:
        assert answer is None or (method == "next" and type(answer) is int)


@given(st.lists(PLAIN, max_size=40))
@settings(max_examples=20, deadline=None)
def test_forged_decisions_are_only_wrong_ones(decisions: list[Any]) -> None:
    exercise = made(7)
    guest = exercise.guests()[0]
    found = exercise.judge(guest, replay(image_of(guest.source, guest.name), exercise.slot, decisions), [])
    assert not found.passed
    assert found.message


# What the guests are, for any seed.


@given(SEEDS)
@settings(max_examples=6, deadline=None)
def test_any_seed_tells_right_from_ours(seed: int) -> None:
    exercise = made(seed)
    assert scores(exercise, lambda: Right(exercise.parameters)) == tuple(FULL.values())
    assert not any(scores(exercise, AlarmClocks))


@given(SEEDS)
@settings(max_examples=4, deadline=None)
def test_guests_of_any_seed_do_what_their_check_is_about(seed: int) -> None:
    exercise = made(seed)
    for guest, done in runs(exercise, lambda: Right(exercise.parameters)):
        off = [told.answer for told in done.told if told.method == "expire"]
        assert off or guest.name == "wavering"
        assert len(done.told) < MAX_ANSWERS // 4
        if guest.check in ("09.1", "09.2"):
            assert all(len(alarms) == 1 for alarms in off)
        if guest.check == "09.2":
            assert any(clock == VIRTUAL for alarms in off for _vcpu, clock in alarms)
        if guest.check == "09.4":
            assert any(len(alarms) > 1 for alarms in off)
        for domain in done.xen.domains.values():
            assert not domain.crashed
        # What was let go off, the kernels have heard of.
        heard = [word(done, domid, name) for domid in done.xen.domains for name in ("timer", "virtual")]
        assert sum(heard) <= sum(map(len, off))
        assert sum(heard) >= sum(map(len, off)) - len(done.xen.domains)


def word(done: Run, domid: int, name: str) -> int:
    (source,) = {guest.source for guest in made(0).guests()}  # all guests are one program
    return done.xen.guest_memory.read_word(done.xen.domains[domid].vcpus[0], image_of(source, "").symbols[name])


def test_all_rules_occur() -> None:
    rules = [made(seed_of(f"student-{number}")).parameters for number in range(80)]
    for name, values in {"past": 3, "beyond": 3, "again": 2, "first": 2, "vcpus": 2, "most": 2}.items():
        assert len({found[name] for found in rules}) == values
    assert all(found["past"] != found["beyond"] for found in rules)
    assert all(found["step"][REAL] != found["step"][VIRTUAL] for found in rules)


@pytest.mark.parametrize("omitted", ["a multiple already", "reach"])
def test_self_checks_of_09_look_at_less_than_grading(omitted: str) -> None:
    assert self_checks("09", OMISSIONS[omitted], "ada") == [True] * 4


# The ledger.


def told(method: str, *arguments: Any, answer: Any = None) -> Told:
    return Told(method, arguments, answer, arguments[-1] if method == "expire" else arguments[-2], 0, 0)


def ledger(**changed: Any) -> Ledger:
    rules: dict[str, Any] = {
        "step": {REAL: 100, VIRTUAL: 70}, "reach": 1000, "past": COUNTS, "beyond": DROPS, "again": "newest",
        "first": REAL, "vcpus": "lowest", "most": 2,
    }  # fmt: skip
    return Ledger(Rules(**(rules | changed)))


def test_the_ledger_names_what_is_late_early_and_in_the_wrong_order() -> None:
    late = ledger()
    assert late.problem(told("set", 0, REAL, 250, 120, 30)) == ""
    assert late.problem(told("expire", 250, answer=((0, REAL),))).startswith(
        "expire(250) = [(0, 'real')]\nnothing goes"
    )
    assert "at instruction 300 the alarm of vCPU 0 on real time (set to 250" in late.problem(told("run", 0, 301, 30))
    order = ledger()
    for vcpu in (32, 0, 64):
        order.problem(told("set", vcpu, REAL, 250, 120, 30))
    said = order.problem(told("expire", 300, answer=((32, REAL), (0, REAL))))
    assert "in this order: the alarm of vCPU 0" in said
    assert "and 1 more a step later" in said
    assert order.problem(told("expire", 300, answer=((0, REAL), (32, REAL)))) == ""
    assert "vCPU 64" in order.missed(401)
    assert order.missed(400) == ""


def test_the_ledger_lets_virtual_time_stand_still() -> None:
    kept = ledger()
    for call in (("run", 32, 1000, 10), ("set", 32, VIRTUAL, 100, 1010, 20), ("stop", 32, 1050, 60)):
        assert kept.problem(told(*call)) == ""
    assert kept.missed(9000) == ""
    assert kept.problem(told("run", 32, 5000, 60)) == ""
    assert kept.missed(5080) == ""
    assert "vCPU 32 on virtual time" in kept.missed(5081)


def test_calls_are_written_as_in_python() -> None:
    assert called("set", (0, REAL, None, 5, 6)) == "set(0, 'real', None, 5, 6)"
    assert str(told("expire", 7, answer=((0, REAL),))) == "expire(7) = [(0, 'real')]"
