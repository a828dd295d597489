"""Trace, snapshots and replay: any run can be stepped, stepped back and scrubbed."""

from __future__ import annotations

from xenlab.timeline.changes import Cause, Change
from xenlab.timeline.digest import machine_hash
from xenlab.timeline.goals import FrameContent, FrameUse, PendingPort, Watch, When
from xenlab.timeline.inputs import Boot, Destroy
from xenlab.timeline.perfetto import save_perfetto, to_perfetto
from xenlab.timeline.timeline import Timeline

__all__ = [
    "Boot",
    "Cause",
    "Change",
    "Destroy",
    "FrameContent",
    "FrameUse",
    "PendingPort",
    "Timeline",
    "Watch",
    "When",
    "machine_hash",
    "save_perfetto",
    "to_perfetto",
]
