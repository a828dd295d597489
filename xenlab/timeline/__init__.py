"""Trace, snapshots and replay: any run can be stepped, stepped back and scrubbed."""

from __future__ import annotations

from xenlab.timeline.digest import machine_hash
from xenlab.timeline.inputs import Boot, Destroy
from xenlab.timeline.perfetto import save_perfetto, to_perfetto
from xenlab.timeline.timeline import Timeline

__all__ = ["Boot", "Destroy", "Timeline", "machine_hash", "save_perfetto", "to_perfetto"]
