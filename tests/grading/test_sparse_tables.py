"""Exercise 04: what the MMU makes of right, half-right and hostile page tables."""

from __future__ import annotations

import json
from typing import Any

import pytest
from exercise_bench import Grade, Read, changed, messages, more, points
from hypothesis import given, settings
from hypothesis import strategies as st

from xenlab.grading import exercise
from xenlab.grading.hidden.lesson_04 import all_probes, findings
from xenlab.grading.instances import seed_of
from xenlab.grading.lessons import lesson
from xenlab.grading.lessons.base import checks_of
from xenlab.grading.lessons.lesson_04 import TablesForASparseGuest, self_check_probes, solve
from xenlab.grading.lessons.sparse_probes import MOST_PROBES
from xenlab.grading.lessons.sparse_tables import construct
from xenlab.hypervisor.auditor import check

NOBODY = "{guest['name']: None for guest in exercise.parameters['guests']}"
# What is changed in the solution, the points that are left for the four checks, and what the report says.
MISTAKES: dict[str, tuple[str, str, tuple[int, int, int, int], str]] = {
    "pfn for mfn": ("frames[pfn] << 12 | flags", "pfn << 12 | flags", (0, 0, 0, 0), "the hypervisor refused entry"),
    "a level wrong": ("(21, 512), (12, 512)]", "(22, 512), (12, 512)]", (2, 2, 1, 1), "the guest was not started"),
    "two-level only": (
        "root = new_table()",
        "root = new_table() if len(levels) == 2 else None",
        (1, 2, 1, 1),
        "raised",
    ),
    "tables writable": ("| PRESENT)\n    return", "| PRESENT | RW)\n    return", (1, 2, 1, 0), "-EBUSY"),
    "user bit above forgotten": (
        "PRESENT | RW | USER\n",
        "PRESENT | RW\n",
        (2, 2, 0, 1),
        "page fault with error code 5",
    ),
    "user bit forgotten": ('(USER if region["user"] else 0)', "0", (2, 2, 0, 0), "page fault with error code 5"),
    "rw bit forgotten": ('(RW if region["writable"] else 0)', "0", (2, 0, 0, 0), "is not on writable memory"),
    "all for ring 3": ('(USER if region["user"] else 0)', "USER", (2, 4, 1, 1), "found that it was allowed"),
    "all writable": (
        '(RW if region["writable"] else 0)',
        "RW",
        (2, 3, 0, 1),
        "error code 3, found that it was allowed",
    ),
    "holes filled": (
        "elif parked is not None:",
        "else:\n                put(address, root << 12 | 1)\n            if 0:",
        (2, 4, 1, 1),
        "",
    ),
    "marker forgotten": ('RULES["marker"] << 9', "0", (2, 4, 2, 1), "the entry of"),
    "parked elsewhere": ('parked << RULES["parked_shift"]', "parked << 13", (2, 4, 2, 1), "the entry of"),
    "tables in another order": ('enumerate(guest["tables"])', 'enumerate(guest["tables"][::-1])', (2, 4, 2, 0), ""),
    "spare tables not mapped": (
        'enumerate(guest["tables"])',
        'enumerate(guest["tables"][: len(tables)])',
        (2, 4, 2, 1),
        "of the tables)",
    ),
    "tables for ring 3": ("| PRESENT)\n    return", "| PRESENT | USER)\n    return", (2, 4, 2, 1), "ring 3 reads at"),
}


@pytest.mark.parametrize("student", ["", *more("ada", "s4")])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_costs_what_it_breaks(judged: Grade, mistake: str, student: str) -> None:
    there, instead, left, said = MISTAKES[mistake]
    report = judged("04", changed("04", there, instead), student)
    assert points(report) == left, report.text()
    assert said in messages(report)


def test_a_fault_is_shown_with_the_walk_there(judged: Grade, solution: Read) -> None:
    report = judged("04", solution("04").replace("PRESENT | RW | USER\n", "PRESENT | RW\n"))
    assert "guest 'plain two-level': ring 3 reads at 0x" in messages(report)
    assert "the walk there: l2[" in messages(report)


def answers(solution: Read, student: str = "") -> dict[str, Any]:
    namespace: dict[str, Any] = {"exercise": exercise("04", student)}
    exec(solution("04"), namespace)
    found: dict[str, Any] = solve(namespace["page_tables"], namespace["exercise"].parameters["guests"])
    return found


def made(student: str = "") -> TablesForASparseGuest:
    found = lesson("04", seed_of(student))
    assert isinstance(found, TablesForASparseGuest)
    return found


@pytest.mark.parametrize("number", range(12))
def test_the_solution_is_right_for_every_seed(solution: Read, number: int) -> None:
    student = f"student-{number}"
    exercise_made, answer = made(student), answers(solution, student)
    for form in (answer, json.loads(json.dumps(answer))):
        wrong = [finding.message for finding in findings(exercise_made, {"answer": form}) if not finding.passed]
        assert not wrong
    for guest in exercise_made.guests_to_build:
        built = construct(guest, answer[guest.name])
        assert sum(map(len, all_probes(built).values())) <= MOST_PROBES
        assert not any(built.run([probe for group in self_check_probes(built).values() for probe in group]))
        check(built.xen)


def test_self_checks_tell_less_than_grading(solution: Read) -> None:
    namespace: dict[str, Any] = {"exercise": exercise("04", "ada")}
    there, instead, *_ = MISTAKES["spare tables not mapped"]
    exec(solution("04").replace(there, instead), namespace)
    answer = solve(namespace["page_tables"], namespace["exercise"].parameters["guests"])
    assert all(namespace["exercise"].check(f"04.{number}", answer) for number in range(1, 5))


SHAPES: list[Any] = [
    None,
    7,
    [],
    {"root": 1},
    {"root": 1, "tables": []},
    {"root": True, "tables": {}},
    {"root": 1.0, "tables": {}},
    {"root": -1, "tables": {}},
    {"root": 1 << 80, "tables": {}},
    {"unusable": "nothing"},
    {"root": 1, "tables": {"1": {}}},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_answer_of_another_shape_is_refused_in_words(shape: Any) -> None:
    exercise_made = made()
    for answer in (shape, dict.fromkeys((guest.name for guest in exercise_made.guests_to_build), shape)):
        found = findings(exercise_made, {"answer": answer})
        assert not any(finding.passed for finding in found)
        assert all(finding.message.startswith("guest '") for finding in found)
        assert not any(check.points for check in checks_of(exercise_made.plan, found))


def test_entries_and_frames_out_of_range_are_named(solution: Read) -> None:
    guest = made().guests_to_build[0]
    whole = answers(solution)[guest.name]
    root = whole["root"]
    foreign = next(mfn for pfn, mfn in enumerate(guest.p2m) if pfn not in guest.tables)
    for tables, said in (
        ({root: {1024: 1}}, "in two-level format expected an index below 1024"),
        ({root: {0: 1 << 32}}, "an entry of 4 bytes"),
        ({root: {"x": 1}}, "an index in table"),
        ({root: {0: "é"}}, "an entry of table"),
        ({root: [1]}, "expected a dict of entries"),
        ({foreign: {0: 1}}, "expected frames of the pages in 'tables' only"),
    ):
        assert said in construct(guest, {"root": root, "tables": tables}).refused
    assert "the root in frame" in construct(guest, {"root": foreign, "tables": {}}).refused


def test_tables_that_are_code_are_not_executed(solution: Read) -> None:
    """A table page in the place of the kernel's code would be code of the student's choice."""
    guest = made().guests_to_build[0]
    answer = answers(solution)[guest.name]
    kernel, spare = guest.region("kernel").start, guest.p2m[guest.tables[-1]]
    root, index = answer["root"], kernel >> 22
    leaf = answer["tables"][answer["tables"][root][index] >> 12]
    leaf[kernel >> 12 & 1023] = spare << 12 | 1
    # MOV EAX, CR0, an entry that the MMU takes for absent: harmless here, and never begun.
    answer["tables"][spare] = {0: 0x00C0_200E}
    built = construct(guest, answer)
    assert not built.refused
    problems = built.run([probe for group in all_probes(built).values() for probe in group])
    assert all("so the guest was not started" in problem for problem in problems)
    assert built.xen.now == 0


@settings(max_examples=40)
@given(data=st.data())
def test_any_tables_at_all_give_findings_and_a_content_auditor(data: st.DataObject) -> None:
    guest = made().guests_to_build[data.draw(st.integers(0, 3))]
    frames = [guest.p2m[pfn] for pfn in guest.tables]
    flags = st.integers(0, 0xFFF)
    entry = st.builds(lambda mfn, low: mfn << 12 | low, st.sampled_from(frames + list(guest.p2m[:4])), flags)
    tables = data.draw(
        st.dictionaries(st.sampled_from(frames), st.dictionaries(st.integers(0, 511), entry, max_size=6))
    )
    built = construct(guest, {"root": data.draw(st.sampled_from(frames)), "tables": tables})
    check(built.xen)
    if not built.refused:
        built.run([probe for group in all_probes(built).values() for probe in group])
        check(built.xen)


def test_nothing_is_handed_in_without_a_function(judged: Grade) -> None:
    report = judged("04", f"page_tables = None\nanswer = {NOBODY}")
    assert report.score == 0
    assert "raised TypeError" in messages(report)
