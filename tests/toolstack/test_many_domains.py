"""Hundreds of domains come and go, and nothing of them stays (paper 4.5)."""

from __future__ import annotations

import gc
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from many_guests import (
    BLOCKS,
    COMPUTES,
    CONTROL,
    CRASHES,
    GIVES_BACK,
    SHUTS_DOWN,
    TABLES,
    TIMERS,
    sends,
    waits,
)

from xenlab import Hypervisor, Machine, boot
from xenlab.abi.numbers import EvtchnStatus, Shutdown
from xenlab.hypervisor.auditor import check
from xenlab.hypervisor.domain import Domain, RunState, Vcpu
from xenlab.hypervisor.frames import FREE, PINNED, FrameType
from xenlab.hypervisor.schedulers import Bvt, Credit, RoundRobin, Scheduler
from xenlab.machine.engine import TRANSLATIONS, Context
from xenlab.machine.paging import PAE, TWO_LEVEL, PagingMode
from xenlab.machine.state import ContextState

DOMAINS_A_WAVE, WAVES, FEW_WAVES = 26, 12, 4
SLICE, RUN = 2_000, 160_000
KEPT = (Domain, Vcpu, ContextState, Context)


def members(wave: int) -> list[tuple[str, PagingMode, bool]]:
    """The sources of a wave's guests, their formats, and whether each is let run; neighbours are connected."""
    sources = [(COMPUTES, True), (BLOCKS, True), (CRASHES, True), (SHUTS_DOWN, True), (TABLES, True), (TABLES, True)]
    sources += [(GIVES_BACK, True), (COMPUTES, False), (COMPUTES, True), (TIMERS, True)]
    first = len(sources) + 1
    for pair in range(first, DOMAINS_A_WAVE, 2):
        sources += [(sends(pair + 1), True), (waits(pair), True)]
    return [(text, (TWO_LEVEL, PAE)[(wave + n // 2) % 2], runs) for n, (text, runs) in enumerate(sources)]


def build_wave(xen: Hypervisor, wave: int) -> list[Domain]:
    domains = []
    for text, mode, runs in members(wave):
        domains.append(boot(xen, text, mode=mode))
        if not runs:
            xen.pause(domains[-1])
    return domains


def what_is_left(xen: Hypervisor) -> dict[str, Any]:
    """All that could grow, but for memory of the process."""
    gc.collect()
    frames = xen.frames
    objects = Counter(type(thing) for thing in gc.get_objects())
    known: Any = xen.scheduler.state()
    alarms: Any = xen.timers.alarms.state()
    control = xen.domains[0]
    return {
        "free": frames.free_frames,
        "frames": [bytes(column) for column in (frames.owner, frames.type, frames.uses, frames.refs, frames.flags)],
        "m2p": bytes(frames.m2p),
        "memory": sum(not xen.memory.is_zero(mfn) for mfn in range(frames.count) if frames.owner_of(mfn) == FREE),
        "domains": list(xen.domains),
        "vcpus": list(xen.vcpus),
        "scheduled": sorted(known["vcpus"]) if isinstance(known, dict) else known,
        "ports": control.ports,
        "tables": xen.page_tables.state(),
        "timers": xen.timers.state(),
        "alarms": [alarms[kind] for kind in ("real", "virtual")],
        "shared": xen.shared_pages.state(),
        "objects": [objects[kind] for kind in KEPT],
    }


def resident_bytes() -> int:
    """Memory that the process has of the host's; 0 where that cannot be asked for."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "waves"),
    [
        pytest.param(lambda: Bvt(SLICE, SLICE), WAVES, id="bvt"),
        pytest.param(lambda: Credit(SLICE), FEW_WAVES, id="credit"),
        pytest.param(lambda: RoundRobin(SLICE), FEW_WAVES, id="round"),
        pytest.param(lambda: Credit(SLICE), WAVES, id="credit, all waves", marks=pytest.mark.storm),
        pytest.param(lambda: RoundRobin(SLICE), WAVES, id="round, all waves", marks=pytest.mark.storm),
    ],
)
def test_waves_of_domains_leave_nothing(make: Callable[[], Scheduler], waves: int) -> None:
    xen, rng = Hypervisor(Machine(32), scheduler=make()), random.Random(1)
    boot(xen, CONTROL, privileged=True)
    xen.run(1_000)
    alone = what_is_left(xen)["scheduled"]
    for mode in (TWO_LEVEL, PAE):  # each leaves the pages that all domains of its kind share
        xen.destroy(boot(xen, COMPUTES, mode=mode))
    xen.run(1_000)
    before, resident, python_objects = what_is_left(xen), 0, 0
    for wave in range(waves):
        domains = build_wave(xen, wave)
        xen.run(RUN)
        check(xen)
        assert_that_they_did_what_they_are_for(xen, domains)
        # One that runs just now, one that is paused, and all others in any order.
        running = xen.current
        assert running is not None
        xen.pause(domains[8])
        rest = rng.sample(domains, len(domains))
        for domain in (running.domain, domains[8], *rest):
            xen.destroy(domain)
            if rng.random() < 0.3:
                xen.run(3 * SLICE)
                check(xen)
        xen.run(10 * SLICE)  # the control domain hears of it and sleeps
        check(xen)
        assert xen.current is None
        del domains, domain, rest, running
        assert what_is_left(xen) == before
        if wave < 2:  # every line of Python has been used
            resident, python_objects = resident_bytes(), len(gc.get_objects())
    assert before["scheduled"] == alone
    assert xen.domains[0].vcpus[0].state.edi > waves
    assert len(gc.get_objects()) - python_objects < DOMAINS_A_WAVE
    # What the engine has translated is thrown away only when its buffer is full.
    assert resident_bytes() - resident < TRANSLATIONS // 4


def assert_that_they_did_what_they_are_for(xen: Hypervisor, domains: list[Domain]) -> None:
    """Else nothing of what they hold could be lost."""
    computes, blocks, crashes, ends, *tables, gives, still, _busy, timed = domains[:10]
    assert [domain.domid for domain in domains] == list(range(1, DOMAINS_A_WAVE + 1))
    assert (computes.vcpus[0].run_state, blocks.vcpus[0].run_state) == (RunState.RUNNABLE, RunState.BLOCKED)
    assert (crashes.shutdown, ends.shutdown) == (Shutdown.CRASH, Shutdown.POWEROFF)
    assert still.vcpus[0].run_state is RunState.PAUSED
    for domain in tables:
        assert not domain.ended, domain.report
        types = Counter(xen.frames.type[mfn] for mfn in domain.frames)
        assert types[FrameType.DESCRIPTORS] == 2, domain.mode
        assert sum(bool(xen.frames.flags[mfn] & PINNED) for mfn in domain.frames) == 2
    assert gives.pages == 256 - 20, gives.report
    polls, ticks = timed.vcpus[0].polling, timed.vcpus[0].tick_period
    assert (timed.ended, polls, ticks, timed.vcpus[0].run_state) == (False, 2, 100_000, RunState.BLOCKED), timed.report
    for sender, waiter in zip(domains[10::2], domains[11::2], strict=True):
        assert [port.status for port in sender.ports.values()].count(EvtchnStatus.INTERDOMAIN) == 2, sender.report
        assert [port.status for port in waiter.ports.values()].count(EvtchnStatus.INTERDOMAIN) == 2, waiter.report
        assert waiter.vcpus[0].run_state is RunState.BLOCKED
        assert waiter.vcpus[0].polling
