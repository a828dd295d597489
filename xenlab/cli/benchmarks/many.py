"""Benchmarks of many domains, and of the events by which they hear of each other (paper 3.1, 3.3.1, 4.5)."""

from __future__ import annotations

import gc
import time

from xenlab.cli.benchmarks import Sample
from xenlab.cli.benchmarks.floor import clock_ns
from xenlab.cli.benchmarks.guests import YIELD, YIELD_INSTRUCTIONS, hypervisor_with
from xenlab.errors import XenlabError
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.schedulers import Bvt, RoundRobin, Scheduler
from xenlab.labs.crowd import Crowd
from xenlab.labs.many_domains import race
from xenlab.machine.machine import Machine
from xenlab.toolstack import Image, boot, image_from_source

DOMAINS = 128
ROUNDS = 2048
# A MiB for each, and some for what the hypervisor keeps for it.
_MACHINE_MIB = DOMAINS + 4
_ENOUGH = 1_000 * DOMAINS

# Sends itself an event, which it takes at once.
UPCALL = """
start: mov byte ptr [shared_info + 1], 1
    mov edx, FLAT_RING1_CS
    mov esi, offset callback
    mov ebx, FLAT_RING1_CS
    mov ecx, offset callback
    mov eax, __HYPERVISOR_set_callbacks
    int 0x82
    mov ebx, EVTCHNOP_bind_ipi
    mov ecx, offset bind
    mov eax, __HYPERVISOR_event_channel_op
    int 0x82
    mov byte ptr [shared_info + 1], 0
    mov edi, offset shared_info
again: mov ebx, EVTCHNOP_send
    mov ecx, offset port
    mov eax, __HYPERVISOR_event_channel_op
    int 0x82
    jmp again
callback: mov dword ptr [edi + 2048], 0     # what is pending, where, and whether at all
    mov dword ptr [edi + 4], 0
    mov word ptr [edi], 0                   # with the mask
    iret
    .align 4
bind: .long 0
port: .long 0
"""
UPCALL_INSTRUCTIONS = 9

GREETS = """
start: mov ebx, CONSOLEIO_write
    mov ecx, length
    mov edx, offset message
    mov eax, __HYPERVISOR_console_io
    int 0x82
    mov ebx, SCHEDOP_block
    mov eax, __HYPERVISOR_sched_op
    int 0x82
message: .ascii "hello\\n"
length = . - message
"""


def _per_round(xen: Hypervisor, instructions: int) -> Sample:
    def sample() -> float:
        begin = clock_ns()
        xen.run(ROUNDS * instructions)
        return (clock_ns() - begin) / ROUNDS

    return sample


def event_upcall() -> Sample:
    """An event that a domain sends itself through an IPI port: the hypercall, the upcall behind it, the way back.

    A round is nine instructions: three that load the arguments, ``int 0x82``, three stores in the callback that clear
    pending bit, selector, upcall and mask, ``iret``, which the CPU does alone, and ``jmp``.
    """
    return _per_round(hypervisor_with(UPCALL), UPCALL_INSTRUCTIONS)


def switching(scheduler: Scheduler, count: int = DOMAINS) -> Hypervisor:
    """A machine with so many domains that do nothing but yield; all have begun."""
    xen = Hypervisor(Machine(count + 4), scheduler=scheduler)
    image = image_from_source(YIELD, "yields")
    for _ in range(count):
        boot(xen, image)
    xen.run(4 * count * YIELD_INSTRUCTIONS)
    return xen


def domain_switch_128() -> Sample:
    """The same as ``domain_switch`` among 128 domains, by turns too.

    Each has code, page tables and stack in frames of its own, so that the host's caches hold little of the next one.
    """
    return _per_round(switching(RoundRobin()), YIELD_INSTRUCTIONS)


def domain_switch_bvt() -> Sample:
    """The same among 128 domains under Borrowed Virtual Time, which reckons with clocks at each switch."""
    return _per_round(switching(Bvt()), YIELD_INSTRUCTIONS)


def all_greet(image: Image) -> Hypervisor:
    """A new machine with 128 domains from ``image``, run until each has written its line.

    Raises:
        XenlabError: one has not.
    """
    xen = Hypervisor(Machine(_MACHINE_MIB), scheduler=Bvt())
    domains = [boot(xen, image) for _ in range(DOMAINS)]
    xen.run(_ENOUGH)
    silent = [domain.domid for domain in domains if domain.console != "hello\n"]
    if silent:
        raise XenlabError(f"benchmark domains_128_boot: no line from the domains {silent}")
    return xen


def domains_128_boot() -> Sample:
    """Seconds from power-on of a machine until 128 domains are built and have written their first console line.

    The image is assembled before; each domain has 1 MiB and page tables of its own, which are checked.
    """
    image = image_from_source(GREETS, "greets")

    def sample() -> float:
        gc.collect()
        begin = time.perf_counter()
        all_greet(image)
        return time.perf_counter() - begin

    return sample


def _throughput(slice_ms: float) -> Sample:
    crowds = [Crowd(1), Crowd(DOMAINS)]
    return lambda: race(crowds, slice_ms, repeats=1)[1].against_one


def domains_128_throughput() -> Sample:
    """Work of 128 domains that compute in a second of the host, divided by that of one; turns of 5 simulated ms.

    One and 128 run by turns, 128 ms of simulated time each; see `xenlab.labs.many_domains`.
    """
    return _throughput(5)


def domains_128_throughput_50() -> Sample:
    """The same with turns of 50 ms."""
    return _throughput(50)
