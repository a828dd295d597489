"""Round robin: each runnable vCPU in turn, for a slice of fixed length.

The invariant: between two turns of a vCPU every other runnable one had exactly one.
"""

from __future__ import annotations

from collections import deque

DEFAULT_SLICE = 100_000


class RoundRobin:
    """The plainest fair scheduler.

    Args:
        slice_instructions: length of a turn, in instructions.
    """

    def __init__(self, slice_instructions: int = DEFAULT_SLICE) -> None:
        self._slice = slice_instructions
        self._queue: deque[int] = deque()

    def wake(self, vcpu: int, _now: int) -> None:
        self._queue.append(vcpu)

    def sleep(self, vcpu: int, _now: int) -> None:
        self._queue.remove(vcpu)

    def pick(self, _now: int) -> tuple[int, int] | None:
        if not self._queue:
            return None
        vcpu = self._queue[0]
        self._queue.rotate(-1)
        return vcpu, self._slice

    def state(self) -> list[int]:
        return list(self._queue)

    def load(self, state: list[int]) -> None:
        self._queue = deque(state)
