"""Instances, worlds, decisions, replay, self-checks."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenlab.errors import XenlabError
from xenlab.grading import exercise
from xenlab.grading.decisions import Unusable, changes_of, result_of
from xenlab.grading.guests import image_from_source, record, replay
from xenlab.grading.hidden.lesson_01 import truth
from xenlab.grading.instances import Choices, seed_of
from xenlab.grading.lessons import NUMBERS, lesson
from xenlab.grading.lessons.lesson_01 import _THEMES
from xenlab.hypervisor.trace import Kind

# Robin and Irvine's list of sensitive instructions that do not trap, as far as it is in the exercise.
SILENT = {
    "popf",
    "pushf",
    "sgdt [buffer]",
    "sidt [buffer]",
    "sldt ax",
    "str ax",
    "smsw ax",
    "lar eax, ecx",
    "lsl eax, ecx",
}
SILENT |= {"verr cx", "verw cx", "mov eax, cs", "push cs"}
HARMLESS = {"sahf", "lahf", "cld", *_THEMES[4][1]}


def test_seed_follows_from_the_id_alone() -> None:
    assert seed_of("") == seed_of("  ") == 0
    assert seed_of("ada") == seed_of(" ada ") == 4260250381
    assert seed_of("ada") != seed_of("grace")


@given(st.integers(0, 1 << 32), st.text(max_size=8))
def test_choices_stay_in_range_and_differ(seed: int, name: str) -> None:
    choices = Choices(seed, "99")
    assert 3 <= choices.number(name, 3, 9) <= 9
    sample = choices.sample(name, range(10), 4)
    assert len(set(sample)) == 4


@pytest.mark.parametrize("number", NUMBERS)
def test_neighbours_have_other_instances(number: str) -> None:
    tasks = {lesson(number, seed_of(f"student-{n}")).task() for n in range(20)}
    assert len(tasks) > 15
    assert lesson(number, 5).task() == lesson(number, 5).task()


@pytest.mark.parametrize("number", NUMBERS)
def test_points_add_up_to_ten(number: str) -> None:
    assert sum(plan.points for plan in lesson(number, 0).plan) == 10


def test_task_without_a_student_says_that_it_is_everybodys() -> None:
    for shown in (repr(exercise("02")), exercise("02", "  ")._repr_markdown_()):
        assert "`student` is empty, so this is the instance of seed 0" in shown
    assert "`student` is empty" not in repr(exercise("02", "ada")) + exercise("02", "ada")._repr_markdown_()


def test_unknown_exercise_is_named() -> None:
    with pytest.raises(XenlabError, match="exercise '47'"):
        exercise("47")


@pytest.mark.parametrize("name", [name for _, theme in _THEMES for name in theme])
def test_the_cpu_says_what_the_literature_says(name: str) -> None:
    expected = "silent" if name in SILENT else "harmless" if name in HARMLESS else "traps"
    kind, seen = truth(name)
    assert kind == expected, seen


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["eax", "changes", "result", "writes"]), inner)
    ),
)


@given(st.dictionaries(st.sampled_from(["refuse", "changes", "result", "writes", "unusable"]), JSON))
def test_any_decision_is_usable_or_named(decision: dict[str, object]) -> None:
    for read in (changes_of, result_of):
        try:
            value = read(decision)
        except Unusable:
            continue
        assert value is None or len(value) <= 64


class Moody:
    """Decides by chance: no second run would be like the first."""

    def emulate(self, code: bytes, registers: dict[str, int], system: dict[str, int]) -> dict[str, int] | None:
        return {"eax": int.from_bytes(os.urandom(4), "little"), "eip": registers["eip"] + 2}


def test_replay_is_the_recorded_run_whatever_the_part_would_do_now() -> None:
    emulation = lesson("02", 0)
    guest = emulation.guests()[0]
    image = image_from_source(guest.source, guest.name)
    decisions = record(image, emulation.slot, Moody)
    one, two = (replay(image, emulation.slot, decisions) for _ in range(2))
    assert one.events == two.events
    assert [event.changes for event in one.of(Kind.EMULATE)] == [tuple(sorted(d["changes"].items())) for d in decisions]


def test_missing_decisions_stop_the_replay_with_a_reason() -> None:
    emulation = lesson("02", 0)
    guest = emulation.guests()[0]
    run = replay(image_from_source(guest.source, guest.name), emulation.slot, [])
    assert "no decision" in run.problem
    assert "first wrong step" in emulation.judge(guest, run, []).message


def test_self_check_is_never_called_correct() -> None:
    class Refuse:
        def emulate(self, code: bytes, registers: dict[str, int], system: dict[str, int]) -> None:
            return None

    made = exercise("02", "ada")
    failed, passed = made.check("02.1", Refuse), made.check("02.4", Refuse)
    assert not failed
    assert "first wrong step" in repr(failed)
    assert passed
    assert "self-check" in repr(passed)
    assert "correct" not in repr(passed)


def test_self_check_names_wrong_use() -> None:
    with pytest.raises(XenlabError, match=r"expected one of 02\.1"):
        exercise("02").check("7", object)
    with pytest.raises(XenlabError, match="takes 2 answers"):
        exercise("01").check("01.1", {})
    assert "expected the class MyEmulator" in repr(exercise("02").check("02.1", 3))
