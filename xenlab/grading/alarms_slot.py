"""The two alarm timers kept by a student's part, with kernels that live by the clock (exercise 09).

A scenario is plain data, so that it can be sent to the student's process:

    plans     for each domain the command line of the guest ``clocks``
    slice     instructions of a turn, round robin
    budget    instructions

What the part is told (`set`, `run`, `stop`) decides nothing; its decisions are the answers of ``next``, a number, -1
for None, and of ``expire``, ``{"off": [[vcpu, clock], ...]}``.  As in `decisions`, each is checked before it is used.

The invariant: what the part is told follows from the guests and from its answers alone, in the student's process and
in the judge's.  What breaks without it: answers that were recorded are given to other questions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xenlab.errors import PartError
from xenlab.grading.decisions import Decision, Sink, Unusable, check_object, described, raise_if_unusable
from xenlab.grading.patience import OutOfPatience, patience
from xenlab.hypervisor.alarms import REAL, VIRTUAL, Alarms
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.schedulers import RoundRobin
from xenlab.hypervisor.trace import Trace
from xenlab.machine.machine import Machine
from xenlab.toolstack import Image, boot

MEMORY_MIB = 7
ANSWER_SECONDS = 0.25
MAX_ANSWERS = 4_000
_MOST_OFF, _LATEST = 64, 1 << 80
Scenario = Mapping[str, Any]
Off = tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True)
class Told:
    """Something that the part was told or asked.

    Attributes:
        method, arguments: the call.
        answer: a time or None of ``next``, the alarms of ``expire``; None also where it gave nothing usable.
        time: when.
        domid, eip: whose vCPU had the CPU and where it was; -1 and 0 for nobody's.
    """

    method: str
    arguments: tuple[Any, ...]
    answer: Any
    time: int
    domid: int
    eip: int

    def __str__(self) -> str:
        return f"{called(self.method, self.arguments)} = {shown(self.answer)}"


class AlarmsSlot:
    """`Alarms` whose decisions pass through a `Sink`.

    Attributes:
        told: all calls, in order.
    """

    def __init__(self, sink: Sink, part: Alarms | None = None) -> None:
        self._sink, self._part = sink, part
        self._xen: Hypervisor | None = None
        # When `expire` was called, until something changes: what is next must be later.
        self._expired = -1
        self.told: list[Told] = []

    def begin(self, xen: Hypervisor) -> None:
        """The machine that it is a part of."""
        self._xen = xen

    def set(self, vcpu: int, clock: str, at: int | None, now: int, ran: int) -> None:
        self._tell("set", vcpu, clock, at, now, ran)

    def run(self, vcpu: int, now: int, ran: int) -> None:
        self._tell("run", vcpu, now, ran)

    def stop(self, vcpu: int, now: int, ran: int) -> None:
        self._tell("stop", vcpu, now, ran)

    def next(self) -> int | None:
        at: int | None = self._decide("next", (), self._checked_next)
        return at

    def expire(self, now: int) -> Off:
        off: Off = self._decide("expire", (now,), self._checked_off)
        self._expired = now
        return off

    def state(self) -> dict[str, Any]:
        """Nothing: a run for grading is not taken back."""
        return {}

    def load(self, _state: dict[str, Any]) -> None:
        """Nothing to take back."""

    def _tell(self, method: str, *arguments: Any) -> None:
        self._expired = -1
        self._decide(method, arguments, _checked_nothing)

    def _decide(self, method: str, arguments: tuple[Any, ...], checked: Callable[[Any], Any]) -> Any:
        """One call, written down with what is found in the decision; raises Unusable."""
        answer = None
        try:
            answer = read_decision(method, self._sink.next(lambda: self._ask(method, arguments)))
            return checked(answer)
        finally:
            self.told.append(Told(method, arguments, answer, *self._place()))

    def _place(self) -> tuple[int, int, int]:
        assert self._xen is not None
        vcpu = self._xen.current
        return (self._xen.now, vcpu.domid, vcpu.state.eip) if vcpu is not None else (self._xen.now, -1, 0)

    def _checked_next(self, answer: int | None) -> int | None:
        if answer is not None and answer <= self._expired:
            raise Unusable(
                f"next() answered {answer} right behind expire({self._expired}): what is due by then has gone off"
            )
        return answer

    def _checked_off(self, off: Off) -> Off:
        known = self._xen.vcpus if self._xen is not None else {}
        for vcpu, _clock in off:
            if vcpu not in known:
                raise Unusable(f"expire named vCPU {vcpu}: expected one of {sorted(known)}")
        if not off:
            raise Unusable("expire named no alarm; it is called when the time that next() gave has come")
        return off

    def _ask(self, method: str, arguments: tuple[Any, ...]) -> Decision:
        call = called(method, arguments)
        try:
            with patience(ANSWER_SECONDS):
                return _encoded(method, call, getattr(self._part, method)(*arguments))
        except OutOfPatience:
            return {"unusable": f"{call} did not answer within {ANSWER_SECONDS:g} s of CPU time"}
        except (Exception, SystemExit) as problem:
            return {"unusable": f"{call} raised {described(problem)}"}


def called(method: str, arguments: tuple[Any, ...]) -> str:
    """A call as it is written in Python: ``set(0, 'real', 1200, 800, 640)``."""
    return f"{method}({', '.join(map(repr, arguments))})"


def shown(answer: Any) -> str:
    """An answer as it is written in Python, but short."""
    return repr(list(answer)) if isinstance(answer, tuple) else repr(answer)


def _encoded(method: str, call: str, value: Any) -> Decision:
    if method == "next":
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            return {"unusable": f"{call} must return a whole number of instructions or None, it returned {value!r:.80}"}
        return -1 if value is None else int(value)
    if method != "expire":
        return 0
    pairs = value if isinstance(value, list | tuple) else None
    if pairs is None or not all(map(_is_pair, pairs)):
        return {"unusable": f"{call} must return a list of pairs (vcpu, clock), it returned {value!r:.80}"}
    return {"off": [[int(vcpu), str(clock)] for vcpu, clock in pairs]}


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], int) and pair[1] in (REAL, VIRTUAL)


def read_decision(method: str, decision: Any) -> Any:
    """The answer in a decision: None, a time, or alarms.  Raises Unusable."""
    if method == "expire":
        check_object(decision)
        return _off_of(decision.get("off"))
    if isinstance(decision, dict):
        raise_if_unusable(decision)
    if type(decision) is not int or not -1 <= decision <= _LATEST:
        raise Unusable(f"expected for {method} a time from 0 on, or None, found {decision!r:.80}")
    return None if method != "next" or decision == -1 else decision


def _off_of(pairs: Any) -> Off:
    if not isinstance(pairs, list) or len(pairs) > _MOST_OFF:
        raise Unusable(f"expected at most {_MOST_OFF} alarms, found {pairs!r:.80}")
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) is not int or type(pair[1]) is not str:
            raise Unusable(f"expected an alarm as [vcpu, clock], found {pair!r:.80}")
        if pair[1] not in (REAL, VIRTUAL):
            raise Unusable(f"expected an alarm on {REAL!r} or {VIRTUAL!r} time, found {pair[1]!r:.40}")
    return tuple((vcpu, clock) for vcpu, clock in pairs)


def _checked_nothing(_answer: Any) -> None:
    return None


@dataclass(slots=True)
class Played:
    """A scenario that has run: the machine, why the part could not go on, and what it was told."""

    xen: Hypervisor
    problem: str
    told: Sequence[Told]


def play(image: Image, scenario: Scenario, sink: Sink, part: Any = None) -> Played:
    """Run a scenario on a machine of its own."""
    alarms = AlarmsSlot(sink, part)
    scheduler = RoundRobin(scenario["slice"])
    xen = Hypervisor(Machine(MEMORY_MIB), scheduler=scheduler, alarms=alarms, trace=Trace())
    alarms.begin(xen)
    for plan in scenario["plans"]:
        boot(xen, image, command_line=plan)
    problem = ""
    try:
        xen.run(scenario["budget"])
    except (Unusable, PartError) as reason:
        problem = str(reason)
    return Played(xen, problem, alarms.told)


__all__ = ["MAX_ANSWERS", "AlarmsSlot", "Played", "Scenario", "Told", "called", "play", "read_decision", "shown"]
