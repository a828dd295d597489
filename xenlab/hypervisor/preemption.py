"""Long calls are made in parts (paper 3.1).

The problem: while a hypercall works, nobody else runs.  A guest that pins a tree of a thousand page tables,
or sends four thousand calls as one, would hold the machine as long as it likes.

The idea, Xen's: each call has an allowance.  When that is used up, the call writes down how far it
came, in the guest's own registers, and sets the guest's EIP back to the instruction that made the call.  So the
guest makes the call again, with what is left of it as its arguments, and between the two anything may happen
that may happen between two instructions.

The invariant: a call that was interrupted has done a first part of its work completely, and nothing of the
rest.  What breaks without it: other domains wait, or see half a change.
"""

from __future__ import annotations

from xenlab.machine.state import CpuState

# What one call may do, in units of about a microsecond; and what things cost.
ALLOWANCE, TABLE_COST, BATCHED_CALL_COST, UPDATE_COST = 8192, 32, 8, 2
# For work that is nobody's call, such as building a domain.
NO_LIMIT = 1 << 60
_CALL_BYTES = 2  # int 0x82


class Preempted(Exception):
    """A piece of work inside a call was interrupted; it goes on when it is asked for again."""


class Continuation(Exception):
    """The whole call has to be made again.

    Attributes:
        registers: the arguments that differ then, by register.
    """

    def __init__(self, **registers: int) -> None:
        self.registers = registers
        super().__init__()

    def rewind(self, state: CpuState) -> None:
        """Let the guest execute its hypercall instruction once more."""
        for name, value in self.registers.items():
            setattr(state, name, value & 0xFFFF_FFFF)
        state.eip = state.eip - _CALL_BYTES & 0xFFFF_FFFF


class Allowance:
    """What the call in progress may still do.

    Attributes:
        left: in the units of `ALLOWANCE`; not above 0 when it is used up.
        shared: while a batch of calls shares one allowance.
    """

    __slots__ = ("left", "shared")

    def __init__(self) -> None:
        self.left = NO_LIMIT
        self.shared = False

    def begin(self) -> None:
        """A call begins."""
        if not self.shared:
            self.left = ALLOWANCE

    def unlimited(self) -> None:
        """What follows is nobody's call."""
        self.left = NO_LIMIT
