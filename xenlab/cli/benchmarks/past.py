"""Benchmarks of what a reader of a lesson does: a step, with the views drawn again, a step back, and scrubbing."""

from __future__ import annotations

import random
import time

from xenlab.cli.benchmarks import Sample
from xenlab.cli.benchmarks.floor import clock_ns
from xenlab.cli.benchmarks.guests import FAULT, hypervisor_with
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.trace import Trace
from xenlab.machine.machine import Machine
from xenlab.timeline import Timeline
from xenlab.toolstack import boot

VIEWED_INSTRUCTIONS = 20_000
RUN_INSTRUCTIONS = 10_000_000
SCRUB_DOMAINS, SCRUB_INSTRUCTIONS, SCRUB_SEEKS = 16, 100_000_000, 40
RECORDED_INSTRUCTIONS = 5_000_000
# The golden section of the run, again and again, comes near every place and repeats none.
_STRIDE = 6_180_339

# Computes, fills memory, and yields every 1,000 rounds: about 7,000 instructions.
WORK = """
start: mov edi, offset buffer
    mov ebp, 1000
again: mov eax, [edi]
    add eax, ebp
    imul eax, eax, 17
    mov [edi + 4 * ebp], eax
    dec ebp
    jnz again
    mov ebx, SCHEDOP_yield
    xor ecx, ecx
    mov eax, __HYPERVISOR_sched_op
    int 0x82
    mov ebp, 1000
    jmp again
buffer: .space 4096
"""


# The same with what it stores spread over 16 pages, and new each time.
WANDER = """
start: mov edi, offset buffer
    xor ecx, ecx
    xor esi, esi
again: mov ebp, 1000
store: mov eax, [edi + 4 * ecx]
    add eax, esi
    imul eax, eax, 17
    inc ecx
    and ecx, 0x3FFF
    mov [edi + 4 * ecx], eax
    dec ebp
    jnz store
    inc esi
    mov ebx, SCHEDOP_yield
    push ecx
    xor ecx, ecx
    mov eax, __HYPERVISOR_sched_op
    int 0x82
    pop ecx
    jmp again
    .align 4096
buffer: .space 65536
"""


def long_run(instructions: int = RUN_INSTRUCTIONS) -> Timeline:
    """A timeline of two domains that compute, store and yield, run for so many instructions."""
    xen = Hypervisor(Machine(16))
    for name in ("first", "second"):
        boot(xen, WORK, name=name)
    timeline = Timeline(xen)
    timeline.run(instructions)
    return timeline


def step_back() -> Sample:
    """Milliseconds of ``Timeline.back(1)`` in a run of ten million instructions of two domains.

    Each sample goes to another place of the run, untimed, and takes one step back from there.
    """
    timeline = long_run()
    place = 0

    def sample() -> float:
        nonlocal place
        place = (place + _STRIDE) % RUN_INSTRUCTIONS
        timeline.seek(timeline.start + place)
        begin = time.perf_counter_ns()
        timeline.back(1)
        return (time.perf_counter_ns() - begin) / 1e6

    return sample


def view_update() -> Sample:
    """Milliseconds in which the kernel answers the step button of a live view of machine, rings and calls.

    The guest of ``fault_bounce`` has run for 20,000 instructions, which left about 8,000 events.
    In the figure: one instruction, three pictures and their text tables, and the widget's
    change of state.  Not in it: the way to the page and what the browser does.
    """
    from xenlab.views import CallTimeline, MachineView, RingsView, live

    xen = hypervisor_with(FAULT, traced=True)
    timeline = Timeline(xen)
    timeline.run(VIEWED_INSTRUCTIONS)
    shown = live(timeline, MachineView(xen), RingsView(xen), CallTimeline(xen))

    def sample() -> float:
        begin = time.perf_counter_ns()
        shown.command({"do": "step", "n": 1})
        return (time.perf_counter_ns() - begin) / 1e6

    return sample


def wanderers() -> Hypervisor:
    """Sixteen domains of one MiB that compute, store all over 64 KiB, and yield."""
    xen = Hypervisor(Machine(2 * SCRUB_DOMAINS))
    for number in range(SCRUB_DOMAINS):
        boot(xen, WANDER, name=f"guest{number}")
    return xen


def _seeks() -> Sample:
    """Milliseconds of one ``Timeline.seek`` to a random moment of the long run of sixteen domains."""
    timeline = Timeline(wanderers())
    timeline.run(SCRUB_INSTRUCTIONS)
    chance = random.Random(2003)

    def sample() -> float:
        moment = timeline.start + chance.randrange(SCRUB_INSTRUCTIONS)
        begin = time.perf_counter_ns()
        timeline.seek(moment)
        return (time.perf_counter_ns() - begin) / 1e6

    return sample


def scrub() -> Sample:
    """Milliseconds from anywhere to anywhere in a run of 100 million instructions of sixteen domains.

    The moments are random, with a fixed seed.  Each domain stores to 16 pages and yields every 8,000 instructions.
    """
    return _seeks()


def scrub_worst() -> Sample:
    """The longest of forty of these, as one sample."""
    seek = _seeks()
    return lambda: max(seek() for _ in range(SCRUB_SEEKS))


def recording() -> Sample:
    """Speed of these sixteen domains with a timeline, as a part of their speed with a trace alone.

    Each sample runs both for five million instructions more; CPU time.
    """
    alone, timeline = wanderers(), Timeline(wanderers())
    alone.trace = Trace(None)

    def sample() -> float:
        begin = clock_ns()
        alone.run(RECORDED_INSTRUCTIONS)
        middle = clock_ns()
        timeline.run(RECORDED_INSTRUCTIONS)
        return (middle - begin) / (clock_ns() - middle)

    return sample
