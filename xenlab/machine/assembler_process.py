"""The parent's side of the helper process that holds LLVM.

Problem: LLVM's assembler ends its process at the first error, may eat memory, and is slow to load.  So one helper
lives between calls, is thrown away whenever anything but a complete reply came back, and the next call starts another.
Invariant: a helper is only kept if it has answered every request that it was sent; otherwise an answer could be taken
for that of another source.  Without it, an interrupted cell would shift every later answer by one.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Any

from xenlab.errors import XenlabError

WORKER = Path(__file__).with_name("_assembler_worker.py")
TIMEOUT_SECONDS = 20.0
NO_PARSER = "we don't have an asm parser for this target"


class AssemblerDied(Exception):
    """The helper ended instead of answering; ``diagnostics`` is what it had written to standard error."""

    def __init__(self, diagnostics: str) -> None:
        self.diagnostics = diagnostics
        super().__init__(diagnostics)


def _detached() -> dict[str, Any]:
    """Popen's options that keep Ctrl-C away from the helper, and a console window off the screen."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"process_group": 0}


class AssemblerProcess:
    """One lazily started helper; safe with threads, and a forked child gets its own.

    Args:
        script: the Python file that the helper runs.
        timeout: seconds after which an unanswered request is given up.
    """

    def __init__(self, script: Path = WORKER, timeout: float = TIMEOUT_SECONDS) -> None:
        self._script, self._timeout = script, timeout
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._diagnostics: IO[bytes] | None = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)
        atexit.register(self.stop)

    @property
    def pid(self) -> int | None:
        """The helper's process id, or None while there is none."""
        return self._process.pid if self._process else None

    def emit_object(self, text: bytes) -> bytes:
        """The ELF object that LLVM makes of ``text``.

        Raises:
            AssemblerDied: LLVM rejected the text, or ended for another reason.
            XenlabError: no answer in time, or this platform's LLVM cannot assemble x86.
        """
        with self._lock:
            process = self._running()
            try:
                return self._exchange(process, text)
            except BaseException:
                self.stop()  # also on an interrupt: an answer that nobody took must not reach the next caller
                raise

    def stop(self) -> None:
        """End the helper; the next request starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            _close(process)
        if self._diagnostics is not None:
            self._diagnostics.close()
            self._diagnostics = None

    def _forget(self) -> None:
        """In a forked child: the helper and the lock's holder belong to the parent."""
        self._lock = threading.Lock()
        if self._process is not None:
            _close(self._process)
            self._process.returncode = 0  # not our child: nothing to wait for
        self._process = self._diagnostics = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.stop()
            self._process = self._start()
        return self._process

    def _start(self) -> subprocess.Popen[bytes]:
        # A file and not a pipe: nobody reads it while the helper works, and a full pipe would block it.
        self._diagnostics = tempfile.TemporaryFile()  # noqa: SIM115 lives as long as the helper
        return subprocess.Popen(
            # -P: the files beside the script must not shadow the standard library.
            [sys.executable, "-P", str(self._script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._diagnostics,
            **_detached(),
        )

    def _exchange(self, process: subprocess.Popen[bytes], text: bytes) -> bytes:
        expired = threading.Event()

        def give_up() -> None:
            expired.set()
            process.kill()

        timer = threading.Timer(self._timeout, give_up)
        timer.daemon = True
        timer.start()
        try:
            reply = _ask(process, text)
        finally:
            timer.cancel()
        if reply is None:
            raise self._failure(process, expired.is_set())
        return reply

    def _failure(self, process: subprocess.Popen[bytes], expired: bool) -> Exception:
        if expired:
            return XenlabError(f"the assembler gave no answer within {self._timeout:g} s and was stopped")
        process.wait()
        diagnostics = self._written()
        if NO_PARSER in diagnostics:
            return XenlabError("the installed llvmlite has no x86 assembly parser: its builds hold the host CPU's only")
        return AssemblerDied(diagnostics or f"exit status {process.returncode}")

    def _written(self) -> str:
        assert self._diagnostics is not None
        self._diagnostics.seek(0)
        return self._diagnostics.read().decode("utf-8", "replace")


def _ask(process: subprocess.Popen[bytes], text: bytes) -> bytes | None:
    """Send one request; None if the helper ended before its reply was complete."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(b"%d\n" % len(text) + text)
        process.stdin.flush()
    except OSError:
        return None
    size = process.stdout.readline().strip()
    reply = process.stdout.read(int(size)) if size.isdigit() else b""
    return reply if size.isdigit() and len(reply) == int(size) else None


def _close(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:  # a request was still in the buffer
                continue
