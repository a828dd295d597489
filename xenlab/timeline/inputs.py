"""What the control domain's tools do while a timeline is attached: building and destroying domains.

The problem: a replay builds a domain again where the run built it.  So the order to build is
an input like a key stroke, stamped with its time and repeated at the same instruction.

The invariant: applying such an input depends on nothing but the machine it is applied to.
What breaks without it: the second time the new domain gets other frames, and every page
table differs.  For the same reason a domain is looked up by its id after a replay: it was
built anew, as another object.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from xenlab.errors import XenlabError
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.trace import NO_DOMAIN, Kind
from xenlab.toolstack import Image, boot


@dataclass(frozen=True, slots=True)
class Boot:
    """Build a domain from ``image`` and let it run; the arguments are those of `toolstack.boot`.

    For assembly source: ``Boot(image_from_source(source, name))``.  An image that does not fit
    when its time comes leaves an event with the reason and no domain.
    """

    image: Image = field(repr=False)
    memory_mib: int = 1
    command_line: str = ""

    def apply(self, hypervisor: Hypervisor) -> None:
        """Do it."""
        try:
            boot(hypervisor, self.image, memory_mib=self.memory_mib, command_line=self.command_line)
        except XenlabError as problem:
            hypervisor.record(Kind.DOMAIN, NO_DOMAIN, f"not built: {problem}")


@dataclass(frozen=True, slots=True)
class Destroy:
    """End the domain ``domid`` and take back its memory; nothing if there is none."""

    domid: int

    def apply(self, hypervisor: Hypervisor) -> None:
        """Do it."""
        domain = hypervisor.domains.get(self.domid)
        if domain is not None:
            hypervisor.destroy(domain)
