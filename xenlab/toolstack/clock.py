"""The time of day, the control domain's side (paper 2.3, 3.3.2).

The problem: the machine was started with some idea of what time it was, and the control domain learns better.

The invariant: only the offset to real time changes.  Real time itself, and every alarm that was set by it, goes on as
if nothing had happened.  What breaks without it: whoever sleeps for a second sleeps for an hour when clocks go back.
"""

from __future__ import annotations

from dataclasses import dataclass

from xenlab.errors import XenlabError
from xenlab.hypervisor.clocks import to_ns
from xenlab.hypervisor.core import Hypervisor

_SECOND_NS = 1_000_000_000
_MOST_SECONDS = 1 << 62


@dataclass(frozen=True, slots=True)
class SetWallClock:
    """The tools say what time it is when this is applied: seconds since 1970, and nanoseconds.

    Raises:
        XenlabError: no whole numbers, or out of range.
    """

    seconds: int
    nanoseconds: int = 0

    def __post_init__(self) -> None:
        for name, value, end in (
            ("seconds", self.seconds, _MOST_SECONDS),
            ("nanoseconds", self.nanoseconds, _SECOND_NS),
        ):
            if type(value) is not int or not 0 <= value < end:
                raise XenlabError(
                    f"{name} of the wall clock: expected a whole number from 0 to {end - 1}, found {value!r}"
                )

    def apply(self, hypervisor: Hypervisor) -> None:
        """Do it."""
        hypervisor.clocks.set_wall_clock(self.seconds, self.nanoseconds, to_ns(hypervisor.now))
