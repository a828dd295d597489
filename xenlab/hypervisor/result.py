"""What `Hypervisor.run` answers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto


class Stop(Enum):
    """Why a run returned."""

    BUDGET = auto()
    IDLE = auto()


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run did.

    Attributes:
        instructions: how many were begun.
        stop: BUDGET when all were used, IDLE when no vCPU could run any more.
    """

    instructions: int
    stop: Stop
