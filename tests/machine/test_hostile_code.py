"""No guest code ends the Python process, and both CPUs report the same about it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run(kind: str, cpu: str) -> list[str]:
    """Lines that the child printed; it is a process of its own, since an abort could not be caught."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "PYTHONHASHSEED": "0"}
    command = [sys.executable, str(HERE / "dangerous_guests.py"), kind, cpu]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert child.returncode == 0, f"after {child.stdout.splitlines()[-1:]}: {child.stderr[-2000:]}"
    lines = child.stdout.splitlines()
    assert lines[-1] == "end"
    return lines


def test_single_instructions_give_the_same_traps_on_both_cpus() -> None:
    probed = run("cases", "probed")
    assert len(probed) > 200
    assert run("cases", "portable") == probed


def test_known_instructions_give_the_traps_of_the_manual() -> None:
    lines = run("cases", "probed")
    traps = dict(line.split(": [", 1) for line in lines if line.startswith("two-level 3"))
    expected = {"ud2": 6, "hlt": 13, "mov ss, null": 13, "divide": 0, "bound": 5, "int1": 1, "single step": 1, "in": 13}
    found = {name: int(traps[f"two-level 3 {name}"].split(",")[0].strip("(")) for name in expected}
    assert found == expected


def test_task_segments_and_gates_do_not_end_the_process() -> None:
    assert len(run("system", "probed")) == 17


@pytest.mark.slow
def test_random_bytes_neither_escape_nor_abort() -> None:
    assert len(run("fuzz", "probed")) == 49


def test_random_bytes_give_the_same_run_on_both_cpus() -> None:
    assert run("short_fuzz", "portable") == run("short_fuzz", "probed")
