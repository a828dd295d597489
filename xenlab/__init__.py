"""xenlab: a small x86 hypervisor to learn from, after "Xen and the Art of Virtualization".

from xenlab import Hypervisor, boot

xen = Hypervisor()
guest = boot(xen, source)
xen.run(1_000_000)
print(guest.console)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xenlab.errors import (
        AssemblyError,
        GuestCrashed,
        HypercallError,
        ImageError,
        MachineError,
        TimelineError,
        XenlabError,
    )
    from xenlab.hypervisor.core import Hypervisor
    from xenlab.machine.assembler import assemble
    from xenlab.machine.machine import Machine
    from xenlab.toolstack import boot

__version__ = "0.1.0"

_HOME = {
    "Hypervisor": "xenlab.hypervisor.core",
    "Machine": "xenlab.machine.machine",
    "assemble": "xenlab.machine.assembler",
    "boot": "xenlab.toolstack",
    **dict.fromkeys(
        (
            "AssemblyError",
            "GuestCrashed",
            "HypercallError",
            "ImageError",
            "MachineError",
            "TimelineError",
            "XenlabError",
        ),
        "xenlab.errors",
    ),
}

__all__ = [
    "AssemblyError",
    "GuestCrashed",
    "HypercallError",
    "Hypervisor",
    "ImageError",
    "Machine",
    "MachineError",
    "TimelineError",
    "XenlabError",
    "assemble",
    "boot",
]


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that importing one part does not pay for the others.
    if name not in _HOME:
        raise AttributeError(f"module 'xenlab' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
