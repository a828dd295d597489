"""A run with a past: step it, step it back, scrub it, and change what happens next (paper 2.1).

The problem: what goes on between a guest and its hypervisor is understood by looking at it
again, slowly, and backwards.  A CPU has no reverse gear.  But a run whose every input is
recorded can be made again exactly, so going back N instructions is going back to a snapshot
and forward to the instruction wanted.

The invariant: the state at a time does not depend on the way there.  It rests on three rules:

1. A step is one instruction begun.  At time T what is due at T (the end of a slice, an input)
   is not yet done; it is done when the run continues.  Only a machine that went idle at T
   has done it, since there is nothing behind it to wait for.
2. The TLB is emptied at each multiple of ``interval`` from where the timeline begins, on
   the first run as on every replay: going back to a snapshot loses the TLB, and a guest can
   tell (a stale entry, a page fault more or less).  While no guest runs, once is enough.
3. Everything from outside comes through `submit`.

What breaks without it: a step back shows a machine that never was.  So a replay compares
every event with the one recorded and refuses to go on when they differ.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any, overload

from xenlab.errors import TimelineError
from xenlab.hypervisor.core import Hypervisor, RunResult, Stop
from xenlab.hypervisor.inputs import Input
from xenlab.hypervisor.trace import Event, Trace, decode
from xenlab.timeline import search
from xenlab.timeline.changes import Change
from xenlab.timeline.digest import machine_hash
from xenlab.timeline.goals import Watch, When
from xenlab.timeline.snapshots import Snapshot, Snapshots

DEFAULT_INTERVAL = 50_000
DEFAULT_SNAPSHOTS = 256
DEFAULT_SNAPSHOT_MIB = 256
# How far `run_to` goes.
DEFAULT_MOST = 1_000_000_000
# A snapshot is worth taking when running again to here from the one before it takes the host so many seconds, and so
# many times as long as taking a snapshot does; but no step back should take longer than the most.  The first few
# are taken sooner, when there were as many instructions as in so many intervals, an event counting as so many.
_WORTH_S, _WORTH_COSTS, _MOST_S = 0.04, 32, 0.4
_FIRST, _WORTH, _EVENT = 10, 10, 100
# One right before the place that somebody went back to, if running there took so many times as long.
_WORTH_NEAR = 2


class Timeline:
    """The past of a hypervisor from now on, and the way back into it.

    While it is attached the hypervisor is run through it alone.  Its trace keeps all events up
    to the position, also those from before.

    Args:
        hypervisor: between two runs, domains built.
        interval: the TLB is emptied, and a snapshot may be taken, every so many instructions.
        snapshots: how many are kept, 2 or more.
        snapshot_mib: host memory that they may take.

    Attributes:
        hypervisor: the machine.
        start: time at which the timeline begins; there is no way back beyond it.
        end: the furthest time that was reached.

    Raises:
        TimelineError: a part of the hypervisor cannot be saved.
    """

    def __init__(
        self,
        hypervisor: Hypervisor,
        *,
        interval: int = DEFAULT_INTERVAL,
        snapshots: int = DEFAULT_SNAPSHOTS,
        snapshot_mib: int = DEFAULT_SNAPSHOT_MIB,
    ) -> None:
        self.hypervisor = hypervisor
        self._interval, self._limits = interval, (max(2, snapshots), snapshot_mib)
        self._trace = Trace(None)
        for raw in hypervisor.trace.raw() if hypervisor.trace else ():
            self._trace.record(raw)
        hypervisor.trace = self._trace
        self.rebase()

    def rebase(self) -> None:
        """Begin again here: after the machine was changed other than by an input."""
        self.hypervisor.inputs.forget_pending()
        self.hypervisor.forget_caches()
        self.start = self.end = self.hypervisor.now
        # Events behind the position, the next one last.
        self._ahead: list[tuple[Any, ...]] = []
        self._idle_at: int | None = None
        # Seconds that the host has worked to come from the start to here, about.
        self._work = 0.0
        self._remember_position()
        self._snapshots = Snapshots(self.hypervisor, len(self._trace), *self._limits)

    @property
    def position(self) -> int:
        """The time that the machine is at, in instructions begun."""
        return self.hypervisor.now

    def run(self, instructions: int) -> RunResult:
        """Go forward; where the run has been before, the same happens again.

        Returns:
            How far it went, and `Stop.IDLE` when no vCPU can run any more.

        Raises:
            TimelineError: the machine was run or changed past the timeline, or a replay
                does something else than the run did.
            KeyboardInterrupt: on Ctrl-C; the position is then wherever the run had come.
        """
        self._check_untouched()
        before = self.position
        stop = self._advance(before + instructions)
        return RunResult(self.position - before, stop)

    def step(self, instructions: int = 1) -> RunResult:
        """Go forward ``instructions``; an idle machine stays where it is and says so."""
        return self.run(instructions)

    def back(self, instructions: int = 1) -> int:
        """Go back ``instructions``, not beyond the start; the position reached."""
        return self.seek(max(self.start, self.position - instructions))

    def seek(self, time: int) -> int:
        """Go to ``time``, in the past or in the future; the position reached.

        It is less than ``time`` when the machine went idle before.

        Raises:
            TimelineError: ``time`` lies before the start; and as for `run`.
        """
        self._check_untouched()
        if time < self.start:
            raise TimelineError(f"time {time}: the timeline begins at {self.start}, there is no way back beyond it")
        nearest = self._snapshots.latest(time)
        if time < self.position or nearest.time > self.position:
            self._go_to(nearest)
            self._come_near(time)
        self._advance(time)
        if time == self._idle_at:
            self._run_piece(time + 1)
        return self.position

    def submit(self, item: Input) -> None:
        """Let ``item`` happen now.  In the past this begins another future, and the old one is dropped."""
        self._check_untouched()
        if self.position < self.end:
            self._drop_future()
        self._idle_at = None
        self.hypervisor.submit(item)

    def events(self, until: int | None = None) -> list[Event]:
        """The events up to the position, oldest first; only those up to time ``until`` if given."""
        return [decode(raw) for raw in self._trace.raw() if until is None or raw[0] <= until]

    def last_events(self, count: int) -> list[Event]:
        """The last ``count`` events up to the position, oldest first: quick in a long run."""
        return [decode(raw) for raw in reversed(self._trace.newest(count))]

    def all_events(self) -> list[Event]:
        """The events up to the end, also those behind the position."""
        return self.events() + [decode(raw) for raw in reversed(self._ahead)]

    @property
    def happened(self) -> int:
        """How many events there were up to the position."""
        return len(self._trace)

    def recorded(self, first: int = 0) -> list[tuple[Any, ...]]:
        """The events from number ``first`` up to the end, also those behind the position, as they were recorded."""
        if first > len(self._trace):
            return self._ahead[: len(self._ahead) - (first - len(self._trace))][::-1]
        return self._trace.newest(len(self._trace) - first)[::-1] + self._ahead[::-1]

    def snapshot_times(self) -> list[int]:
        """The times to which going back is quick."""
        return self._snapshots.times()

    # Breakpoints.

    @overload
    def back_to(self, goal: When) -> Event | None: ...

    @overload
    def back_to(self, goal: Watch) -> Change | None: ...

    def back_to(self, goal: When | Watch) -> Event | Change | None:
        """Go back to the last event or change before the position; the machine is then right behind it.

        Returns:
            What was found.  None if there is none; then the position stays.
        """
        self._check_untouched()
        return search.event_before(self, goal) if isinstance(goal, When) else search.change_before(self, goal)

    @overload
    def run_to(self, goal: When, most: int = ...) -> Event | None: ...

    @overload
    def run_to(self, goal: Watch, most: int = ...) -> Change | None: ...

    def run_to(self, goal: When | Watch, most: int = DEFAULT_MOST) -> Event | Change | None:
        """Go forward to the next event or change, by ``most`` instructions at most; then right behind it.

        Returns:
            What was found.  None if there is none; then the position is as far as that goes.
        """
        self._check_untouched()
        limit = self.position + most
        if isinstance(goal, When):
            return search.event_behind(self, goal, limit)
        return search.change_behind(self, goal, limit)

    def last_change(self, watch: Watch) -> Change | None:
        """Who changed it?  The last change up to the position, which stays; None if there was none since the start."""
        self._check_untouched()
        here = self.position
        try:
            return search.last_change(self, watch, here)
        finally:
            self.seek(here)

    def machine_hash(self) -> str:
        """Hex digest of the whole machine; see `xenlab.timeline.digest`."""
        return machine_hash(self.hypervisor)

    def _advance(self, time: int) -> Stop:
        """Run to ``time``, stopping at each multiple of the interval to empty the TLB."""
        while self.position < time:
            boundary = self._next_boundary()
            if self._run_piece(min(boundary, time)) is Stop.IDLE:
                return Stop.IDLE
            if self.position == boundary:
                self.hypervisor.forget_caches()
                if self._is_worth_a_snapshot():
                    self._keep_snapshot()
        return Stop.BUDGET

    def _next_boundary(self) -> int:
        """The next multiple of the interval; on a machine that sleeps, the last one before it will be woken.

        Where no guest runs, it is the same to empty the TLB once or a thousand times.
        """
        xen, position = self.hypervisor, self.position
        boundary = self._boundary_before(position) + self._interval
        if xen.current is not None or xen.pick_needed:
            return boundary
        due = xen.inputs.next_time()
        woken = xen.timers.due if due is None else min(due, xen.timers.due)
        return max(boundary, self._boundary_before(woken))

    def _boundary_before(self, time: int) -> int:
        return time - (time - self.start) % self._interval

    def _run_piece(self, time: int) -> Stop:
        started = perf_counter()
        try:
            stop = self.hypervisor.run(time - self.position).stop
        finally:
            self._work += perf_counter() - started
            self._compare_with_record()
            self.end = max(self.end, self.position)
            self._remember_position()
        if stop is Stop.IDLE:
            self._idle_at = self.position
        return stop

    def _come_near(self, time: int) -> None:
        """Run to the last multiple of the interval before ``time``, for the next step back to begin there."""
        near = self._boundary_before(time - 1)
        if near <= self.position or self._advance(near) is Stop.IDLE:
            return
        if self._work_since_snapshot() > _WORTH_NEAR * self._snapshots.cost:
            self._keep_snapshot()

    def _is_worth_a_snapshot(self) -> bool:
        if self._snapshots.taken > _FIRST:
            return self._work_since_snapshot() >= min(max(_WORTH_S, _WORTH_COSTS * self._snapshots.cost), _MOST_S)
        before = self._snapshots.latest(self.position)
        events = len(self._trace) - before.events
        return self.position - before.time + _EVENT * events >= _WORTH * self._interval

    def _work_since_snapshot(self) -> float:
        return self._work - self._snapshots.latest(self.position).work

    def _keep_snapshot(self) -> None:
        self._snapshots.take(len(self._trace), self._work)

    def _go_to(self, snapshot: Snapshot) -> None:
        """Put back ``snapshot``, which may also lie ahead."""
        self._snapshots.put_back(snapshot)
        self._work = snapshot.work
        self._ahead += self._trace.rewind(snapshot.events)
        again = snapshot.events - len(self._trace)
        if again:
            self._trace.extend(reversed(self._ahead[-again:]))
            del self._ahead[-again:]
        self._remember_position()

    def _compare_with_record(self) -> None:
        """What just happened must be what happened here the first time."""
        if not self._ahead:
            return
        happened = self._trace.newest(len(self._trace) - self._known_events)
        expected = self._ahead[-len(happened) :] if happened else []
        same = happened[len(happened) - len(expected) :] == expected
        del self._ahead[len(self._ahead) - len(expected) :]
        if not same or (self._ahead and self._ahead[-1][0] < self.position):
            self._drop_future()
            raise TimelineError(
                f"the replay at {self.position} is not like the run: a part of the hypervisor remembers something "
                "that its state() does not give, or depends on something outside the machine"
            )

    def _drop_future(self) -> None:
        self._ahead.clear()
        self._snapshots.drop_after(self.position)
        self.hypervisor.inputs.forget_pending()
        self.end, self._idle_at = self.position, None

    def _remember_position(self) -> None:
        self._known_events, self._known_time = len(self._trace), self.position

    def _check_untouched(self) -> None:
        if (len(self._trace), self.position) != (self._known_events, self._known_time):
            raise TimelineError(
                f"the machine was at {self._known_time} and is at {self.position}, with "
                f"{len(self._trace) - self._known_events} events that the timeline did not make: "
                "build and destroy domains by submit(Boot(...)) and submit(Destroy(...)), or call rebase()"
            )
