"""A mechanism's state as a picture or a text table; widgets are a thin shell round that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from xenlab.views.address_space import AddressSpaceView
from xenlab.views.audit import audit_report
from xenlab.views.balloon import BalloonView
from xenlab.views.bars import BarsView, cost_bars
from xenlab.views.calls import CallTimeline
from xenlab.views.clocks import ClocksView
from xenlab.views.events import EventsView
from xenlab.views.frame_map import FrameMap
from xenlab.views.frames import FrameBuilder
from xenlab.views.machine import MachineView
from xenlab.views.matrix import Cell, InstructionMatrix, InstructionRow, Outcome
from xenlab.views.p2m import P2mView
from xenlab.views.page_tree import PageTree
from xenlab.views.picture import Picture
from xenlab.views.player import Movable
from xenlab.views.registers import RegistersView
from xenlab.views.rings import RingsView
from xenlab.views.schedule import ScheduleView
from xenlab.views.sliders import Slider, allowance_slider, parameter_slider
from xenlab.views.tlb import TlbView, space_bars
from xenlab.views.traps import TrapTableView

if TYPE_CHECKING:
    from xenlab.views.widget import LiveView


def live(timeline: Movable, *views: Picture, sliders: Sequence[Slider] = ()) -> LiveView:
    """One widget with one control bar, and perhaps sliders, for all ``views``, which show ``timeline.hypervisor``."""
    from xenlab.views.widget import LiveView  # ipywidgets take 0.3 s to load

    return LiveView(timeline, *views, sliders=sliders)


__all__ = [
    "AddressSpaceView",
    "BalloonView",
    "BarsView",
    "CallTimeline",
    "Cell",
    "ClocksView",
    "EventsView",
    "FrameBuilder",
    "FrameMap",
    "InstructionMatrix",
    "InstructionRow",
    "MachineView",
    "Outcome",
    "P2mView",
    "PageTree",
    "Picture",
    "RegistersView",
    "RingsView",
    "ScheduleView",
    "Slider",
    "TlbView",
    "TrapTableView",
    "allowance_slider",
    "audit_report",
    "cost_bars",
    "live",
    "parameter_slider",
    "space_bars",
]
