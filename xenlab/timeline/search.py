"""Back to what led here, or on to what comes: a timeline taken to an event or to a change (paper 2.1).

The invariant: the machine ends right behind what was looked for, so that it is the last thing that has happened and
one step back undoes it; and looking again in the same direction finds another one, in another place: what happens
within one instruction is one place.  What breaks without it: a search that stays where it is, or skips one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xenlab.hypervisor.core import Stop
from xenlab.hypervisor.trace import Event, decode
from xenlab.timeline.changes import Change, change_at, last_time, next_time
from xenlab.timeline.goals import Watch, When

if TYPE_CHECKING:
    from xenlab.timeline.timeline import Timeline

_FIRST_PIECE, _LARGEST_PIECE = 1_000, 1_000_000


def last_change(timeline: Timeline, watch: Watch, end: int) -> Change | None:
    """The last change at ``end`` or before; the machine is then right behind it."""
    time = last_time(timeline, watch, end)
    return change_at(timeline, watch, time) if time is not None else None


def change_before(timeline: Timeline, watch: Watch) -> Change | None:
    """To the last change before the position; nowhere if there is none."""
    here = timeline.position
    found = last_change(timeline, watch, here - 1)
    if found is None:
        timeline.seek(here)
    return found


def change_behind(timeline: Timeline, watch: Watch, limit: int) -> Change | None:
    """To the next change; as far as it goes if there is none up to ``limit``."""
    time = next_time(timeline, watch, limit)
    return change_at(timeline, watch, time) if time is not None else None


def event_before(timeline: Timeline, when: When) -> Event | None:
    """To the last event before the position that is meant; nowhere if there is none."""
    here, happened = timeline.position, timeline.happened
    raw = timeline.recorded()
    for place in reversed(range(happened)):
        if raw[place][0] < timeline.start:
            break
        if raw[place][0] < here and when.matches(raw[place]):
            _go_behind(timeline, raw[place], place)
            # What is due at a time is done one instruction later.
            if timeline.position < here:
                return decode(raw[place])
    timeline.seek(here)
    return None


def event_behind(timeline: Timeline, when: When, limit: int) -> Event | None:
    """To the next event that is meant and has not happened; as far as it goes if there is none before ``limit``."""
    known, piece, going = timeline.happened, _FIRST_PIECE, True
    while True:
        raw = timeline.recorded(known)
        for place, event in enumerate(raw, known):
            if event[0] < limit and when.matches(event):
                _go_behind(timeline, event, place)
                return decode(event)
        known += len(raw)
        timeline.seek(max(timeline.position, min(timeline.end, limit)))
        if not going or timeline.position >= limit:
            return None
        going = timeline.run(min(piece, limit - timeline.position)).stop is not Stop.IDLE
        piece = min(2 * piece, _LARGEST_PIECE)


def _go_behind(timeline: Timeline, event: tuple[Any, ...], place: int) -> None:
    """To the moment at which ``event``, the trace's number ``place``, has just happened."""
    timeline.seek(event[0])
    if timeline.happened <= place:
        timeline.step()
