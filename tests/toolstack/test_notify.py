"""Events from outside: only what the domain could have sent itself, and nothing where there is nobody."""

from __future__ import annotations

from xenlab import Hypervisor, Machine, boot
from xenlab.abi.numbers import EvtchnStatus
from xenlab.hypervisor.domain import Port
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.toolstack.notify import Notify


def test_only_ports_that_can_send() -> None:
    xen = Hypervisor(Machine(4), trace=Trace())
    domain = boot(xen, "start: jmp start")
    domain.ports[1] = Port(EvtchnStatus.IPI)
    pending = xen.memory.words[(domain.shared_info_mfn << 10) + 512 :]
    for item in (Notify(7, 1), Notify(0, 2), Notify(0, 5000)):
        xen.submit(item)
    xen.run(100)
    assert pending[0] == 0
    xen.submit(Notify(0, 1))
    xen.run(100)
    assert pending[0] == 1 << 1
    assert xen.trace is not None
    told = [event.change for event in xen.trace.events(Kind.DOMAIN) if event.change.startswith("not sent")]
    assert told == ["not sent through port 2: errno 22", "not sent through port 5000: errno 22"]
