"""Standard input, read beside the guest's run.

The problem: reading blocks, and a guest must run on while nobody types; a pipe, a terminal
and a console window of Windows have no common way to ask whether something is there.

The invariant: a daemon thread does nothing but read into a short queue; everything else
happens in the main thread.  The thread reads the descriptor itself: one that waits inside
Python's buffered reader would keep the interpreter from ending.
"""

from __future__ import annotations

import os
import queue
import sys
import threading

_CHUNK = 4096
_CHUNKS_AHEAD = 16
_POLL_SECONDS = 0.1


class Keyboard:
    """Bytes that come in on a descriptor.

    Args:
        descriptor: what to read; None for a closed one.
    """

    def __init__(self, descriptor: int | None) -> None:
        # Bounded, so that an endless pipe waits for the guest and does not fill memory.
        self._chunks: queue.Queue[bytes] = queue.Queue(_CHUNKS_AHEAD)
        self._ended = descriptor is None
        if descriptor is not None:
            threading.Thread(target=self._read, args=(descriptor,), daemon=True).start()

    def _read(self, descriptor: int) -> None:
        chunk = b"?"
        while chunk:
            try:
                chunk = os.read(descriptor, _CHUNK)
            except OSError:
                chunk = b""
            self._chunks.put(chunk)

    def typed(self) -> bytes:
        """All that has come since the last call; empty when nothing has."""
        data = b""
        while not self._ended and not self._chunks.empty():
            data += self._take(self._chunks.get())
        return data

    def wait(self) -> bytes:
        """What comes next, waiting for it; empty at the end of the input."""
        while not self._ended:
            try:
                # In short waits: on Windows a long one cannot be interrupted by Ctrl-C.
                return self._take(self._chunks.get(timeout=_POLL_SECONDS))
            except queue.Empty:
                continue
        return b""

    def _take(self, chunk: bytes) -> bytes:
        self._ended = self._ended or not chunk
        return chunk


def standard_input() -> Keyboard:
    """The keyboard that is this process's standard input; a closed one where there is none."""
    try:
        return Keyboard(sys.stdin.fileno())
    except (AttributeError, OSError, ValueError):
        return Keyboard(None)
