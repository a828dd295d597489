from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from xenlab.errors import AssemblyError, XenlabError
from xenlab.machine import assembler_process
from xenlab.machine.assembler import assemble
from xenlab.machine.assembler_process import Rejected, emit_object, executable

Stand = Callable[[str], None]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Stand:
    """Puts a Python script in LLVM's place; it could not start without opening files."""

    def install(script: str) -> None:
        monkeypatch.setattr(assembler_process, "executable", lambda: Path(sys.executable))
        monkeypatch.setattr(assembler_process, "ARGUMENTS", ("-c", script))
        monkeypatch.setattr(assembler_process, "_confine", lambda pid: None)

    return install


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that the test has started."""
    found: list[subprocess.Popen[bytes]] = []
    answer = assembler_process._answer

    def note(process: subprocess.Popen[bytes], text: bytes, timeout: float) -> bytes:
        found.append(process)
        return answer(process, text, timeout)

    monkeypatch.setattr(assembler_process, "_answer", note)
    return found


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    executable.cache_clear()
    monkeypatch.setattr(assembler_process, "find_spec", lambda name: None)
    with pytest.raises(XenlabError, match="pip install ziglang"):
        executable()


def test_program_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(assembler_process, "executable", lambda: tmp_path / "zig")
    with pytest.raises(XenlabError, match="could not be started"):
        emit_object(b"nop\n")


def test_endless_work_is_stopped(stand_in: Stand, started: list[subprocess.Popen[bytes]]) -> None:
    stand_in("import time; time.sleep(60)")
    with pytest.raises(XenlabError, match=r"within 0\.5 s"):
        emit_object(b"nop\n", timeout=0.5)
    assert started[0].returncode


def test_death_without_a_word_is_a_clear_error(stand_in: Stand) -> None:
    stand_in("raise SystemExit(7)")
    with pytest.raises(XenlabError, match="ended without naming an error: exit status 7"):
        assemble("nop ; of a source that no other test has cached")


@pytest.mark.parametrize("first", [b"\x7fELF", b"words"])
def test_endless_answer_is_cut(stand_in: Stand, monkeypatch: pytest.MonkeyPatch, first: bytes) -> None:
    monkeypatch.setattr(assembler_process, "OBJECT_LIMIT", 2 << 20)
    script = f"import sys; w = sys.stdout.buffer.write; sys.stdin.read(); w({first!r})\nwhile True: w(bytes(1 << 16))"
    stand_in(script)
    with pytest.raises(Rejected, match="out of memory" if first == b"\x7fELF" else "words"):
        emit_object(b"nop\n")


def test_interrupt_leaves_no_process(monkeypatch: pytest.MonkeyPatch, started: list[subprocess.Popen[bytes]]) -> None:
    def interrupted(*_: object) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(assembler_process, "_exchange", interrupted)
        with pytest.raises(KeyboardInterrupt):
            emit_object(b"nop\n")
    assert started[0].returncode is not None
    assert emit_object(b"nop\n").startswith(b"\x7fELF")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets us limit a process that runs")
@pytest.mark.parametrize("directive", ["incbin", "include"])
def test_llvm_itself_can_open_no_file(directive: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("nop\n")
    with pytest.raises(Rejected, match=r"(?i)could not find"):
        emit_object(f'.{directive} "{secret}"\n'.encode())


def test_repeated_error_is_reported_once() -> None:
    with pytest.raises(AssemblyError) as caught:
        assemble(".rept 300000\nbogus\n.endr")
    assert caught.value.line == 2


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
@pytest.mark.parametrize(("spare", "expected"), [(9, "90"), (1, "could not be started")])
def test_few_file_descriptors(spare: int, expected: str) -> None:
    script = (
        "import resource, sys, threading, elftools.elf.elffile\n"
        "from xenlab.machine import assembler_process\n"
        "from xenlab.machine.assembler import assemble\n"
        "assembler_process.executable()\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (3 + {spare}, 3 + {spare}))\n"
        "try:\n    print(assemble('nop').code.hex())\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert expected in found.stdout


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "USERPROFILE", "LOCALAPPDATA", "XDG_CACHE_HOME", "TMPDIR", "TEMP"):
        monkeypatch.setenv(name, str(tmp_path))
    emit_object(b"nop\n")
    assert list(tmp_path.iterdir()) == []


def test_threads_get_their_own_answers() -> None:
    results: dict[int, str] = {}

    def work(number: int) -> None:
        results[number] = assemble(f"mov eax, {number} ; thread").code.hex()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: f"b8{n:02x}000000" for n in range(8)}


def test_importing_the_assembler_loads_neither_capstone_nor_elftools() -> None:
    script = (
        "import sys, xenlab.machine.assembler, xenlab.machine.disassembler\n"
        "raise SystemExit(any(m.startswith(('ziglang', 'capstone', 'elftools')) for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
