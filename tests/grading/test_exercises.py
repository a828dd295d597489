"""A right answer gets full points, none gets none, a half-right one a part, each with feedback that helps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from exercise_bench import Grade, messages, more, points_by_check, self_checks, solution_of, tried
from hypothesis import given
from hypothesis import strategies as st

from xenlab.grading.judge import grade
from xenlab.grading.lessons import lesson

NUMBERS = ("00", "01", "02", "03", "04", "05", "06", "07", "08", "09", "10", "13")

HALF_00 = """
source = '''
start:  mov ebx, CONSOLEIO_write
        mov ecx, length
        mov edx, offset line
        mov eax, __HYPERVISOR_console_io
        int 0x82
        hlt
line:   .ascii "''' + exercise.parameters["lines"][0] + '''\\\\n"
length = . - line
'''
"""
HALF_02 = """
class MyEmulator:
    def emulate(self, code, registers, system):
        rules = exercise.parameters
        if code[:2] == b"\\x0f\\x31":
            time = system["tsc"] * rules["factor"] + rules["offset"]
            return {"eax": time & 0xFFFFFFFF, "edx": time >> 32 & 0xFFFFFFFF, "eip": registers["eip"] + 2}
        if code[:3] == b"\\x0f\\x20\\xe0":
            return {"eax": system["cr4"], "eip": registers["eip"] + 3}
        return None
"""


# Of 10, whose guests run longest, there is another student in test_exercise_10.
@pytest.mark.parametrize(
    ("number", "student"),
    [
        *((number, "") for number in NUMBERS),
        *((number, "ada") for number in NUMBERS if number != "10"),
        *more(("10", "ada"), *((number, "grace") for number in NUMBERS)),
    ],
)
def test_solution_gets_full_points(judged: Grade, number: str, student: str) -> None:
    report = judged(number, student=student)
    assert report.error is None
    assert (report.score, report.max_score) == (10, 10), report.text()


@pytest.mark.parametrize("number", NUMBERS)
def test_empty_submission_gets_nothing(repository: Path, number: str) -> None:
    (report,) = grade((repository / "exercises").glob(f"{number}-*.ipynb"))
    assert (report.score, report.max_score, report.error) == (0, 10, None)
    assert all(check.message for check in report.checks)
    assert any("NotImplementedError" in text for text in (*report.notes, messages(report)))


def test_half_right_00_prints_one_line_and_crashes(judged: Grade) -> None:
    report = judged("00", HALF_00)
    assert points_by_check(report) == {"00.1": 2, "00.2": 0, "00.3": 0, "00.4": 0}
    assert "lines, found 1" in messages(report)
    assert "no handler registered" in messages(report)


def test_empty_console_00_is_not_called_right(judged: Grade, solution: Callable[[str], str]) -> None:
    said = messages(judged("00", 'source = "start: hlt"'))
    assert "nothing was written; " in said
    assert "is right" not in said
    short = messages(judged("00", solution("00").replace("dec esi", "mov esi, 0\n        test esi, esi")))
    assert "what was written is right but not all" in short


def test_wrong_line_00_names_the_first_wrong_call(judged: Grade, solution: Callable[[str], str]) -> None:
    backwards = solution("00").replace('"inc" if', '"dec" if').replace('else "dec"', 'else "inc"')
    report = judged("00", backwards)
    assert points_by_check(report) == {"00.1": 2, "00.2": 0, "00.3": 2, "00.4": 2}
    assert "first wrong step: instruction" in messages(report)
    assert "int 0x82" in messages(report)


def test_refused_call_00_is_shown_with_its_arguments(judged: Grade, solution: Callable[[str], str]) -> None:
    report = judged("00", solution("00").replace("offset line\n", "0x10\n"))
    assert report.score == 0
    assert "address 0x10 answered -14" in messages(report)


def test_assembly_error_00_names_the_line(judged: Grade) -> None:
    report = judged("00", 'source = "start: nop\\n  moov eax, 1\\n"')
    assert report.score == 0
    assert report.error is None
    assert "line 2" in messages(report)


def test_half_right_01_misjudges_and_proves_little(judged: Grade, solution: Callable[[str], str]) -> None:
    spoil = """
silent = [name for name, kind in classification.items() if kind == "silent"]
classification[silent[0]] = "harmless"
proofs[silent[1]] = "mov eax, cs"
"""
    report = judged("01", solution("01") + spoil)
    assert points_by_check(report)["01.1"] == points_by_check(report)["01.3"] == 1
    assert points_by_check(report)["01.2"] == 0
    assert 0 < points_by_check(report)["01.4"] < 6
    assert "in ring 1 it raised nothing" in messages(report)
    assert "does not contain the instruction" in messages(report)


def called(kind: str, other: str, count: int) -> str:
    """Code that calls the first instructions of one class by another."""
    wrong = f"[name for name, found in classification.items() if found == {kind!r}][:{count}]"
    return f"\nclassification.update(dict.fromkeys({wrong}, {other!r}))"


@pytest.mark.parametrize(("kind", "check"), [("traps", "01.1"), ("silent", "01.2"), ("harmless", "01.3")])
def test_one_wrong_class_01_costs_in_one_check(
    judged: Grade, solution: Callable[[str], str], kind: str, check: str
) -> None:
    full = points_by_check(judged("01", student="ada"))
    for other in {"traps", "silent", "harmless"} - {kind}:
        report = judged("01", solution("01") + called(kind, other, 1), "ada")
        assert points_by_check(report) == full | {check: 0}, report.text()


def test_several_wrong_classes_01_cost_where_they_are_named_too(judged: Grade, solution: Callable[[str], str]) -> None:
    report = judged("01", solution("01") + called("silent", "harmless", 2), "ada")
    assert (points_by_check(report)["01.2"], points_by_check(report)["01.3"]) == (0, 0)
    assert "2 others are called 'harmless' too" in messages(report)


def test_missing_proof_01_of_a_wrong_class_says_why_it_is_asked_for(
    judged: Grade, solution: Callable[[str], str]
) -> None:
    forget = """
name = next(name for name, kind in classification.items() if kind == "silent")
classification[name] = "harmless"
del proofs[name]
"""
    report = judged("01", solution("01") + forget)
    assert points_by_check(report)["01.3"] == 1
    assert "counts by itself, besides its class in 01.2" in messages(report)


@pytest.mark.parametrize("kind", ["traps", "silent", "harmless"])
def test_guessing_one_class_earns_nothing(judged: Grade, kind: str) -> None:
    report = judged(
        "01", f"classification = dict.fromkeys(exercise.parameters['instructions'], {kind!r})\nproofs = {{}}"
    )
    assert report.score == 0


def test_proof_must_be_by_the_instruction_itself(judged: Grade, solution: Callable[[str], str]) -> None:
    beside = '\nproofs = {name: program + "\\nmov eax, cs" for name, program in proofs.items()}'
    report = judged("01", solution("01") + beside)
    assert points_by_check(report)["01.4"] < 6
    assert "also differs without the instruction" in messages(report)


def test_half_right_02_has_the_clock_only(judged: Grade) -> None:
    report = judged("02", HALF_02)
    assert points_by_check(report)["02.1"] == 3
    assert points_by_check(report)["02.2"] == points_by_check(report)["02.3"] == 0
    assert 0 < report.score < 10
    assert "first wrong step: instruction" in messages(report)
    assert "mov eax, cr4" in messages(report)
    assert "expected eax" in messages(report)


RING = ('if system["ring"] != 1:', "if False:")
MASK = ('value & ~RULES["cr4_allowed"] == 0', "True")
WRAP = (">> 32 & 0xFFFFFFFF", ">> 32")
OMISSIONS = {"ring": (RING,), "mask": (MASK,), "wrap": (WRAP,), "all": (RING, MASK, WRAP)}
LEFT_02 = {
    "ring": {"02.1": 3, "02.2": 2, "02.3": 1, "02.4": 2},
    "mask": {"02.1": 3, "02.2": 2, "02.3": 1, "02.4": 2},
    "wrap": {"02.1": 2, "02.2": 2, "02.3": 1, "02.4": 4},
    "all": {"02.1": 2, "02.2": 2, "02.3": 1, "02.4": 0},
}
SEEN_02 = {
    "ring": ("guest 'application-cr4'", "guest 'application-register'"),
    "mask": ("guest 'greedy'", "guest 'one-bit-too-many'"),
    "wrap": ("guest 'time-wraps'", "the new edx must be a whole number of 32 bits, found 4294967296"),
    "all": ("guest 'time-wraps'", "and 2 more like these"),
}


@pytest.mark.parametrize("student", ["", *more("ada", "grace")])
@pytest.mark.parametrize("omitted", OMISSIONS)
def test_each_omitted_rule_of_02_costs(omitted: str, student: str) -> None:
    answer = solution_of("02")
    for there, instead in OMISSIONS[omitted]:
        assert there in answer
        answer = answer.replace(there, instead)
    report = tried("02", answer, student)
    assert points_by_check(report) == LEFT_02[omitted], report.text()
    for seen in SEEN_02[omitted]:
        assert seen in messages(report)


@given(st.integers(0, (1 << 32) - 1))
def test_time_of_02_wraps_while_the_guest_waits_and_not_before(seed: int) -> None:
    made = lesson("02", seed)
    factor, offset = made.parameters["factor"], made.parameters["offset"]
    # The wait takes five instructions 4500 times; the guests of the self-checks have read the clock long before 100.
    assert 100 * factor + offset < 1 << 64 <= 5 * 4500 * factor + offset


@pytest.mark.parametrize("omitted", ["ring", "wrap"])
def test_self_checks_of_02_do_not_give_all_away(omitted: str) -> None:
    assert self_checks("02", OMISSIONS[omitted][0], "ada") == [True] * 4


OURS = "from xenlab.hypervisor.emulate import PrivilegedInstructions as MyEmulator"
OURS_AS_BASE = (
    "from xenlab.hypervisor.emulate import PrivilegedInstructions\nclass MyEmulator(PrivilegedInstructions): pass"
)
REFUSE_ALL = "class MyEmulator:\n    def emulate(self, code, registers, system):\n        return None"


@pytest.mark.parametrize("answer", [OURS, OURS_AS_BASE, REFUSE_ALL])
@pytest.mark.parametrize("student", ["", *more("ada")])
def test_the_shipped_emulator_and_refusing_earn_nothing(judged: Grade, answer: str, student: str) -> None:
    assert judged("02", answer, student).score == 0


def test_half_right_03_checks_no_arguments(judged: Grade, solution: Callable[[str], str]) -> None:
    careless = (
        solution("03").replace('if length > RULES["limit"]:', "if False:").replace("if data is None:", "if False:")
    )
    report = judged("03", careless)
    assert points_by_check(report)["03.1"] == 4
    assert points_by_check(report)["03.3"] < 3
    assert points_by_check(report)["03.2"] < 3
    assert "first wrong step: instruction" in messages(report)
    assert "longer than the limit; expected the answer -" in messages(report)


def test_refusing_every_call_earns_nothing(judged: Grade) -> None:
    answer = "class MyHypercall:\n    def call(self, arguments, read):\n        return -14, {}"
    assert judged("03", answer).score == 0


def test_report_has_the_promised_json(judged: Grade) -> None:
    report = judged("03", student="ada").to_json()
    assert list(report) == ["submission", "lesson", "seed", "score", "max_score", "checks", "error"]
    assert json.loads(json.dumps(report)) == report
    assert [list(check) for check in report["checks"]] == [["id", "points", "max_points", "message"]] * 3
    assert report["lesson"] == "03"
    assert report["seed"] == 4260250381


def test_report_without_a_student_says_so_in_its_text_only(judged: Grade, tmp_path: Path) -> None:
    nobody, ada = judged("00"), judged("00", student="ada")
    assert "no student id: judged against the instance of seed 0" in nobody.text()
    assert "no student id" not in ada.text()
    assert "no student id" not in json.dumps(nobody.to_json())
    assert (nobody.error, nobody.seed) == (None, 0)
    (unread,) = grade([tmp_path / "00-gone.ipynb"])
    assert "no student id" not in unread.text()


def test_two_workers_give_the_same_reports_in_order(repository: Path) -> None:
    paths = sorted((repository / "solutions").glob("*.ipynb"))[:3]
    assert grade(paths, workers=2) == grade(paths)
