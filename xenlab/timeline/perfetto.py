"""A run as a trace file that Perfetto's viewer and chrome://tracing open.

Each domain becomes a process and each of its virtual CPUs a thread.  On a thread lie slices
of running, from one switch to the next; in them each hypercall as a slice as long as its one
instruction, and traps, emulations and deliveries as instants.  What comes from outside stands in
a process of its own.

The format is the JSON "Trace Event Format".  Its times are microseconds; one instruction is
written as one nanosecond.  The importer wants slices of a thread to nest perfectly, which
they do: a switch is never inside an instruction that goes on after it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

from xenlab.abi.numbers import Hypercall
from xenlab.hypervisor.domain import VCPUS_PER_DOMAIN
from xenlab.hypervisor.trace import NO_DOMAIN, Event, Kind

Json = dict[str, Any]
_OUTSIDE = 0
_NAMES = {call.value: call.name for call in Hypercall}


def to_perfetto(events: Iterable[Event], names: Mapping[int, str] | None = None, end: int | None = None) -> Json:
    """The events as a dictionary for `json.dump`.

    Args:
        events: as from `Timeline.events`, oldest first.
        names: names of domains by id; the id itself where there is none.
        end: time up to which the last running slice reaches; that of the last event if not given.
    """
    writer = _Writer(names or {})
    for event in events:
        writer.add(event)
    writer.finish(end)
    return {
        "traceEvents": writer.lines,
        "displayTimeUnit": "ns",
        "otherData": {"time": "1 instruction = 1 ns"},
    }


def save_perfetto(
    path: str | PathLike[str], events: Iterable[Event], names: Mapping[int, str] | None = None, end: int | None = None
) -> None:
    """Write the file that ``Open trace file`` of the viewer takes."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(to_perfetto(events, names, end), file)


class _Writer:
    def __init__(self, names: Mapping[int, str]) -> None:
        self.lines: list[Json] = []
        self._names = names
        self._threads: set[tuple[int, int]] = set()
        # The running vCPU and since when; the open hypercall of each domain.
        self._running: tuple[int, int] | None = None
        self._calls: dict[int, Json] = {}
        self._last = 0

    def add(self, event: Event) -> None:
        self._last = max(self._last, event.time)
        if event.kind is Kind.SWITCH:
            self._switch(event)
        elif event.kind is Kind.HYPERCALL:
            self._calls[event.domain] = self._hypercall(event)
        elif event.kind is Kind.RETURN:
            call = self._calls.pop(event.domain, None)
            if call is not None:
                call["args"]["result"] = event.result
        else:
            self._instant(event)

    def finish(self, end: int | None) -> None:
        self._close(max(self._last, end or 0))

    def _switch(self, event: Event) -> None:
        self._close(event.time)
        if event.to_vcpu >= 0:
            self._running = event.to_vcpu, event.time

    def _close(self, time: int) -> None:
        if self._running is not None:
            vcpu, since = self._running
            self._running = None
            if time > since:
                place = self._place(vcpu // VCPUS_PER_DOMAIN, vcpu)
                self._line("X", "running", since, place, {"instructions": time - since})["dur"] = (time - since) / 1000

    def _hypercall(self, event: Event) -> Json:
        name = _NAMES.get(event.number, f"hypercall {event.number}")
        arguments = {"eip": f"{event.eip:#010x}", "registers": [f"{value:#x}" for value in event.registers]}
        line = self._line("X", name, event.time - 1, self._thread_of(event.domain), arguments)
        line["dur"] = 0.001
        return line

    def _instant(self, event: Event) -> None:
        # What an instruction caused is drawn where it begins, inside its hypercall and its running slice.
        inside = event.kind not in (Kind.INPUT, Kind.DOMAIN) and event.time > 0
        place = self._thread_of(event.domain)
        values = {name: _readable(value) for name, value in event.values.items()}
        self._line("i", event.kind.name.lower(), event.time - inside, place, values)["s"] = "t"

    def _thread_of(self, domain: int) -> tuple[int, int]:
        if self._running is not None and self._running[0] // VCPUS_PER_DOMAIN == domain:
            return self._place(domain, self._running[0])
        return self._place(domain, domain * VCPUS_PER_DOMAIN)

    def _place(self, domain: int, vcpu: int) -> tuple[int, int]:
        """Process and thread number, which are announced when first used."""
        place = (_OUTSIDE, _OUTSIDE) if domain == NO_DOMAIN else (domain + 1, vcpu + 1)
        if place not in self._threads:
            self._threads.add(place)
            outside = place[0] == _OUTSIDE
            process = "outside" if outside else f"domain {domain} {self._names.get(domain, '')}".strip()
            thread = "inputs" if outside else f"vcpu {vcpu % VCPUS_PER_DOMAIN}"
            self._line("M", "process_name", 0, place, {"name": process})
            self._line("M", "thread_name", 0, place, {"name": thread})
        return place

    def _line(self, phase: str, name: str, time: int, place: tuple[int, int], values: Json) -> Json:
        line: Json = {"ph": phase, "name": name, "ts": time / 1000, "pid": place[0], "tid": place[1], "args": values}
        self.lines.append(line)
        return line


def _readable(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, tuple):
        return [_readable(part) for part in value]
    return value
