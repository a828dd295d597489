"""One number for a whole machine: equal machines, equal hashes, on every host.

The problem: to say that N steps forward and N back lead to the same machine one has to
compare all of it: registers, memory, and what the hypervisor knows.

The invariant: the hash is made of what a guest or a student could observe and of nothing
else.  The raw context of the emulator is no part of it, because it depends on how a run was
cut into slices (lazy flags), and neither is the order in which Python keeps a set.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from enum import Enum
from hashlib import blake2b
from typing import Any

from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.frames import FREE

_PLAIN = (int, float, str, bytes, Enum, type(None))


def machine_hash(hypervisor: Hypervisor) -> str:
    """Hex digest over registers, memory, consoles, schedulers and the owners of frames."""
    digest = blake2b(digest_size=16)
    for part in _state(hypervisor):
        digest.update(_encode(part))
    for mfn, owner in enumerate(hypervisor.frames.owner):
        if owner != FREE:
            digest.update(hypervisor.memory.frame(mfn))
    return digest.hexdigest()


def _state(hypervisor: Hypervisor) -> Iterator[Any]:
    saved = hypervisor.snapshot()
    for name in ("time", "current", "slice", "parts", "inputs", "shared", "tables", "clocks", "timers"):
        yield saved[name]
    for name, column in saved["frames"].items():
        if name != "left":  # in flushes of the TLB, which replays have more of
            yield array("i", column).tobytes()
    for domid, domain in sorted(hypervisor.domains.items()):
        state = saved["states"][domid]
        yield domid, domain.name, domain.privileged, domain.own_tables, domain.shared_info_mfn
        yield state["memory"], state["console"], state["ports"], state["services"], domain.shutdown
        for vcpu, virtual in zip(domain.vcpus, state["vcpus"], strict=True):
            yield vcpu.key, vcpu.state.architectural()
            yield {name: value for name, value in virtual.items() if name != "registers"}


def _encode(value: Any) -> bytes:
    """Plain data as bytes that do not depend on identities or on hash seeds."""
    if isinstance(value, _PLAIN):
        return repr(value).encode()
    if isinstance(value, Mapping):
        pairs = sorted((_encode(key), _encode(item)) for key, item in value.items())
        return b"{" + b",".join(key + b":" + item for key, item in pairs) + b"}"
    if isinstance(value, set | frozenset):
        return b"{" + b",".join(sorted(map(_encode, value))) + b"}"
    try:
        return b"[" + b",".join(map(_encode, value)) + b"]"
    except TypeError:
        # Dataclasses such as Gate, and a student's own objects.
        names = getattr(value, "__slots__", None) or sorted(vars(value))
        content = {name: getattr(value, name) for name in names if not name.startswith("__")}
        return type(value).__name__.encode() + _encode(content)
