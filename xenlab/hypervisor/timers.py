"""Timers: what happens to a guest because of the time (paper 3.3.2).

Each vCPU has

* an alarm on real time (``set_timer_op``, or the single-shot timer of ``vcpu_op``), which wakes it;
* an alarm on virtual time (``set_virtual_timer``, ours: the paper has it, Xen's interface lost it);
* a periodic tick, 100 times a second unless it asks for something else.  Like Xen's it comes only while the vCPU
  runs: who was away for ten ticks finds one on return;
* a limit for how long it sleeps in ``poll``.

Each domain has two watchdogs besides, which end it if it does not set them again in time.

The first two are the slot `Alarms`.  All but the last arrive as events, on `Virq.TIMER`, the one on virtual time
on `Virq.VIRTUAL_TIMER`.

The invariant: guest code never runs at or behind the time of an event that is due.  `due` is that time; the CPU stops
there at the latest, and a machine on which all sleep goes there in one leap.  What breaks without it: time depends on
who happens to trap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from xenlab.abi.numbers import Hypercall, Shutdown, Virq
from xenlab.errors import XenlabError
from xenlab.hypervisor.accounting import virtual_time
from xenlab.hypervisor.alarms import REAL, VIRTUAL, AlarmClocks, Alarms
from xenlab.hypervisor.clocks import to_instructions, to_ns
from xenlab.hypervisor.parts import wrong
from xenlab.hypervisor.trace import Kind

if TYPE_CHECKING:
    from xenlab.hypervisor.core import Hypervisor
    from xenlab.hypervisor.domain import Vcpu

NEVER = 1 << 62
TICK_NAME, POLL_NAME = "tick", "poll"
# Xen's answer to times that can only be a mistake: soon, but not at once.
_FURTHEST_NS, _INSTEAD_NS = 1 << 50, 100_000_000
_SECOND_NS = 1_000_000_000
_CLOCKS = {REAL: Virq.TIMER, VIRTUAL: Virq.VIRTUAL_TIMER}


class Timers:
    """All timers of all vCPUs.

    Attributes:
        alarms: the part that keeps the two alarms.
        due: the time at which the next one goes off if nothing changes until then; `NEVER` if none will.
    """

    def __init__(self, xen: Hypervisor, alarms: Alarms | None) -> None:
        self._xen = xen
        self.alarms: Alarms = alarms or AlarmClocks()
        self.due = NEVER
        self._tick = NEVER
        self._alarm: int | None = None
        self._polls: dict[int, int] = {}
        self._watchdogs: dict[tuple[int, int], int] = {}
        xen.hypercalls.register(Hypercall.set_timer_op, self.set_timer_op)
        xen.hypercalls.register(Hypercall.set_virtual_timer, self.set_virtual_timer)

    # What guests ask for.

    def set_timer_op(self, vcpu: Vcpu, low: int, high: int, *_: int) -> int:
        """Set the alarm on real time to nanoseconds in two words, 0 for none."""
        at = low | high << 32
        if at >> 63 or at - to_ns(self._xen.now) >= _FURTHEST_NS:
            at = to_ns(self._xen.now) + _INSTEAD_NS
        self.set_alarm(vcpu, REAL, at)
        return 0

    def set_virtual_timer(self, vcpu: Vcpu, low: int, high: int, *_: int) -> int:
        """Set the alarm on the time that the vCPU has run, in nanoseconds in two words, 0 for none."""
        self.attend(vcpu)
        self.set_alarm(vcpu, VIRTUAL, low | high << 32)
        return 0

    def set_alarm(self, vcpu: Vcpu, clock: str, at_ns: int) -> None:
        """Set one of the two alarms of the vCPU that runs; 0 takes it away."""
        self._set(vcpu, clock, min(to_instructions(at_ns), NEVER) if at_ns else None)
        self._changed()

    def _set(self, vcpu: Vcpu, clock: str, at: int | None) -> None:
        now, ran = self._xen.now, virtual_time(self._xen, vcpu)
        did = f"the alarm of vCPU {vcpu.key} on {clock} time is set to {at}"
        self._ask(did, lambda: self.alarms.set(vcpu.key, clock, at, now, ran))

    def set_tick(self, vcpu: Vcpu, period: int) -> None:
        """Let ``vcpu`` have a tick each ``period`` instructions, 0 for none."""
        vcpu.tick_period = period
        self.attend(vcpu)

    def limit_poll(self, vcpu: Vcpu, at_ns: int) -> None:
        """``vcpu`` polls until real time is ``at_ns`` at the latest; 0 for no limit."""
        self._polls.pop(vcpu.key, None)
        if at_ns:
            self._polls[vcpu.key] = min(to_instructions(at_ns), NEVER)
        self._changed()

    def watch(self, domid: int, watchdog: int, seconds: int) -> None:
        """End the domain after so much real time unless this is called again, with 0 for never."""
        self._watchdogs.pop((domid, watchdog), None)
        if seconds:
            self._watchdogs[domid, watchdog] = self._xen.now + to_instructions(seconds * _SECOND_NS)
        self._changed()

    def attend(self, vcpu: Vcpu) -> None:
        """Look at ``vcpu`` at each switch from now on: it has a timer that counts only while it runs."""
        attended, vcpu.attended = vcpu.attended, True
        if vcpu is self._xen.current:
            if not attended:
                self._announce(vcpu)
            self._begin_ticks(vcpu)
            self._changed()

    def forget(self, vcpu: Vcpu) -> None:
        """``vcpu`` has ended."""
        self._polls.pop(vcpu.key, None)
        for watchdog in [watchdog for watchdog in self._watchdogs if watchdog[0] == vcpu.domid]:
            del self._watchdogs[watchdog]
        for clock in _CLOCKS:
            self._set(vcpu, clock, None)
        self._changed()

    # What time does.

    def started(self, vcpu: Vcpu) -> None:
        """A vCPU that is attended to has got the CPU."""
        self._announce(vcpu)
        self._begin_ticks(vcpu)
        self._changed()

    def _announce(self, vcpu: Vcpu) -> None:
        now, ran = self._xen.now, virtual_time(self._xen, vcpu)
        self._ask(f"vCPU {vcpu.key} begins to run", lambda: self.alarms.run(vcpu.key, now, ran))

    def stopped(self, vcpu: Vcpu) -> None:
        """A vCPU that is attended to has lost the CPU."""
        now, ran = self._xen.now, vcpu.account.ran
        self._tick = NEVER
        self._ask(f"vCPU {vcpu.key} stops running", lambda: self.alarms.stop(vcpu.key, now, ran))
        self._changed()

    def expire(self) -> None:
        """Let go off what is due."""
        now = self._xen.now
        if self._tick <= now and self._xen.current is not None:
            self._begin_ticks(self._xen.current)
        for key in [key for key, at in self._polls.items() if at <= now]:
            del self._polls[key]
            self._end_poll(self._xen.vcpus[key])
        for watchdog in [watchdog for watchdog, at in self._watchdogs.items() if at <= now]:
            # Of two that are due at once, the first ends the domain and takes the other with it.
            if self._watchdogs.pop(watchdog, None) is not None:
                self._bite(watchdog[0])
        if self._alarm is not None and self._alarm <= now:
            for vcpu, clock in self._expired(now):
                self._go_off(vcpu, clock, _CLOCKS[clock])
        self._changed()
        if self._alarm is not None and self._alarm <= now:
            raise wrong(self.alarms, f"asked for the next alarm behind instruction {now}", "a later time", self._alarm)

    def _begin_ticks(self, vcpu: Vcpu) -> None:
        """The next tick of the vCPU that runs; one that is overdue comes now."""
        self._tick = NEVER
        if not vcpu.tick_period or not self._xen.events.hears(vcpu, Virq.TIMER):
            return
        now = self._xen.now
        if vcpu.last_tick + vcpu.tick_period <= now:
            vcpu.last_tick = now
            self._go_off(vcpu, TICK_NAME, Virq.TIMER)
        self._tick = vcpu.last_tick + vcpu.tick_period

    def _go_off(self, vcpu: Vcpu, timer: str, virq: Virq) -> None:
        self._xen.record(Kind.TIMER, vcpu.domid, vcpu.key, timer)
        self._xen.events.raise_virq_of(vcpu, virq)

    def _end_poll(self, vcpu: Vcpu) -> None:
        if vcpu.polling:
            self._xen.record(Kind.TIMER, vcpu.domid, vcpu.key, POLL_NAME)
            vcpu.polling = 0
            self._xen.wake(vcpu)

    def _bite(self, domid: int) -> None:
        domain = self._xen.domains[domid]
        if not domain.ended:
            self._xen.shut_down(domain, Shutdown.WATCHDOG)

    def _expired(self, now: int) -> list[tuple[Vcpu, str]]:
        did = f"alarms up to instruction {now}"
        expected = f"pairs of a vCPU of {sorted(self._xen.vcpus)} and one of {', '.join(_CLOCKS)}"
        found: Any = self._ask(did, lambda: self.alarms.expire(now))
        try:
            known = [(self._xen.vcpus[vcpu], clock) for vcpu, clock in found]
        except (TypeError, ValueError, KeyError):
            raise wrong(self.alarms, did, expected, found) from None
        if not known or any(clock not in _CLOCKS for _vcpu, clock in known):
            raise wrong(self.alarms, did, f"at least one, {expected}", found)
        return known

    def _changed(self) -> None:
        """Find out when the next one is due, and let the CPU stop there."""
        following: Any = self._ask("asked for the next alarm", self.alarms.next)
        if following is not None and type(following) is not int:
            raise wrong(self.alarms, "asked for the next alarm", "a time in instructions, or None", following)
        self._alarm = following
        self.due = min(
            NEVER if following is None else following, self._tick, *self._polls.values(), *self._watchdogs.values()
        )
        xen = self._xen
        if xen.current is not None:
            xen.cpu.deadline = min(xen.slice_end, self.due)

    def _ask(self, did: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except XenlabError:
            raise
        except Exception as problem:
            raise wrong(self.alarms, did, "no exception", problem) from problem

    def state(self) -> Any:
        """Everything but the part's, as plain data."""
        return self.due, self._tick, self._alarm, dict(self._polls), dict(self._watchdogs)

    def load(self, state: Any) -> None:
        """Take over what `state` gave."""
        self.due, self._tick, self._alarm, polls, watchdogs = state
        self._polls, self._watchdogs = dict(polls), dict(watchdogs)
