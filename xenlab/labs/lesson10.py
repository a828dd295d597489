"""Scenes of lesson 10: shares, latency, and what a warp buys (paper 3.3.1, 4.5).

All of them run the guest ``worker``: with an empty command line it works without end, with a number it sleeps, and
after each wake-up works for so many instructions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xenlab import guests
from xenlab.hypervisor.accounting import usage
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.inputs import Typed
from xenlab.hypervisor.parts import load_part, save_part
from xenlab.hypervisor.schedulers import Bvt, Diary, Scheduler
from xenlab.hypervisor.schedulers.diary import PICK, WAKE
from xenlab.hypervisor.schedulers.parameters import DEFAULT_WEIGHT, MOST_INSTRUCTIONS, MOST_WEIGHT, check_values
from xenlab.hypervisor.trace import Trace
from xenlab.machine.machine import Machine
from xenlab.timeline import Timeline
from xenlab.toolstack import boot
from xenlab.toolstack.schedule import SetSchedule
from xenlab.views import Slider, allowance_slider, parameter_slider
from xenlab.views.picture import table

NS_PER_INSTRUCTION = 10  # a CPU of 100 MHz, one instruction a cycle
SLICE, ALLOWANCE = 50_000, 2_000
# How long a key's work takes, and how far the keys are apart: not a multiple of anybody's turn.
KEY_WORK, KEYS_APART = 600, 9_137
_HYPERVISOR_MIB = 4
_TOLD = {"weight": (1, MOST_WEIGHT), "warp": (0, MOST_INSTRUCTIONS)}


@dataclass(frozen=True, slots=True)
class Key:
    """Somebody types a key at a domain, again and again, ``interval`` instructions apart."""

    domid: int
    interval: int

    def apply(self, hypervisor: Hypervisor) -> None:
        Typed(self.domid, b".").apply(hypervisor)


@dataclass(frozen=True, slots=True)
class Worker:
    """A domain to be built.

    Attributes:
        name: for people.
        work: instructions after a wake-up; 0: without end.
        weight, warp, warp_limit, unwarp: what the tools set of the scheduler; see `Bvt`.
    """

    name: str
    work: int = 0
    weight: int = 256
    warp: int = 0
    warp_limit: int = 0
    unwarp: int = 0

    @property
    def parameters(self) -> dict[str, int]:
        """Those that are not as they are from the start."""
        plain = Worker("")
        names = ("weight", "warp", "warp_limit", "unwarp")
        return {name: getattr(self, name) for name in names if getattr(self, name) != getattr(plain, name)}


def machine(scheduler: Scheduler, workers: Iterable[Worker], *, keys: int = 0) -> Hypervisor:
    """Domains on one CPU, with a diary of what the scheduler does; those that sleep are asleep when keys begin.

    Args:
        scheduler: has seen no vCPU yet.
        workers: in the order of their ids.
        keys: one is typed at each domain that sleeps every so many instructions; 0: none.
    """
    workers = list(workers)
    xen = Hypervisor(Machine(_HYPERVISOR_MIB + len(workers)), scheduler=Diary(scheduler), trace=Trace())
    for worker in workers:
        domain = boot(xen, guests.source("worker"), name=worker.name, command_line=str(worker.work))
        if worker.parameters:
            xen.submit(SetSchedule(domain.domid, worker.parameters))
        if worker.work and keys:
            xen.inputs.submit(keys, Key(domain.domid, keys))
    return xen


def busy(count: int = 3, **parameters: int) -> list[Worker]:
    """So many workers that never sleep."""
    return [Worker(name, **parameters) for name in ("web", "mail", "build", "batch", "index")[:count]]


def ran(xen: Hypervisor, domain: Domain) -> int:
    """For how many instructions a domain had the CPU up to now."""
    return usage(xen, domain).running


def shares(xen: Hypervisor, domids: Sequence[int] = ()) -> str:
    """What each domain had of the CPU, beside what its weight says.

    Args:
        xen: the machine, with a scheduler that has weights.
        domids: of these alone; of all if empty.
    """
    chosen = [xen.domains[domid] for domid in domids or sorted(xen.domains)]
    weights = [weight(xen, domain) for domain in chosen]
    times = [ran(xen, domain) for domain in chosen]
    rows = []
    for domain, of_it, time in zip(chosen, weights, times, strict=True):
        expected, found = of_it / sum(weights), time / sum(times)
        rows.append(
            (domain.name, str(of_it), f"{time:,}", f"{found:.2%}", f"{expected:.2%}", f"{found / expected - 1:+.2%}")
        )
    return table(("domain", "weight", "ran, instructions", "share", "by weight", "off by"), rows)


def worst_share(xen: Hypervisor) -> float:
    """By how much the share that is furthest off is off, in parts of what it should be."""
    domains = list(xen.domains.values())
    weights, times = [weight(xen, domain) for domain in domains], [ran(xen, domain) for domain in domains]
    return max(abs(time * sum(weights) / (sum(times) * of_it) - 1) for of_it, time in zip(weights, times, strict=True))


def weight(xen: Hypervisor, domain: Domain) -> int:
    """The weight of a domain; 1 if the scheduler knows none."""
    assert isinstance(xen.scheduler, Diary)
    return xen.scheduler.parameters(domain.vcpus[0].key).get("weight", 1)


def waits(xen: Hypervisor, domid: int) -> list[int]:
    """How long a domain waited for the CPU after each of its wake-ups so far, in instructions; the start is none."""
    assert isinstance(xen.scheduler, Diary)
    key, woke, found = xen.domains[domid].vcpus[0].key, 0, []
    lines = [line for line in xen.scheduler.lines() if line.vcpu == key]
    for line in lines[1:]:  # the first one is its start
        if line.what == WAKE:
            woke = line.time
        elif line.what == PICK and woke:
            found.append(line.time - woke)
            woke = 0
    return found


def latencies(machines: dict[str, Hypervisor], domid: int) -> str:
    """Waits after wake-ups of one domain on several machines."""
    rows = []
    for name, xen in machines.items():
        found = waits(xen, domid)
        mean = sum(found) / max(len(found), 1)
        share = ran(xen, xen.domains[domid]) / xen.now
        rows.append((name, str(len(found)), f"{mean:,.0f}", f"{max(found, default=0):,}", f"{share:.1%}"))
    return table(("scheduler", "wake-ups", "mean wait, instructions", "longest", "its share of the CPU"), rows)


def switches(xen: Hypervisor) -> int:
    """How often the CPU went from one domain to another."""
    return sum(usage(xen, domain).switches for domain in xen.domains.values())


def keyboard(scheduler: Scheduler, *, run: int = 400_000, **parameters: int) -> Hypervisor:
    """Three busy domains and one that answers keys, with these parameters, after a while."""
    xen = machine(scheduler, [*busy(), Worker("keys", KEY_WORK, **parameters)], keys=KEYS_APART)
    xen.run(run)
    return xen


def late_riser(scheduler: Scheduler, *, asleep: int = 100_000, run: int = 100_000) -> Hypervisor:
    """Two busy domains, and one that sleeps for long and then never stops working."""
    xen = machine(scheduler, [*busy(2), Worker("late", 1_000_000_000)])
    xen.run(asleep)
    xen.submit(Typed(2, b"."))
    xen.run(run)
    return xen


class Hoarder(Bvt):
    """Borrowed Virtual Time with one step left out: the clock of one that wakes is not put forward."""

    def __init__(self, slice_instructions: int = SLICE, allowance: int = ALLOWANCE) -> None:
        self._slept_at: dict[int, int] = {}
        super().__init__(slice_instructions, allowance)

    def sleep(self, vcpu: int, now: int) -> None:
        super().sleep(vcpu, now)
        self._slept_at[vcpu] = self.state()["vcpus"][vcpu]["avt"]

    def wake(self, vcpu: int, now: int) -> None:
        super().wake(vcpu, now)
        state = self.state()
        clock = state["vcpus"][vcpu]
        clock["avt"] = self._slept_at.get(vcpu, clock["avt"])
        super().load(state)


class Told:
    """A scheduler of exercise 10, which is ``told`` weights and warps, in the hypervisor's slot.

    Args:
        scheduler: has ``told``, ``wake``, ``sleep`` and ``pick``, and perhaps ``clocks``.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self._values: dict[int, dict[str, int]] = {}
        self.wake, self.sleep, self.pick = scheduler.wake, scheduler.sleep, scheduler.pick

    def add(self, vcpu: int) -> None:
        """``vcpu`` exists."""
        self._values[vcpu] = {"weight": DEFAULT_WEIGHT, "warp": 0}
        self.scheduler.told(vcpu, 0, **self._values[vcpu])

    def remove(self, vcpu: int) -> None:
        """``vcpu`` exists no more."""
        self._values.pop(vcpu, None)

    def parameters(self, vcpu: int) -> dict[str, int]:
        """What is set for ``vcpu``."""
        return dict(self._values[vcpu])

    def set_parameters(self, vcpu: int, now: int, values: Mapping[str, int]) -> None:
        """Set weight and warp."""
        check_values(self.scheduler, vcpu, _TOLD, values)
        self._values[vcpu] |= values
        self.scheduler.told(vcpu, now, **self._values[vcpu])

    def clocks(self) -> dict[int, tuple[int, int]]:
        """Those of the scheduler, if it shows them."""
        found: dict[int, tuple[int, int]] = self.scheduler.clocks() if hasattr(self.scheduler, "clocks") else {}
        return found

    def state(self) -> Any:
        return save_part(self.scheduler), {vcpu: dict(values) for vcpu, values in self._values.items()}

    def load(self, state: Any) -> None:
        saved, values = state
        load_part(self.scheduler, saved)
        self._values = {vcpu: dict(of_it) for vcpu, of_it in values.items()}


def schemer(*, warp: int, warp_limit: int = 0, unwarp: int = 0, run: int = 1_000_000) -> Hypervisor:
    """Two busy domains and one that is woken again as soon as it sleeps, and has always worked for a moment."""
    scheming = Worker("schemer", 1_900, warp=warp, warp_limit=warp_limit, unwarp=unwarp)
    xen = machine(Bvt(SLICE, ALLOWANCE), [*busy(2), scheming], keys=2_011)
    xen.run(run)
    return xen


def live_timeline() -> tuple[Timeline, list[Slider]]:
    """Three busy domains and one that answers keys, at their start, with a way forward and back, and sliders."""
    xen = machine(Bvt(1 << 20, ALLOWANCE), [*busy(), Worker("keys", KEY_WORK)])
    weights = [parameter_slider(xen, domid, "weight", low=32, high=1_024, step=32) for domid in range(4)]
    warp = parameter_slider(xen, 3, "warp", low=0, high=12_000, step=500)
    allowance = allowance_slider(xen, low=500, high=8_000, step=500)
    timeline = Timeline(xen)
    timeline.submit(Key(3, KEYS_APART))
    return timeline, [*weights, warp, allowance]


def microseconds(instructions: float) -> float:
    """How long that takes on the simulated CPU."""
    return instructions * NS_PER_INSTRUCTION / 1_000
