"""What the control domain's tools may set of a scheduler while domains run (paper 2.3, 3.3.1).

The problem: how much of the CPU a domain gets is policy, and policy belongs to the tools, not to the hypervisor.

The invariant: a change is taken over as a whole or not at all.  What breaks without it: a typing error in the
second number leaves the first one set, and nobody knows by which rule the machine runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xenlab.errors import ScheduleError

# Xen's.  A vCPU of this weight moves through virtual time as fast as through real time.
DEFAULT_WEIGHT = 256
MOST_WEIGHT = 65_535
MOST_INSTRUCTIONS = 1 << 40

Ranges = Mapping[str, tuple[int, int]]


def check_values(scheduler: object, vcpu: int, ranges: Ranges, values: Mapping[str, Any]) -> None:
    """Refuse what is not a whole number of its range.

    Raises:
        ScheduleError: an unknown name, or a value out of range.
    """
    kind = type(scheduler).__name__
    for name, value in values.items():
        if name not in ranges:
            raise ScheduleError(f"{kind} has no parameter {name!r}; it has {', '.join(ranges)}")
        least, most = ranges[name]
        if type(value) is not int or not least <= value <= most:
            raise ScheduleError(
                f"{kind}, {name} of vCPU {vcpu}: expected a whole number from {least} to {most}, found {value!r:.80}"
            )


def known(scheduler: object, vcpus: Mapping[int, Any], vcpu: int) -> Any:
    """What ``vcpus`` holds for ``vcpu``.

    Raises:
        ScheduleError: there is no such vCPU; the message lists those that there are.
    """
    if vcpu not in vcpus:
        raise ScheduleError(f"{type(scheduler).__name__}: expected one of vCPUs {sorted(vcpus)}, found {vcpu!r:.80}")
    return vcpus[vcpu]
