"""Many domains on one CPU: what their turns cost, and how soon one of them answers (paper 4.5).

The problem: a hypervisor on which a hundred domains compute pays for each change between them, with work that only
comes from changing, and the shorter the turns the more of that.  Long turns are cheap, and make whoever waits wait.
The paper measured both ends: throughput of up to 128 domains against one, with turns of 5 ms and of 50 ms, and how
soon a domain answers a packet from outside, one of those that compute and one that does nothing else.

Two kinds of number come out.  Simulated time is instructions, so responses, turns and shares are the same on every
host, for the same seed.  What a switch costs is not: in simulated time it takes nothing, since no guest instruction
happens in it.  It costs the host's time, and so throughput is work that guests have done in a second of the *host*,
with the machine of one domain and that of many measured by turns.

The invariant: the machines that are compared differ in the number of domains and in nothing else, and each has been
running for a while.  What breaks without it: the cost of starting 128 guests counts as the cost of switching.

The slice of the paper is set by the context-switch allowance of Borrowed Virtual Time: two equal domains change
places when the one that runs is ahead by so much.  So among n domains a turn is n / (n - 1) allowances long: whoever
is chosen first catches up with the next one, by what the others are apart.

Among 128 of them a domain that computes waits for half a round, 320 ms, on average.  The paper's 147 ms, with a
deviation of 97, is what 64 give on one CPU; its machine had two.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from statistics import fmean, median, pstdev

from xenlab.abi.numbers import Hypercall
from xenlab.errors import XenlabError
from xenlab.hypervisor.clocks import CPU_HZ
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.schedulers import Bvt, Scheduler
from xenlab.hypervisor.tlb import SWITCH
from xenlab.hypervisor.trace import Kind
from xenlab.labs.crowd import UNIT_INSTRUCTIONS, Crowd
from xenlab.views.picture import table

INSTRUCTIONS_PER_MS = CPU_HZ // 1000
# CPU time leaves out what other programs on this host take.  On Windows it moves in steps of 15 ms.
_seconds = time.perf_counter if sys.platform == "win32" else time.thread_time

DEFAULT_RUN = 128 * INSTRUCTIONS_PER_MS
# A wait for answers is looked at so many times in a round.
_PARTS = 20
# What the paper states in 4.5: throughput against one domain, mean and standard deviation of responses in ms.
PAPER_THROUGHPUT = {5: "0.925", 50: "almost 1"}
_PAPER_DOMAINS = 128
PAPER_LOADED, PAPER_IDLE = (147.0, 97.0), (5.4, 16.0)

# A scheduler for turns of so many instructions.
MakeScheduler = Callable[[int], Scheduler]


def borrowed_virtual_time(slice_instructions: int) -> Bvt:
    """The paper's scheduler, with that context-switch allowance."""
    return Bvt(slice_instructions, slice_instructions)


@dataclass(frozen=True, slots=True)
class Throughput:
    """What so many domains did together.

    Attributes:
        domains: how many computed.
        slice_ms: the length of their turns.
        host_rate: units of work in a second of the host, the median of several runs; every instruction is work.
        against_one: that, divided by the rate of one domain alone, measured by turns; the median.
        simulated_ms: how long all runs were.
        switches: how often another domain's turn came, in all runs.
        shares: the units of work that each domain did in all runs.
    """

    domains: int
    slice_ms: float
    host_rate: float
    against_one: float
    simulated_ms: float
    switches: int
    shares: tuple[int, ...]

    @property
    def units(self) -> int:
        """The work of all domains in all runs."""
        return sum(self.shares)

    @property
    def units_per_simulated_second(self) -> float:
        """The same as for one domain: in simulated time a switch takes nothing."""
        return self.units / self.simulated_ms * 1000


def throughput(
    counts: Iterable[int] = (1, 128),
    slices_ms: Sequence[float] = (5, 50),
    *,
    make: MakeScheduler = borrowed_virtual_time,
    instructions: int = DEFAULT_RUN,
    repeats: int = 5,
) -> tuple[Throughput, ...]:
    """Measure domains that compute, so many at a time, against one; for each length of turns.

    Args:
        counts: how many domains; one alone is measured besides, in any case.
        slices_ms: lengths of turns, in simulated milliseconds.
        make: the scheduler for a length in instructions.
        instructions: how long one run is.
        repeats: how many runs there are of each, by turns.

    Raises:
        XenlabError: a count is out of range.
    """
    counts = sorted({1, *counts})
    crowds = [Crowd(count) for count in counts]
    return tuple(
        found
        for slice_ms in slices_ms
        for found in race(crowds, slice_ms, make=make, instructions=instructions, repeats=repeats)
    )


def race(
    crowds: Sequence[Crowd],
    slice_ms: float,
    *,
    make: MakeScheduler = borrowed_virtual_time,
    instructions: int = DEFAULT_RUN,
    repeats: int = 1,
) -> list[Throughput]:
    """Let ``crowds``, the first of which has one domain that computes, run by turns; see `throughput`."""
    for crowd in crowds:
        crowd.schedule(make(_instructions(slice_ms)))
        crowd.xen.run(_instructions(slice_ms) // 2)
    before = [(crowd.done(), _switches(crowd)) for crowd in crowds]
    rates: list[list[float]] = [[] for _ in crowds]
    for _ in range(repeats):
        for crowd, of_one in zip(crowds, rates, strict=True):
            of_one.append(_rate(crowd, instructions))
    return [
        Throughput(
            len(crowd.workers),
            slice_ms,
            median(measured),
            median(rate / alone for rate, alone in zip(measured, rates[0], strict=True)),
            instructions * repeats / INSTRUCTIONS_PER_MS,
            _switches(crowd) - switches,
            tuple(now - then for then, now in zip(done, crowd.done(), strict=True)),
        )
        for crowd, measured, (done, switches) in zip(crowds, rates, before, strict=True)
    ]


def _rate(crowd: Crowd, instructions: int) -> float:
    begin = _seconds()
    crowd.xen.run(instructions)
    return instructions / UNIT_INSTRUCTIONS / (_seconds() - begin)


def _switches(crowd: Crowd) -> int:
    return crowd.xen.tlb.counts[SWITCH]


@dataclass(frozen=True, slots=True)
class Response:
    """How soon domains answered.

    Attributes:
        loaded: whether those were asked that compute; else the one that waits.
        domains: how many computed.
        slice_ms: the length of their turns.
        warp_ms: how far the one that waits is set back when it wakes, 0 for no warp.
        times_ms: from the sending of each ping to its answer, in simulated milliseconds.
    """

    loaded: bool
    domains: int
    slice_ms: float
    warp_ms: float
    times_ms: tuple[float, ...]

    @property
    def mean_ms(self) -> float:
        """The mean of all."""
        return fmean(self.times_ms)

    @property
    def deviation_ms(self) -> float:
        """Their standard deviation."""
        return pstdev(self.times_ms)


def loaded_response(
    count: int = 128,
    slice_ms: float = 5,
    *,
    make: MakeScheduler = borrowed_virtual_time,
    pings: int = 100,
    seed: int = 1,
) -> Response:
    """Ping domains that compute, at random times of the time in which each has one turn.

    Args:
        count: how many compute.
        slice_ms: the length of their turns, in simulated milliseconds.
        make: the scheduler for a length in instructions.
        pings: how many, each to one of them.
        seed: chooses the times, and which of them.

    Raises:
        XenlabError: the count is out of range, or somebody does not answer in the time of three rounds.
    """
    crowd, rng = Crowd(count, traced=True), Random(seed)
    crowd.schedule(make(_instructions(slice_ms)))
    times = _ask(crowd, rng.choices(crowd.workers, k=pings), _instructions(slice_ms) * count, rng)
    return Response(True, count, slice_ms, 0, times)


def idle_response(
    count: int = 128,
    slice_ms: float = 5,
    *,
    warp_ms: float = 0,
    make: MakeScheduler = borrowed_virtual_time,
    pings: int = 100,
    seed: int = 1,
) -> Response:
    """Ping the domain that waits while ``count`` others compute; see `loaded_response` and `Response`.

    Without a warp it waits behind all who are as far as it is.  With any warp it is the next, and waits for the rest
    of somebody's turn; with more than a turn of warp it runs at once.  There is no network here and no driver domain,
    which in the paper's figure have their part.

    Raises:
        ScheduleError: there is a warp, and the scheduler has none.
    """
    crowd, rng = Crowd(count, traced=True), Random(seed)
    crowd.schedule(make(_instructions(slice_ms)), warp=_instructions(warp_ms))
    times = _ask(crowd, [crowd.idle] * pings, _instructions(slice_ms) * count, rng)
    return Response(False, count, slice_ms, warp_ms, times)


_Ping = tuple[int, Domain]


def _ask(crowd: Crowd, domains: Sequence[Domain], round_of_turns: int, rng: Random) -> tuple[float, ...]:
    """Ping each of ``domains`` at a random time of the next round; milliseconds to each answer, by time."""
    xen = crowd.xen
    sent = sorted(((xen.now + rng.randrange(round_of_turns), domain) for domain in domains), key=lambda ping: ping[0])
    for moment, domain in sent:
        crowd.ping(domain, moment)
    xen.run(round_of_turns)
    last = {domain.domid: moment for moment, domain in sent}
    for _ in range(3 * _PARTS):
        answered = _answers(crowd)
        if all(answered.get(domid, [0])[-1] >= moment for domid, moment in last.items()):
            return _waiting_times(answered, sent)
        xen.run(round_of_turns // _PARTS)
    raise XenlabError(f"{len(crowd.workers)} domains: somebody does not answer within three rounds of turns")


def _waiting_times(answered: Mapping[int, Sequence[int]], sent: Sequence[_Ping]) -> tuple[float, ...]:
    """From each ping to the first answer after it: pings that arrive together are answered together."""
    waited = (next(at for at in answered[domain.domid] if at >= moment) - moment for moment, domain in sent)
    return tuple(instructions / INSTRUCTIONS_PER_MS for instructions in waited)


def _answers(crowd: Crowd) -> dict[int, list[int]]:
    """When each domain sent an answer, in order: an event is all that they send after their start."""
    answered: dict[int, list[int]] = {}
    trace = crowd.xen.trace
    assert trace is not None
    for moment, kind, domid, *values in trace.raw():
        if kind == Kind.HYPERCALL and values[0][0] == Hypercall.event_channel_op:
            answered.setdefault(domid, []).append(moment)
    return answered


def _instructions(milliseconds: float) -> int:
    return round(milliseconds * INSTRUCTIONS_PER_MS)


@dataclass(frozen=True, slots=True)
class Results:
    """The whole experiment.

    Attributes:
        throughput: for each length of turns, by the number of domains.
        responses: of domains that compute, and of the one that waits.
    """

    throughput: tuple[Throughput, ...]
    responses: tuple[Response, ...]

    def table(self) -> str:
        """Both as plain text, beside the paper's figures."""
        return f"{throughput_table(self.throughput)}\n\n{response_table(self.responses)}"


def experiment(*, thorough: bool = False, seed: int = 1) -> Results:
    """The paper's experiment: 128 domains against one, and how soon a loaded and an idle one answer.

    Args:
        thorough: all powers of two up to 128, more runs, other warps; minutes instead of seconds.
        seed: see `loaded_response`.
    """
    if thorough:
        measured = throughput([1 << power for power in range(8)], instructions=64_000_000, repeats=7)
        warps: tuple[float, ...] = (0, 1, 2, 4, 10)
        pings = 500
    else:
        measured, warps, pings = throughput(), (0, 1, 10), 100
    loaded = (loaded_response(count, pings=pings, seed=seed) for count in (64, 128))
    idle = (idle_response(warp_ms=warp, pings=pings, seed=seed) for warp in warps)
    return Results(measured, (*loaded, *idle))


def throughput_table(measured: Iterable[Throughput]) -> str:
    """Throughput as plain text, beside the paper's figures."""
    headings = ("slice, ms", "domains", "work / host s", "against one", "paper", "switches / s", "least and most work")
    return table(
        headings,
        [
            (
                f"{one.slice_ms:g}",
                str(one.domains),
                f"{one.host_rate:,.0f}",
                f"{one.against_one:.3f}",
                PAPER_THROUGHPUT.get(int(one.slice_ms), "") if one.domains == _PAPER_DOMAINS else "",
                f"{one.switches / one.simulated_ms * 1000:.0f}",
                f"{min(one.shares)} .. {max(one.shares)}",
            )
            for one in measured
        ],
    )


def response_table(measured: Iterable[Response]) -> str:
    """Responses as plain text, beside the paper's figures."""
    headings = ("asked", "domains", "slice, ms", "warp, ms", "mean, ms", "s.d., ms", "paper's mean", "paper's s.d.")
    return table(
        headings,
        [
            (
                "one that computes" if one.loaded else "the one that waits",
                str(one.domains),
                f"{one.slice_ms:g}",
                "" if one.loaded else f"{one.warp_ms:g}",
                f"{one.mean_ms:.4g}",
                f"{one.deviation_ms:.4g}",
                *(f"{figure:g}" for figure in (PAPER_LOADED if one.loaded else PAPER_IDLE)),
            )
            for one in measured
        ],
    )
