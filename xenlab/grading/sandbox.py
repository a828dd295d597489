"""Starting the student's process, feeding it, and ending it.

The problem: a submission may loop, exit, print a gigabyte, start other processes or never
answer.  So it gets a process group of its own, an empty folder, an environment without our
variables, limits, and one chance to answer.

The invariant: `ask` comes back within the wall time and a second or two, with a reply or with
a reason why there is none, whatever the process does.

What is not promised yet: that it cannot read files or the network.  Reports say so.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_ROOT = Path(__file__).resolve().parents[2]
# By file and not with -m: in a clone that was not installed, -I would not find the package.
_START = "import sys; sys.path.insert(0, {root!r}); from xenlab.grading.student_process import main; main()"
_KEPT = ("PATH", "SYSTEMROOT", "TEMP", "TMP", "LANG")
_GRACE_SECONDS = 2.0
_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class Limits:
    """What a submission may use.

    Attributes:
        wall_seconds, cpu_seconds: time; CPU time only where the system can limit it.
        memory_mib: address space.  The emulator of one machine reserves more than 1 GiB of it.
        file_mib: the largest file that it may write.
        reply_bytes: the longest reply that is read.
    """

    wall_seconds: float = 60.0
    cpu_seconds: int = 40
    memory_mib: int = 8192
    file_mib: int = 16
    reply_bytes: int = 4 << 20


class NoReply(Exception):
    """The student's process gave no usable reply; the text says why."""


def ask(request: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """Run a request in a new process.

    Raises:
        NoReply: it was stopped by a limit, ended by itself, or answered nonsense.
    """
    own = {"cpu_seconds": limits.cpu_seconds, "memory_mib": limits.memory_mib, "file_mib": limits.file_mib}
    data = json.dumps({**request, "limits": own}).encode()
    with tempfile.TemporaryDirectory(prefix="xenlab-", ignore_cleanup_errors=True) as folder:
        reply, status = _exchange(data, folder, limits)
    return _parsed(reply, status)


def _parsed(reply: bytes, status: int) -> dict[str, Any]:
    if not reply:
        raise NoReply(f"the notebook ended its process ({_in_words(status)}) before its answers could be read")
    try:
        parsed = json.loads(reply)
    except (ValueError, RecursionError):
        raise NoReply("the notebook's process answered something that is not JSON") from None
    if not isinstance(parsed, dict):
        raise NoReply("the notebook's process answered JSON that is not an object")
    return parsed


def _exchange(data: bytes, folder: str, limits: Limits) -> tuple[bytes, int]:
    process = _start(folder)
    received = bytearray()
    too_long = threading.Event()
    feeder = threading.Thread(target=_feed, args=(process.stdin, data), daemon=True)
    reader = threading.Thread(target=_collect, args=(process, received, limits.reply_bytes, too_long), daemon=True)
    # In a thread, since a wait with a timeout looks for the end every 50 ms only.
    waiter = threading.Thread(target=process.wait, daemon=True)
    for thread in (feeder, reader, waiter):
        thread.start()
    try:
        waiter.join(limits.wall_seconds)
        status = process.returncode
        if status is None:
            raise NoReply(f"the notebook was stopped: it ran longer than {limits.wall_seconds:g} s")
    finally:
        _end(process)
        # A grandchild that left the group may hold the pipe open; its words are not waited for.
        reader.join(_GRACE_SECONDS)
        feeder.join(_GRACE_SECONDS)
        _close(process)
    if too_long.is_set():
        raise NoReply(f"the notebook was stopped: its answer is longer than {limits.reply_bytes} bytes")
    return bytes(received), status


def _start(folder: str) -> subprocess.Popen[bytes]:
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
    group: dict[str, Any] = {"start_new_session": True}
    if sys.platform == "win32":
        group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
    return subprocess.Popen(
        [sys.executable, "-I", "-c", _START.format(root=str(_ROOT))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env=environment,
        **group,
    )


def _feed(pipe: IO[bytes], data: bytes) -> None:
    with contextlib.suppress(OSError):
        pipe.write(data)
        pipe.close()


def _collect(process: subprocess.Popen[bytes], received: bytearray, limit: int, too_long: threading.Event) -> None:
    assert process.stdout is not None
    with contextlib.suppress(OSError, ValueError):
        while chunk := os.read(process.stdout.fileno(), _CHUNK):
            received += chunk
            if len(received) > limit:
                too_long.set()
                process.kill()
                return


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and all that it started."""
    if sys.platform == "win32":
        process.kill()
    else:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _close(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was never sent does not matter any more
                pipe.close()


def _in_words(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else str(-status)
    return "it used up its CPU time" if name == "SIGXCPU" else f"signal {name}"
