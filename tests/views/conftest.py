"""Hypervisors and timelines with the guests of `view_guests` on them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from xenlab import Hypervisor, Machine, boot
from xenlab.hypervisor.trace import Trace
from xenlab.timeline import Timeline

# Test modules are imported by path, so helpers beside them have to be made findable.
sys.path.insert(0, str(Path(__file__).parent))
from view_guests import ROUND_TRIPS


@pytest.fixture
def run() -> Callable[..., Hypervisor]:
    """``run(source, ..., budget=...)``: a hypervisor on which these guests have run."""

    def build(*sources: str, budget: int = 2_000, name: str = "guest", memory_mib: int = 8) -> Hypervisor:
        xen = Hypervisor(Machine(memory_mib), trace=Trace())
        for source in sources:
            boot(xen, source, name=name)
        xen.run(budget)
        return xen

    return build


@pytest.fixture
def timeline() -> Timeline:
    """The round trips, ready to be run."""
    xen = Hypervisor(Machine(memory_mib=8), trace=Trace())
    boot(xen, ROUND_TRIPS, name="round trips")
    return Timeline(xen)
