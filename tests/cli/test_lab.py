"""``xenlab lab``: ports, browsers, and every lesson executed."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import Result

from xenlab.cli import lab
from xenlab.cli.lab_check import Outcome, check_lessons
from xenlab.errors import XenlabError

Run = Callable[..., Result]
Write = Callable[..., Path]

WITHOUT_BROWSER = """
import pathlib, sys, webbrowser
from xenlab.cli import main, places

def get(*_):
    raise webbrowser.Error("could not locate runnable browser")

webbrowser.get = get
home = pathlib.Path(sys.argv.pop())
places.clone = lambda: home
main()
"""


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port on which somebody else listens."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def test_taken_port_that_was_asked_for_is_2(xenlab: Run, write_lesson: Write, taken_port: int) -> None:
    write_lesson("00-first", "1")
    result = xenlab("lab", "--port", taken_port)
    assert result.exit_code == 2
    assert f"port {taken_port} is taken" in result.stderr
    advised = re.search(r"write: xenlab lab --port (\d+)", result.stderr)
    assert advised is not None
    assert lab.is_free(int(advised[1]))


def test_taken_usual_port_is_replaced_and_said(monkeypatch: pytest.MonkeyPatch, taken_port: int) -> None:
    monkeypatch.setattr(lab, "DEFAULT_PORT", taken_port)
    notes: list[str] = []
    port = lab.choose_port(None, notes.append)
    assert port != taken_port
    assert lab.is_free(port)
    assert notes == [f"Port {taken_port} is taken; using port {port} instead."]


def test_free_port_is_used_without_a_word() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    notes: list[str] = []
    assert lab.choose_port(port, notes.append) == port
    assert not notes


def test_no_port_left_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "is_free", lambda port: False)
    with pytest.raises(XenlabError, match="all taken"):
        lab.choose_port(None, print)
    with pytest.raises(XenlabError, match="leave --port out"):
        lab.choose_port(8888, print)


def test_browser_is_seen_and_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise webbrowser.Error("could not locate runnable browser")

    monkeypatch.setattr(webbrowser, "get", none)
    assert not lab.has_browser()
    monkeypatch.setattr(webbrowser, "get", lambda: object())
    assert lab.has_browser()


def test_token_is_not_among_the_arguments(tmp_path: Path) -> None:
    server = lab.Server(tmp_path, Path("notebooks/00-first.ipynb"), 8888, "secret", browser=False)
    assert "secret" in server.url
    assert not any("secret" in argument for argument in server.command())


def test_missing_lessons_are_2(xenlab: Run, clone: Path) -> None:
    result = xenlab("lab")
    assert result.exit_code == 2
    assert "no lessons" in result.stderr
    (clone / "notebooks").rmdir()
    result = xenlab("lab", "--check")
    assert result.exit_code == 2
    assert "pip install -e ." in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_without_a_browser_the_address_is_printed_and_works(clone: Path, write_lesson: Write, repository: Path) -> None:
    write_lesson("00-first", "1")
    with subprocess.Popen(
        [sys.executable, "-c", WITHOUT_BROWSER, "lab", str(clone)],
        env={**os.environ, "PYTHONPATH": str(repository)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        alarm = threading.Timer(120, process.kill)
        alarm.daemon = True
        alarm.start()
        lines: list[str] = []
        while "Ctrl-C" not in "".join(lines[-1:]):
            lines.append(process.stdout.readline())
            assert lines[-1], lines
        text = "".join(lines)
        assert "No browser was found" in text
        address = re.search(r"http://\S+", text)
        assert address is not None
        assert "/lab/tree/notebooks/00-first.ipynb?token=" in address[0]
        with urllib.request.urlopen(address[0]) as page:
            assert page.status == 200
            assert b"JupyterLab" in page.read()
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 0
        alarm.cancel()


@pytest.mark.slow
def test_check_prints_a_line_each_and_changes_nothing(xenlab: Run, write_lesson: Write) -> None:
    lessons = [
        write_lesson("00-good", "from pathlib import Path", "print(6 * 7)", "assert Path('00-good.ipynb').exists()"),
        write_lesson("01-bad", "x = 1", "", "# look\nx / 0", "print('never')"),
        write_lesson("02-dies", "import os; os._exit(1)"),
    ]
    broken = lessons[0].with_name("03-broken.ipynb")
    broken.write_text("{", encoding="utf-8")
    before = [lesson.read_bytes() for lesson in lessons]
    result = xenlab("lab", "--check")
    assert result.exit_code == 1
    lines = [line for line in result.stdout.splitlines() if not line.startswith(" ")]
    assert re.fullmatch(r"00-good    ok      \d+\.\d s", lines[0])
    assert re.fullmatch(r"01-bad     FAILED  \d+\.\d s", lines[1])
    assert re.fullmatch(r"02-dies    FAILED  \d+\.\d s", lines[2])
    assert lines[3].startswith("03-broken  FAILED")
    assert "cell [2], which begins `# look`: ZeroDivisionError: division by zero" in result.stdout
    assert "cell [1], which begins `import os; os._exit(1)`: the kernel died" in result.stdout
    assert "the file is no notebook" in result.stdout
    assert [lesson.read_bytes() for lesson in lessons] == before


@pytest.mark.slow
def test_check_of_good_lessons_is_0(xenlab: Run, write_lesson: Write) -> None:
    write_lesson("00-good", "1")
    assert xenlab("lab", "--check").exit_code == 0


@pytest.mark.slow
def test_check_stops_a_cell_that_does_not_end(write_lesson: Write) -> None:
    (outcome,) = check_lessons([write_lesson("00-loop", "while True: pass")], cell_seconds=1)
    assert "cell [1], which begins `while True: pass`: still running after 1 s" in outcome.problem


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="asks for a process by its number")
def test_check_can_be_given_up(write_lesson: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving early, as Ctrl-C does, ends the kernel of a lesson that would run for ever."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    pid = tmp_path / "pid"
    wait = f"import pathlib, time\nwhile not pathlib.Path({str(pid)!r}).exists(): time.sleep(0.05)"
    tell = f"import os; open('tmp', 'w').write(str(os.getpid())); os.rename('tmp', {str(pid)!r})"
    threads = threading.active_count()
    outcomes = check_lessons([write_lesson("00-waits", wait), write_lesson("01-loop", tell, "while True: pass")])
    assert next(outcomes).line(8).startswith("00-waits  ok")
    outcomes.close()
    assert threading.active_count() == threads
    with pytest.raises(OSError, match="No such process"):
        os.kill(int(pid.read_text(encoding="utf-8")), 0)


def test_failure_is_shown_below_its_line() -> None:
    assert Outcome("00-a", 1.25).line(6) == "00-a    ok      1.2 s"
    assert Outcome("00-a", 1.25, "cell\nadvice").line(4) == "00-a  FAILED  1.2 s\n    cell\n    advice"
