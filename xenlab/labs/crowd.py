"""A machine with many domains that compute, one that waits, and a control domain that asks them (paper 4.5).

Every guest but the control domain takes events and answers each one at once, through the channel on which it came:
those that compute in the middle of their work, the one that waits by waking up, answering and falling asleep again.
What an event from outside takes from its sending to its answer is so what a ping takes on a network, without the
network.

The control domain binds a channel to each of them, its port ``n`` to domain ``n``, masks all its ports and sleeps.
So it takes no time from the others, and `Notify` has somebody to send in whose name.

The invariant: once a `Crowd` is made, all have done what they do at their start, and only compute and wait.  What
breaks without it: the first slice of a measurement is one of starting guests and of translating code.
"""

from __future__ import annotations

from copy import deepcopy

from xenlab.errors import ScheduleError, XenlabError
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.schedulers import RoundRobin, Scheduler, Tunable
from xenlab.hypervisor.trace import Trace
from xenlab.machine.machine import Machine
from xenlab.toolstack import boot, image_from_source
from xenlab.toolstack.notify import Notify
from xenlab.toolstack.schedule import SetSchedule, SetScheduler

MOST_DOMAINS = 500
# A unit of work: 1,024 times round the inner loop, and three more to count it.
UNIT_INSTRUCTIONS = 1024 * 8 + 3
_START_SLICE = 2_000
_MIB_FRAMES = 256

_CONTROL = """
start:  mov byte ptr [shared_info + 1], 1
        mov edi, offset shared_info + 2176      # the mask: nobody disturbs this domain
        mov eax, -1
        mov ecx, 32
        rep stosd
        mov ebp, 1
next:   mov [bind], ebp
        mov dword ptr [bind + 4], 1
        mov ebx, EVTCHNOP_bind_interdomain
        mov ecx, offset bind
        mov eax, __HYPERVISOR_event_channel_op
        int 0x82
        test eax, eax
        jnz not_yet
        inc ebp
        cmp ebp, {count}
        jbe next
sleep:  mov ebx, SCHEDOP_block
        mov eax, __HYPERVISOR_sched_op
        int 0x82
        jmp sleep
not_yet: mov ebx, SCHEDOP_yield
        mov eax, __HYPERVISOR_sched_op
        int 0x82
        jmp next
        .align 4
bind:   .long 0, 0, 0
"""
# Makes a port for the control domain, its first one, and answers each event that comes there.
_ANSWERS = """
start:  mov byte ptr [shared_info + 1], 1
        mov edx, FLAT_RING1_CS
        mov esi, offset callback
        mov ebx, FLAT_RING1_CS
        mov ecx, offset callback
        mov eax, __HYPERVISOR_set_callbacks
        int 0x82
        mov ebx, EVTCHNOP_alloc_unbound
        mov ecx, offset unbound
        mov eax, __HYPERVISOR_event_channel_op
        int 0x82
        mov byte ptr [shared_info + 1], 0
{body}
callback:
        push eax
        push ebx
        push ecx
        mov byte ptr [shared_info], 0
        mov dword ptr [shared_info + 4], 0
        mov dword ptr [shared_info + 2048], 0
        inc dword ptr [answers]
        mov ebx, EVTCHNOP_send
        mov ecx, offset port
        mov eax, __HYPERVISOR_event_channel_op
        int 0x82
        pop ecx
        pop ebx
        pop eax
        jmp hypercall_page + 32 * __HYPERVISOR_iret
        .align 4
unbound: .short DOMID_SELF, 0
port:   .long 0                                 # the answer to the call above
answers: .long 0
done:   .long 0
buffer: .long 0
"""
_COMPUTES = """
        mov edi, offset buffer
again:  mov eax, [edi]
        add eax, ecx
        imul edx, eax, 17
        xor edx, ecx
        mov [edi], edx
        inc ecx
        test ecx, 1023
        jnz again
        ror edx, 3
        inc dword ptr [done]
        jmp again
"""
_WAITS = """
again:  mov ebx, SCHEDOP_block
        mov eax, __HYPERVISOR_sched_op
        int 0x82
        jmp again
"""


class Crowd:
    """A control domain, ``count`` domains that compute, and behind them one that waits.

    Args:
        count: how many compute, 1 to `MOST_DOMAINS`.
        traced: whether everything is recorded from here on, however much it is.

    Attributes:
        xen: the machine.
        control: domain 0.
        workers: those that compute, domains 1 to ``count``.
        idle: the one that waits.

    Raises:
        XenlabError: the count is out of range.
    """

    def __init__(self, count: int, *, traced: bool = False) -> None:
        if not 1 <= count <= MOST_DOMAINS:
            raise XenlabError(f"domains that compute: expected 1 to {MOST_DOMAINS}, found {count!r}")
        self.xen = Hypervisor(Machine(_memory_mib(count + 2)), scheduler=RoundRobin(_START_SLICE))
        self.control = boot(self.xen, _CONTROL.format(count=count + 1), name="control", privileged=True)
        computes = image_from_source(_ANSWERS.format(body=_COMPUTES), "computes")
        self.workers = [boot(self.xen, computes) for _ in range(count)]
        self.idle = boot(self.xen, _ANSWERS.format(body=_WAITS), name="waits")
        self._start(count)
        if traced:
            self.xen.trace = Trace(capacity=None)

    def _start(self, count: int) -> None:
        self.xen.run((count + 2) * _START_SLICE * 2)
        domains = (self.control, *self.workers, self.idle)
        bound = len(self.control.ports)
        if bound != count + 1 or any(domain.ended for domain in domains):
            reports = " ".join(domain.report for domain in domains if domain.report)
            raise XenlabError(f"{count + 2} domains: expected {count + 1} channels, found {bound}. {reports}")

    def schedule(self, scheduler: Scheduler, *, warp: int = 0) -> None:
        """From now on a copy of ``scheduler`` decides; the one that waits gets the ``warp``, in instructions.

        Raises:
            ScheduleError: there is a warp, and the scheduler has none.
        """
        if warp and not _has_warp(scheduler):
            raise ScheduleError(f"{type(scheduler).__name__} has no warp: expected Bvt, or a warp of 0, found {warp}")
        self.xen.submit(SetScheduler(scheduler))
        if warp:
            self.xen.submit(SetSchedule(self.idle.domid, {"warp": warp}))

    def ping(self, domain: Domain, time: int) -> None:
        """Send an event to ``domain`` at ``time``, in instructions since power-on."""
        self.xen.inputs.submit(time, Notify(self.control.domid, domain.domid))

    def done(self) -> list[int]:
        """How many units of work each of those that compute has done; see `UNIT_INSTRUCTIONS`."""
        return [self._word(domain, "done") for domain in self.workers]

    def answers(self, domain: Domain) -> int:
        """How many events ``domain`` has answered."""
        return self._word(domain, "answers")

    def _word(self, domain: Domain, name: str) -> int:
        return self.xen.guest_memory.read_word(domain.vcpus[0], domain.symbols[name])


def _has_warp(scheduler: Scheduler) -> bool:
    tried = deepcopy(scheduler)
    if not isinstance(tried, Tunable):
        return False
    tried.add(0)
    return "warp" in tried.parameters(0)


def _memory_mib(domains: int) -> int:
    """For so many domains of 1 MiB, what the hypervisor keeps for each, and what it has itself."""
    return domains + -(-2 * domains // _MIB_FRAMES) + 2
