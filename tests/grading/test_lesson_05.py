"""The validator: each rule that is left out costs, and the report says where, with the entry decoded."""

from __future__ import annotations

from typing import Any

import pytest
from exercise_bench import (
    POSIX,
    SEEDS,
    Grade,
    all_guests,
    changed,
    messages,
    names_in,
    points,
    solution_of,
    tried_with,
)
from exercise_bench import played as played_by
from hypothesis import given
from hypothesis import strategies as st

from xenlab.abi.numbers import Errno
from xenlab.grading import exercise
from xenlab.grading.decisions import Recorder, Replayer, Unusable
from xenlab.grading.guests import Run, image_from_source, record, replay
from xenlab.grading.instances import seed_of
from xenlab.grading.lessons import lesson
from xenlab.grading.lessons.base import Finding, Guest
from xenlab.grading.lessons.page_guests import map_page, own
from xenlab.grading.page_types_slot import MAX_ANSWERS, PageTypesSlot, answer_of
from xenlab.grading.patience import OutOfPatience, patience
from xenlab.grading.validated import known_frames
from xenlab.hypervisor.trace import Kind
from xenlab.labs.obedient import Obedient

STUDENT = "ada"
USES, REFS = ("self.uses[mfn] -= 1", "self.uses[mfn] -= 0"), ("self.refs[mfn] -= 1", "self.refs[mfn] -= 0")
UNUSED = "return answer if self.refs[mfn] else answer + 2"
GRANTED = "return 1 if 1 <= use <= 5 and not uses else 0"
COUNTED = "uses and kind != use and not self.refs.update({mfn: self.refs.get(mfn, 0) + 1})"
OMISSIONS = {
    "uses": USES,
    "refs": REFS,
    "owner": ('return RULES["foreign"] if owner != domid else 0', "return 0"),
    "flags": ('return RULES["flags"] if bad or user else 0', "return 0"),
    "user": ("if bad or user else", "if bad else"),
    "order": ('if RULES["first"] == "frame":', 'if RULES["first"] != "frame":'),
    "limit": (' or uses == RULES["most_uses"]', ""),
    "types": ("(uses and kind != use) or ", ""),
    "secret": ("and kind == 5 and RULES", "and kind == 5 and not RULES"),
    "validate": (GRANTED, "return 0"),
    "unused": (UNUSED, "return answer + 2"),
    "refused": ("uses and kind != use", COUNTED),
}
LEFT = {
    "uses": (0, 0, 0),
    "refs": (3, 3, 3),
    "owner": (2, 1, 0),
    "flags": (2, 1, 4),
    "user": (3, 2, 4),
    "order": (3, 2, 4),
    "limit": (2, 3, 3),
    "types": (3, 3, 1),
    "secret": (3, 3, 3),
    "validate": (0, 0, 0),
    "unused": (0, 0, 0),
    "refused": (3, 3, 3),
}
SAID = {
    "uses": "asked before about the same frames: take(0x2d0, 0) = 0, take(0x2d0, 6) = 0, take(0x2d0, 0) = 0, "
    "drop(0x2d0, 6) = 0",
    "refs": "the frame is free; expected the answer -",
    "owner": "the frame is the neighbour's; expected the answer -",
    "flags": "is not for guests; expected the answer -",
    "user": "no page of this kind for applications; expected the answer -",
    "order": "of two broken rules the",
    "limit": "uses; expected the answer -EBUSY (-16), found 0",
    "types": "a page table must not be writable; expected the answer -EBUSY (-16), found 0",
    "secret": "entry('l1', 0x61, 1, 1) = 0, take(",
    "validate": "the auditor after it: RANGE: no guest entry reaches the hypervisor's range",
    "unused": "the auditor after it: OWNERSHIP: no guest maps a frame that it neither owns",
    "refused": "take(0x18a, 1) = -1, take(0x18a, 6) = 0, drop(0x18a, 0) = 0",
}


@pytest.mark.parametrize("omitted", OMISSIONS)
def test_each_omitted_rule_costs(omitted: str) -> None:
    report = tried_with("05", OMISSIONS[omitted], STUDENT)
    expected = LEFT[omitted]
    assert points(report) == expected, report.text()
    assert SAID[omitted] in messages(report)


def test_the_entry_is_decoded_and_the_hypercall_named(judged: Grade) -> None:
    said = messages(judged("05", changed("05", *OMISSIONS["owner"]), STUDENT))
    neighbour, _free = known_frames()
    assert "first wrong step: hypercall 2, instruction " in said
    assert f"frame {neighbour:#x}, present, writable, accessed, dirty" in said
    assert f"take({neighbour:#x}, 6) = 0" in said


OURS = """
from xenlab import Machine
from xenlab.hypervisor.frames import FrameTable
from xenlab.hypervisor.page_types import FrameTypes
class MyPageTypes(FrameTypes):
    def __init__(self):
        super().__init__(FrameTable(Machine(4).memory))
"""
REFUSE_ALL = """
class MyPageTypes:
    def entry(self, level, flags, domid, owner): return -1
    def take(self, mfn, use): return -1
    def drop(self, mfn, use): return 0
"""
GRANT_ALL = """
class MyPageTypes:
    def entry(self, level, flags, domid, owner): return 1 if level == "l2" else 6
    def take(self, mfn, use): return 1 if 1 <= use <= 5 else 0
    def drop(self, mfn, use): return 0
"""


@pytest.mark.parametrize("answer", [OURS, REFUSE_ALL, GRANT_ALL], ids=["ours", "refuse", "grant"])
def test_ours_and_no_thought_at_all_earn_nothing(judged: Grade, answer: str) -> None:
    report = judged("05", answer, STUDENT)
    assert report.score == 0, report.text()
    assert report.error is None


LOOP = "while use == 1 and len(self.refs) > 500 and self.uses.get(mfn): pass"


@pytest.mark.parametrize(
    ("spoilt", "said"),
    [
        ("return [].pop() if use == 4 else 0", "take(0x261, 4) raised IndexError: pop from empty list"),
        ("return 'granted'", "take(0xa5, 0) must answer a whole number, it answered 'granted'"),
        ("return None", "must answer a whole number, it answered None"),
        ("return True", "must answer a whole number, it answered True"),
        ("return 2", "take(0xa5, 0) must answer -1 (refused), 0 (granted) or 1 (granted, validate), it answered 2"),
        ("return 1 << 99", "must answer -1 (refused)"),
        ("raise SystemExit", "take(0xa5, 0) raised SystemExit"),
    ],
)
def test_a_validator_that_raises_or_answers_nonsense_is_told_so(spoilt: str, said: str) -> None:
    report = tried_with("05", (GRANTED, spoilt), STUDENT)
    assert report.score == 0
    assert said in messages(report)


def test_a_wrong_drop_is_named_with_the_hypercall() -> None:
    said = messages(tried_with("05", (UNUSED, "return 7"), STUDENT))
    assert "first wrong step: hypercall 1" in said
    assert "must answer 0, 1 (untyped), 2 (unused) or 3 (both), it answered 7" in said


def test_a_missing_method_is_named(judged: Grade) -> None:
    report = judged("05", "class MyPageTypes:\n    def take(self, mfn, use): return 1", STUDENT)
    assert report.score == 0
    assert "has no attribute 'entry'" in messages(report)


@pytest.mark.slow
@POSIX
def test_a_validator_that_loops_in_some_guests_loses_those(judged: Grade) -> None:
    answer = changed("05", "        uses, kind =", f"        {LOOP}\n        uses, kind =")
    report = judged("05", answer, STUDENT)
    assert report.error is None
    assert points(report) == (2, 3, 1)
    assert "mmu_update: entry 700 of frame" in messages(report)
    assert "did not answer within 1 s of CPU time" in messages(report)


def played(part: Any, guest: Guest, student: str = STUDENT) -> tuple[Finding, Run]:
    """A guest on a part, and what is found."""
    made = lesson("05", seed_of(student))
    run, decisions = played_by(made, guest, part)
    return made.judge(guest, run, decisions), run


def right(student: str = STUDENT) -> Any:
    return names_in("05", solution_of("05"), student)["MyPageTypes"]


@given(seed=SEEDS)
def test_seeds_choose_distinct_errnos_and_a_limit_that_lets_domains_be_built(seed: int) -> None:
    rules = lesson("05", seed).parameters
    errnos = [rules[name] for name in ("flags", "nowhere", "foreign", "nobody")]
    assert len(set(errnos)) == 4
    # What `take` leads to is told apart from what `entry` says.
    assert not {Errno.EBUSY, Errno.EINVAL} & set(errnos)
    assert 3 <= rules["most_uses"] <= 6


@pytest.mark.parametrize("number", range(3))
def test_solution_passes_every_guest_of_many_seeds(number: int) -> None:
    student = f"student-{number}"
    made, part = lesson("05", seed_of(student)), right(student)
    for guest in all_guests(made):
        finding, run = played(part, guest, student)
        assert finding.passed, finding.message
        assert run.violations == []
        assert len(run.calls) == len(guest.steps) + 1
        assert len(run.questions) < MAX_ANSWERS // 2


def test_our_own_validator_fails_every_guest_that_counts_for_service() -> None:
    """Each of them has a step by a rule that the seed chose, so that none is passed by a copy of ours."""
    namespace: dict[str, Any] = {}
    exec(OURS, namespace)
    for student in ("", STUDENT, "grace"):
        made = lesson("05", seed_of(student))
        for guest in all_guests(made):
            if guest.check == "05.1":
                finding, _run = played(namespace["MyPageTypes"], guest, student)
                assert not finding.passed, guest.name


def test_the_judge_sees_the_recorded_run_whatever_the_part_would_do_now() -> None:
    made = lesson("05", seed_of(STUDENT))
    guest = made.guests()[0]
    image = image_from_source(guest.source, guest.name)
    decisions = record(image, made.slot, right())
    assert all(type(decision) is int for decision in decisions)
    one, two = (replay(image, made.slot, decisions) for _ in range(2))
    assert one.events == two.events
    assert [question.answer for question in one.questions] == decisions
    cut = replay(image, made.slot, decisions[:900])
    assert "no decision" in cut.problem
    assert "it could not be built" in made.judge(guest, cut, decisions[:900]).message


def test_a_run_ends_with_the_hypercall_that_broke_something() -> None:
    made = lesson("05", seed_of(STUDENT))
    steps = (map_page(0, own(1)), made.theirs(1), map_page(2, own(1)))
    namespace: dict[str, Any] = {}
    exec(GRANT_ALL, namespace)
    _finding, run = played(namespace["MyPageTypes"], made.guest("05.1", "test", steps))
    assert len(run.calls) == 2
    assert run.violations[0].invariant.name == "OWNERSHIP"


def test_frames_that_guests_know_are_what_they_say() -> None:
    neighbour, free = known_frames()
    made = lesson("05", 0)
    namespace: dict[str, Any] = {}
    exec(GRANT_ALL, namespace)
    _finding, run = played(namespace["MyPageTypes"], made.guests()[0])
    assert run.xen.frames.owner[neighbour] == 0
    assert run.xen.frames.owner[free] == -2
    assert run.domain.domid == 1


@given(
    st.sampled_from(["entry", "take", "drop"]),
    st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers()) | st.just({"unusable": "x"}),
)
def test_any_decision_is_a_number_that_the_hypervisor_understands_or_named(method: str, decision: Any) -> None:
    arguments = ("l1", 0x63, 1, 1) if method == "entry" else (0x70, 6)
    try:
        answer = answer_of(method, arguments, decision)
    except Unusable:
        return
    assert type(answer) is int
    assert -95 <= answer <= 6


def test_a_part_is_not_asked_for_ever() -> None:
    class Granting:
        def take(self, _mfn: int, _use: int) -> int:
            return 0

    recorder = Recorder(3)
    slot = PageTypesSlot(recorder, Granting())  # type: ignore[arg-type]
    assert [slot.take(number, 6) for number in range(3)] == [0, 0, 0]
    with pytest.raises(Unusable, match="asked 3 times"):
        slot.take(3, 6)
    again = PageTypesSlot(Replayer(recorder.decisions, 3))
    assert [again.take(number, 6) for number in range(3)] == [0, 0, 0]
    with pytest.raises(Unusable, match="asked 3 times"):
        again.take(3, 6)


@POSIX
def test_patience_ends_a_loop_and_nothing_else() -> None:
    def loop() -> None:
        with patience(0.05):
            while True:
                pass

    with pytest.raises(OutOfPatience):
        loop()
    with patience(60):
        assert sum(range(10)) == 45


def test_a_student_can_try_the_part_on_the_guest_of_the_lesson() -> None:
    guest = Obedient(page_types=right()())
    page = guest.page(0)
    assert guest.update(guest.leaf, 300, guest.mode.entry(page.mfn, 0x63)).result == 0
    foreign = exercise("05", STUDENT).parameters["foreign"]
    assert guest.update(guest.leaf, 301, guest.mode.entry(guest.neighbour, 0x63)).result == -foreign
    assert guest.xen.trace is not None
    assert [event.errno for event in guest.xen.trace.events(Kind.REFUSED)] == [foreign]
