"""Whatever a notebook holds, there is a report, in time, with the points that its honest part deserves."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from xenlab.grading.judge import grade
from xenlab.grading.report import Report
from xenlab.grading.sandbox import Limits

Grade = Callable[..., Report]
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="the system cannot limit CPU time and memory")
BRIEF = Limits(wall_seconds=2, cpu_seconds=30)
WRITE_EVERYWHERE = """
import os
for descriptor in range(3, 64):
    try:
        os.write(descriptor, {reply})
    except OSError:
        pass
os._exit(0)
"""
FORGED = {"answer": {"source": "nop"}, "score": 10, "checks": [{"id": "02.1", "points": 3}], "notes": [], "error": None}


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("while True: pass", "longer than 2 s"),
        ("import os; os._exit(0)", "exit status 0"),
        pytest.param("import os; os.abort()", "signal SIGABRT", marks=POSIX),
        ("import time; time.sleep(60)", "longer than 2 s"),
        pytest.param("import os, time\nif os.fork(): os._exit(7)\ntime.sleep(60)", "exit status 7", marks=POSIX),
    ],
)
def test_cell_that_loops_or_ends_the_process(judged: Grade, code: str, reason: str) -> None:
    report = judged("00", code, limits=BRIEF)
    assert report.score == 0
    assert report.error is not None
    assert reason in report.error
    assert all(reason in check.message for check in report.checks)


@POSIX
def test_cpu_time_is_limited(judged: Grade) -> None:
    report = judged("00", "while True: pass", limits=Limits(wall_seconds=30, cpu_seconds=1))
    assert report.error is not None
    assert "CPU time" in report.error


@pytest.mark.parametrize(
    "code", ["1/0", "import sys; sys.exit(3)", "raise KeyboardInterrupt", "def broken(:", "%matplotlib inline"]
)
def test_cell_that_raises_does_not_stop_the_next(submit: Callable[..., Path], code: str) -> None:
    path = submit("00")
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["cells"].insert(0, {"cell_type": "code", "metadata": {}, "source": code, "outputs": []})
    path.write_text(json.dumps(notebook), encoding="utf-8")
    (report,) = grade([path])
    assert (report.score, report.error) == (10, None)
    assert bool(report.notes) == (not code.startswith("%"))


@pytest.mark.parametrize(
    "code",
    [
        'print("x" * 1_000_000_000)',
        'for _ in range(1000): print("x" * 1_000_000)',
        'import os; [os.write(1, b"x" * 1_000_000) for _ in range(1000)]',
    ],
)
def test_gigabyte_of_output_costs_nothing(judged: Grade, solution: Callable[[str], str], code: str) -> None:
    report = judged("00", f"{solution('00')}\n{code}")
    assert (report.score, report.error) == (10, None)


@POSIX
def test_memory_is_limited(judged: Grade, solution: Callable[[str], str]) -> None:
    report = judged("00", f"{solution('00')}\nhoard = bytearray(20 << 30)")
    assert report.score == 10
    assert "MemoryError" in report.text()


def test_answer_of_many_megabytes_is_not_read(judged: Grade) -> None:
    report = judged("00", 'source = "nop\\n" * 10_000_000')
    assert report.error is not None
    assert "longer than" in report.error


@pytest.mark.parametrize("number", ["00", "02", "08"])
def test_forged_reply_is_only_a_wrong_answer(judged: Grade, number: str) -> None:
    report = judged(number, WRITE_EVERYWHERE.format(reply=json.dumps(FORGED).encode()))
    assert report.score == 0
    assert report.max_score == 10


@pytest.mark.parametrize(
    "reply", ["b'[]'", "b'{'", "b'[' * 100_000", "b'\\xff'", "b'{\"answer\": 3}'", 'b\'{"answer": {"clock": 7}}\'']
)
def test_nonsense_as_a_reply(judged: Grade, reply: str) -> None:
    report = judged("02", WRITE_EVERYWHERE.format(reply=reply))
    assert (report.score, report.max_score) == (0, 10)
    assert report.error or all("broken" in check.message or "define" in check.message for check in report.checks)


PATCH_JUDGE = """
import xenlab.grading.lessons.lesson_02 as lesson
lesson.Emulation.judge = lambda *_: lesson.Finding("02.1", True)
"""
PATCH_ENCODER = """
import xenlab.grading.decisions as decisions
decisions._encode_changes = lambda value: {"refuse": True, "score": 10}
"""
PATCH_JSON = """
import json
json.dumps = lambda value, **_: '{"answer": {}, "score": 10}'
"""
ALWAYS_EQUAL = """
class Same(int):
    def __eq__(self, other): return True
    __hash__ = None
"""
LAZY = """
class MyEmulator:
    def emulate(self, code, registers, system):
        return {"eax": globals().get("Same", int)(0)}
"""


@pytest.mark.parametrize("patch", [PATCH_JUDGE, PATCH_ENCODER, PATCH_JSON, ALWAYS_EQUAL])
def test_tampering_with_the_own_process_earns_nothing(judged: Grade, patch: str) -> None:
    assert judged("02", patch + LAZY).score == 0


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("'eax'", "must return a dict"),
        ("{'eax': '7'}", "whole numbers"),
        ("{'eaxx': 7}", "the changes name 'eaxx'"),
        ("{'eax': 1 << 40}", "32 bits"),
        ("registers['nothing']", "KeyError"),
        ("exit()", "SystemExit"),
    ],
)
def test_malformed_decision_is_named(judged: Grade, returned: str, message: str) -> None:
    answer = f"class MyEmulator:\n    def emulate(self, code, registers, system):\n        return {returned}"
    report = judged("02", answer)
    assert report.score == 0
    assert message in report.checks[0].message
    assert "first wrong step: instruction" in report.checks[0].message


def test_part_that_loops_in_a_guest(judged: Grade) -> None:
    answer = "class MyHypercall:\n    def call(self, arguments, read):\n        while True: pass"
    report = judged("03", answer, limits=BRIEF)
    assert report.error is not None
    assert "longer than" in report.error


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("02-x.ipynb", b"", "in JSON"),
        ("02-x.ipynb", b"\xff\xfe", "in JSON"),
        ("02-x.ipynb", b"[" * 100_000, "in JSON"),
        ("02-x.ipynb", b"[]", "list of cells"),
        ("02-x.ipynb", b'{"nbformat": 4}', "list of cells"),
        ("x.ipynb", b'{"cells": []}', "which exercise"),
        ("77-x.ipynb", b'{"cells": []}', "exercise '77'"),
        ("02-x.ipynb", b" " * (5 << 20), "clear its outputs"),
    ],
)
def test_file_that_is_no_submission(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    (report,) = grade([path])
    assert report.score == 0
    assert report.error is not None
    assert reason in report.error


def test_notebook_without_cells_and_odd_ones(tmp_path: Path) -> None:
    path = tmp_path / "03-x.ipynb"
    path.write_text(
        json.dumps({"cells": [7, None, {"cell_type": "code"}, {"cell_type": "code", "source": 5}], "metadata": 3})
    )
    (report,) = grade(
        [
            path,
        ]
    )
    assert (report.score, report.max_score, report.error) == (0, 10, None)
    assert "does not define MyHypercall" in report.checks[0].message


def test_missing_file(tmp_path: Path) -> None:
    (report,) = grade([tmp_path / "00-gone.ipynb"])
    assert report.error is not None
    assert "cannot be read" in report.error
