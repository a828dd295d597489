"""The control bar without the bar: commands that move a timeline, and playing that never blocks.

The problem: the kernel that runs the guest also answers the reader's clicks and runs the next
cell.  While it is inside the guest it does neither.

The invariant: the guest runs in pieces of at most about 20 ms, and between two pieces the kernel
rests at least as long as it worked.  Playing is one asyncio task; there are no threads.  What
breaks without it: pause does nothing until the guest ends, and a guest in an endless loop does not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import Enum, auto
from time import perf_counter
from typing import Protocol

from xenlab.errors import XenlabError
from xenlab.hypervisor.core import Hypervisor, RunResult, Stop
from xenlab.hypervisor.inputs import Input
from xenlab.hypervisor.trace import NO_DOMAIN, Event, Kind
from xenlab.timeline.goals import When

FRAME_S = 0.05
PIECE_S = 0.02
SPEEDS = (10, 100, 1_000, 10_000, 100_000, 1_000_000)
_FIRST_PIECE, _LARGEST_PIECE = 1_000, 1_000_000
IDLE = "No domain can run any more."
NO_EARLIER = "There is no such event before this moment."
ANY_EVENT = "any event"
# What the event buttons stop at, as the reader chooses it.
STOPS: dict[str, When] = {ANY_EVENT: When()} | {
    name: When(frozenset(kinds))
    for name, kinds in {
        "hypercalls": (Kind.HYPERCALL,),
        "exceptions": (Kind.TRAP,),
        "emulation": (Kind.EMULATE,),
        "switches": (Kind.SWITCH,),
        "upcalls, timers": (Kind.TIMER, Kind.UPCALL),
        "page tables": (Kind.TABLE_WRITE, Kind.REFUSED),
        "console": (Kind.CONSOLE,),
        "inputs": (Kind.INPUT,),
        "domains": (Kind.DOMAIN, Kind.CRASH),
    }.items()
}


class Movable(Protocol):
    """What is needed of a timeline."""

    hypervisor: Hypervisor

    @property
    def position(self) -> int: ...

    @property
    def start(self) -> int: ...

    @property
    def end(self) -> int: ...

    def run(self, instructions: int) -> RunResult: ...

    def seek(self, time: int) -> int: ...

    def submit(self, item: Input) -> None: ...

    def back_to(self, goal: When) -> Event | None: ...

    def run_to(self, goal: When, most: int) -> Event | None: ...


class Goal(Enum):
    """What a task is running for."""

    PLAY = auto()
    END = auto()
    EVENT = auto()


class Player:
    """Moves a timeline on command.

    Args:
        timeline: what is moved.
        changed: called after each movement; it draws.

    Attributes:
        speed: instructions a second while playing.
        stop: what `previous_event` and `next_event` stop at, one of `STOPS`.
        status: the last thing worth telling the reader.
    """

    def __init__(self, timeline: Movable, changed: Callable[[], None]) -> None:
        self.timeline, self._changed = timeline, changed
        self.speed = 100
        self.stop = ANY_EVENT
        self.status = ""
        self.task: asyncio.Task[None] | None = None
        self._piece = _FIRST_PIECE

    @property
    def playing(self) -> bool:
        """Whether a task is moving the timeline."""
        return self.task is not None

    def step(self, count: int = 1) -> None:
        """Forward by ``count`` instructions."""
        self._move(lambda: self._forward(count))

    def back(self, count: int = 1) -> None:
        """Back by ``count`` instructions."""
        self.seek(self.timeline.position - count)

    def seek(self, time: int) -> None:
        """To ``time``, or as near as the timeline reaches."""
        self._move(lambda: self.timeline.seek(max(time, self.timeline.start)))

    def previous_event(self) -> None:
        """Back to right behind the event before this moment."""
        self._move(self._to_previous_event)

    def next_event(self) -> None:
        """Forward to right behind the next event, however far."""
        self._start(Goal.EVENT)

    def to_end(self) -> None:
        """Forward as far as the timeline was before, and then until no domain can run."""
        self._start(Goal.END)

    def play(self) -> None:
        """Forward at `speed` until `pause`, or until no domain can run."""
        self._start(Goal.PLAY)

    def pause(self) -> None:
        """Stop playing, at once."""
        if self.task is not None:
            self.task.cancel()
            self.task = None
            self._changed()

    def submit(self, act: Callable[[Movable], object]) -> None:
        """Let something come in from outside at this moment; playing goes on."""
        self.status = "From here on another future." if self.timeline.position < self.timeline.end else ""
        try:
            act(self.timeline)
        except XenlabError as problem:
            self.status = str(problem)
        self._changed()

    def _move(self, movement: Callable[[], object]) -> None:
        if self.task is not None:
            self.task.cancel()
            self.task = None
        self.status = ""
        try:
            movement()
        except XenlabError as problem:
            self.status = str(problem)
        except KeyboardInterrupt:
            self.status = "Interrupted."
        self._changed()

    def _to_previous_event(self) -> None:
        found = self.timeline.back_to(STOPS[self.stop])
        self.status = _told(found) if found is not None else NO_EARLIER
        if found is None and self.stop == ANY_EVENT:
            self.timeline.seek(self.timeline.start)

    def _forward(self, count: int) -> bool:
        """Run; False when nothing can run any more."""
        result = self.timeline.run(count)
        if result.stop is Stop.IDLE:
            self.status = IDLE
        return result.stop is not Stop.IDLE

    def _start(self, goal: Goal) -> None:
        if self.task is not None:
            self.task.cancel()
        self.status = ""
        self.task = asyncio.get_running_loop().create_task(self._run(goal))
        self._changed()

    async def _run(self, goal: Goal) -> None:
        try:
            await self._pieces(goal)
        except asyncio.CancelledError:
            # Whoever cancelled has already put the next task, or none, in this one's place.
            return
        except XenlabError as problem:
            self.status = str(problem)
        except KeyboardInterrupt:
            # It must not reach the event loop, which would end the kernel.
            self.status = "Interrupted."
        self.task = None
        self._changed()

    async def _pieces(self, goal: Goal) -> None:
        going, due = True, 0.0
        while going:
            started = perf_counter()
            due += self.speed * max(FRAME_S, 1 / self.speed)
            going = self._one_piece(goal, int(due))
            due -= int(due)
            if goal is not Goal.EVENT:
                self._changed()
            spent = perf_counter() - started
            frame = FRAME_S if goal is not Goal.PLAY else max(FRAME_S, 1 / self.speed)
            await asyncio.sleep(max(frame - spent, spent) if goal is Goal.PLAY else spent)

    def _one_piece(self, goal: Goal, wanted: int) -> bool:
        """Run as much as 20 ms allow; False when the goal is reached."""
        started = perf_counter()
        if goal is Goal.EVENT:
            going = self._towards_event()
        else:
            going = self._forward(min(wanted, self._piece) if goal is Goal.PLAY else self._piece)
        self._adapt(perf_counter() - started)
        return going

    def _towards_event(self) -> bool:
        before = self.timeline.position
        found = self.timeline.run_to(STOPS[self.stop], self._piece)
        if found is not None:
            self.status = _told(found)
            return False
        going = self.timeline.position == before + self._piece
        if not going:
            self.status = IDLE
        return going

    def _adapt(self, spent: float) -> None:
        """Make the next piece longer or shorter, so that it takes about half of what is allowed."""
        if spent > PIECE_S / 2:
            self._piece = max(self._piece // 2, 1)
        elif spent < PIECE_S / 8:
            self._piece = min(self._piece * 2, _LARGEST_PIECE)


def _told(event: Event) -> str:
    """The event that was gone to, in a few words."""
    whose = f" of domain {event.domain}" if event.domain != NO_DOMAIN else ""
    return f"{event.kind.name.replace('_', ' ').lower()}{whose} at {event.time:,}"
