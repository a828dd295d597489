"""Guests whose CPU a student's scheduler deals out (exercise 10).

The part stands in the hypervisor's own slot, behind a wrapper that checks each answer and writes down what the part was
told and what it said.  As in `decisions`, an answer is plain data: ``[vcpu, instructions]``, or ``{"idle": true}`` when
no vCPU is runnable.

A scenario is plain data, so that it can be sent to the student's process:

    domains   for each: ``work`` (instructions after a wake-up, 0: without end), ``weight`` and ``warp``
    keys      wake-ups from outside, as ``[time, domid]``
    sets      parameters that change, as ``[time, domid, weight, warp]``
    then      domains that are woken one by one whenever nobody is runnable any more
    budget    instructions

The invariant: what stands in the log is what happened on this machine.  What breaks without it: shares are measured of
a run that a student's process claims to have made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from xenlab.errors import XenlabError
from xenlab.grading.decisions import Decision, Sink, Unusable, described, raise_if_unusable
from xenlab.grading.patience import OutOfPatience, patience
from xenlab.hypervisor.core import Hypervisor, Stop
from xenlab.hypervisor.inputs import Typed
from xenlab.machine.machine import Machine
from xenlab.toolstack import Image, boot
from xenlab.toolstack.schedule import SetSchedule

# Our own solution is asked half as often in the longest scenario.
MAX_PICKS = 15_000
ANSWER_SECONDS = 0.25
VCPUS = 32  # numbers of vCPUs that belong to one domain
_MOST_LENGTH = 1 << 40
_HYPERVISOR_MIB = 4
TOLD, WAKE, SLEEP, PICK = "told", "wake", "sleep", "pick"
Scenario = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """What the part was told or asked.

    Attributes:
        time: instructions since the machine began.
        what: TOLD, WAKE, SLEEP or PICK.
        vcpu: whom it was about; for PICK, whom the part chose, None for nobody.
        length: of the turn.
        weight, warp: as told.
    """

    time: int
    what: str
    vcpu: int | None
    length: int = 0
    weight: int = 0
    warp: int = 0


class SchedulerSlot:
    """A scheduler whose decisions pass through a `Sink`.

    Attributes:
        log: all calls, in order.
        runnable: the vCPUs that may be chosen now.
    """

    def __init__(self, sink: Sink, part: Any, domains: list[Mapping[str, int]]) -> None:
        self._sink, self._part, self._domains = sink, part, domains
        self._values: dict[int, dict[str, int]] = {}
        self._broken: Decision | None = None
        self._picks = 0
        self.log: list[Call] = []
        self.runnable: set[int] = set()

    def add(self, vcpu: int) -> None:
        row = self._domains[vcpu // VCPUS]
        self._tell(vcpu, 0, {"weight": row["weight"], "warp": row["warp"]})

    def remove(self, vcpu: int) -> None:
        self._values.pop(vcpu, None)

    def parameters(self, vcpu: int) -> dict[str, int]:
        return dict(self._values[vcpu])

    def set_parameters(self, vcpu: int, now: int, values: Mapping[str, int]) -> None:
        self._tell(vcpu, now, {**self._values[vcpu], **values})

    def state(self) -> None:
        """Nobody takes these runs back."""

    def load(self, state: None) -> None:
        """Nobody takes these runs back."""

    def _tell(self, vcpu: int, now: int, values: dict[str, int]) -> None:
        self._values[vcpu] = values
        weight, warp = values["weight"], values["warp"]
        self.log.append(Call(now, TOLD, vcpu, weight=weight, warp=warp))
        self._say(
            f"told({vcpu}, now={now}, weight={weight}, warp={warp})", lambda: self._part.told(vcpu, now, weight, warp)
        )

    def wake(self, vcpu: int, now: int) -> None:
        self.runnable.add(vcpu)
        self.log.append(Call(now, WAKE, vcpu))
        self._say(f"wake({vcpu}, now={now})", lambda: self._part.wake(vcpu, now))

    def sleep(self, vcpu: int, now: int) -> None:
        self.runnable.discard(vcpu)
        self.log.append(Call(now, SLEEP, vcpu))
        self._say(f"sleep({vcpu}, now={now})", lambda: self._part.sleep(vcpu, now))

    def pick(self, now: int) -> tuple[int, int] | None:
        self._picks += 1
        if self._picks > MAX_PICKS:
            raise Unusable(
                f"the part was asked {MAX_PICKS:,} times by instruction {now:,}: its turns are far too short"
            )
        decision = self._sink.next(lambda: self._ask(now))
        chosen = choice_of(decision, now, self.runnable)
        vcpu, length = chosen or (None, 0)
        self.log.append(Call(now, PICK, vcpu, length))
        return chosen

    def _say(self, call: str, action: Callable[[], object]) -> None:
        """Tell the part something; what it does wrong shows in its next answer."""
        if self._part is None or self._broken is not None:
            return
        answer, _value = _patiently(call, action)
        if answer is not None:
            self._broken = answer

    def _ask(self, now: int) -> Decision:
        call = f"pick(now={now})"
        if self._broken is not None:
            return self._broken
        problem, value = _patiently(call, lambda: _encoded(call, self._part.pick(now)))
        if problem is not None:
            return problem
        decision: Decision = value
        return decision


def _patiently(call: str, action: Callable[[], Any]) -> tuple[Decision | None, Any]:
    """Why there is no answer, if there is none; and the answer."""
    try:
        with patience(ANSWER_SECONDS):
            return None, action()
    except OutOfPatience:
        return {"unusable": f"{call} did not return within {ANSWER_SECONDS:g} s of CPU time"}, None
    except (Exception, SystemExit) as problem:
        return {"unusable": f"{call} raised {described(problem)}"}, None


def _encoded(call: str, value: Any) -> Any:
    if value is None:
        return {"idle": True}
    if not isinstance(value, tuple | list) or len(value) != 2:
        return {"unusable": f"{call} must return (vcpu, instructions) or None, it returned {value!r:.80}"}
    if not all(isinstance(number, int) for number in value):
        return {"unusable": f"{call} must return whole numbers, it returned {value!r:.80}"}
    return [int(number) for number in value]


def choice_of(decision: Any, now: int, runnable: set[int]) -> tuple[int, int] | None:
    """Whom a decision lets run, and for how long.  Raises Unusable."""
    if isinstance(decision, dict):
        raise_if_unusable(decision)
        if decision.get("idle") is True and not runnable:
            return None
        if decision.get("idle") is True:
            raise Unusable(f"instruction {now}: pick left the CPU idle (None) while {_numbers(runnable)} could run")
    if not isinstance(decision, list) or [type(number) for number in decision] != [int, int]:
        raise Unusable(f"expected a decision as [vcpu, instructions], found {decision!r:.80}")
    vcpu, length = decision
    if vcpu not in runnable:
        raise Unusable(
            f"instruction {now}: pick chose vCPU {vcpu}, which is not runnable; runnable: {_numbers(runnable)}"
        )
    if not 1 <= length <= _MOST_LENGTH:
        raise Unusable(f"instruction {now}: pick gave vCPU {vcpu} a turn of {length} instructions; expected 1 or more")
    return vcpu, length


def _numbers(vcpus: set[int]) -> str:
    return ", ".join(map(str, sorted(vcpus)[:8])) + (", …" if len(vcpus) > 8 else "") if vcpus else "none"


@dataclass(slots=True)
class Played:
    """A scenario that has run: the machine, why the part could not go on, and what it was told and said."""

    xen: Hypervisor
    problem: str
    log: list[Call]


def play(image: Image, scenario: Scenario, sink: Sink, part: Any = None) -> Played:
    """Run a scenario on a machine of its own, with the part in the scheduler's slot."""
    domains = scenario["domains"]
    slot = SchedulerSlot(sink, part, domains)
    xen = Hypervisor(Machine(_HYPERVISOR_MIB + len(domains)), scheduler=slot)
    problem = ""
    try:
        for row in domains:
            boot(xen, image, command_line=str(row["work"]))
        for time, domid in scenario["keys"]:
            xen.inputs.submit(time, Typed(domid, b"."))
        for time, domid, weight, warp in scenario["sets"]:
            xen.inputs.submit(time, SetSchedule(domid, {"weight": weight, "warp": warp}))
        _run(xen, scenario)
    except XenlabError as reason:
        problem = str(reason)
    return Played(xen, problem, slot.log)


def _run(xen: Hypervisor, scenario: Scenario) -> None:
    waiting = list(scenario["then"])
    while xen.now < scenario["budget"]:
        if xen.run(scenario["budget"] - xen.now).stop is not Stop.IDLE or not waiting:
            return
        xen.submit(Typed(waiting.pop(0), b"."))


__all__ = [
    "MAX_PICKS",
    "PICK",
    "SLEEP",
    "TOLD",
    "VCPUS",
    "WAKE",
    "Call",
    "Played",
    "Scenario",
    "SchedulerSlot",
    "choice_of",
    "play",
]
