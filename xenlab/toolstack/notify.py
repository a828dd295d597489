"""Events from outside: a packet, a finished disk request, somebody at the door (paper 3.1, 4.5).

The problem: a guest learns of what happens outside through an event channel, and the other end of that belongs to a
domain that has the device.  Where a lesson has no such driver, the world itself has to send.

The invariant: nothing is sent that the domain could not have sent itself through this port.  What breaks without it: a
guest sees events on a channel that nobody has bound.
"""

from __future__ import annotations

from dataclasses import dataclass

from xenlab.errors import HypercallError
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.trace import Kind


@dataclass(frozen=True, slots=True)
class Notify:
    """Domain ``domid`` sends an event through its ``port``, as by its own hypercall.

    Nothing happens if there is no such domain when its time comes.  A port that cannot send leaves an event in the
    trace that says so.
    """

    domid: int
    port: int

    def apply(self, hypervisor: Hypervisor) -> None:
        """Do it."""
        domain = hypervisor.domains.get(self.domid)
        if domain is None:
            return
        try:
            hypervisor.events.send(domain, self.port)
        except HypercallError as refusal:
            hypervisor.record(Kind.DOMAIN, self.domid, f"not sent through port {self.port}: errno {refusal.errno}")
