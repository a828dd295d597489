"""Sliders of a live view: something of the machine that the reader may set while it runs (lesson 10; paper 2.3).

The problem: a slider is a hand from outside.  If it changed the machine behind the timeline's back, a step back would
lead into a past that never was.

The invariant: moving one submits an input at the present moment, and what it shows is read from the machine.  So in the
past it begins another future, and while the run is scrubbed the sliders move by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from xenlab.errors import XenlabError
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.inputs import Input
from xenlab.hypervisor.schedulers import Bvt, Diary
from xenlab.toolstack.schedule import SetSchedule, SetScheduler
from xenlab.views.canvas import printable


class Submits(Protocol):
    """What is needed of a timeline."""

    def submit(self, item: Input) -> None: ...


@dataclass(frozen=True, slots=True)
class Slider:
    """One slider, for whole numbers.

    Attributes:
        label: what it sets.
        low, high, step: its range.
        read: what is set now; None if nothing is, for a domain that has gone.
        item: the input that sets a value.
    """

    label: str
    low: int
    high: int
    step: int
    read: Callable[[], int | None]
    item: Callable[[int], Input]

    def move(self, timeline: Submits, value: int) -> int:
        """Set a value, as near to ``value`` as the slider reaches, at the present moment; which one that is.

        Raises:
            XenlabError: there is nothing to set.
        """
        if self.read() is None:
            raise XenlabError(f"{self.label}: there is no such domain, or the scheduler has no such parameter")
        near = max(self.low, min(value, self.high))
        timeline.submit(self.item(near))
        return near

    def frame(self) -> dict[str, Any]:
        """What a page has to know."""
        value = self.read()
        return {
            "label": printable(self.label),
            "low": self.low,
            "high": self.high,
            "step": self.step,
            "value": self.low if value is None else value,
            "off": value is None,
        }


def parameter_slider(xen: Hypervisor, domid: int, name: str, *, low: int, high: int, step: int) -> Slider:
    """A slider for one scheduling parameter of a domain."""

    def read() -> int | None:
        domain = xen.domains.get(domid)
        parameters = getattr(xen.scheduler, "parameters", None)
        if domain is None or not domain.vcpus or domain.vcpus[0].key not in xen.vcpus or parameters is None:
            return None
        found: int | None = parameters(domain.vcpus[0].key).get(name)
        return found

    label = f"{name.replace('_', ' ')} of domain {domid}"
    return Slider(label, low, high, step, read, lambda value: SetSchedule(domid, {name: value}))


def allowance_slider(xen: Hypervisor, *, low: int, high: int, step: int, slice_instructions: int = 1 << 20) -> Slider:
    """A slider for the slice of Borrowed Virtual Time, its context-switch allowance; the clocks begin again at 0."""

    def read() -> int | None:
        scheduler = xen.scheduler.scheduler if isinstance(xen.scheduler, Diary) else xen.scheduler
        return scheduler.allowance if isinstance(scheduler, Bvt) else None

    def item(value: int) -> Input:
        fresh = Bvt(slice_instructions, value)
        return SetScheduler(xen.scheduler.successor(fresh) if isinstance(xen.scheduler, Diary) else fresh)

    return Slider("slice (allowance)", low, high, step, read, item)


__all__ = ["Slider", "allowance_slider", "parameter_slider"]
