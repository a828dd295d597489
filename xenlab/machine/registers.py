"""Where the engine keeps the registers of the CPU that runs.

The problem: Unicorn lends its CPU's state as a copy, by ``uc_context_save``, and takes one back.  Two copies of
5,600 bytes took a third of a trap, and mostly nobody wants any of it but a few words.

The idea: the engine's own structure is read and written where it stands; `layout` has found the pointer to it.  In a
hook for interrupts and between runs nothing of it is held elsewhere.  Of those 5,600 bytes a guest can change the
first 1,300; so many are copied when another vCPU runs.

Where it is not found in an engine, that one is driven through the public API alone (`portable`).

The invariant: what a guest can change and later observe lies within these.  What breaks without it: one guest sees
another's registers.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Mapping
from functools import partial

from xenlab.machine import layout as at
from xenlab.machine.engine import Context, Engine

# Eight general registers, EIP, and the hidden flags, whose two lowest bits are the ring.
_FRAME = struct.Struct(f"<{8 * 'I4x'}64xI{at.HFLAGS - at.EIP - 4}xI")
_SELECTORS = struct.Struct("<" + 6 * f"I{at.SEGMENT_STRIDE - 4}x")
# ESP, EIP, flags, condition codes, how they are kept, direction, hidden flags, and the selectors in CS and SS.
_INTERRUPTED = struct.Struct("<32xI92xI4xI4x8xI4x8xIII28xI20xI")
_EXCEPTION = struct.Struct("<III")

# The registers at one place, ready for what traps do most: all bytes that a guest can change, from EAX on; the same
# as 32-bit words; and `CpuState.frame`, `set_eax`, `selectors` and what `interrupted` unpacks, bound to them.
View = tuple[
    memoryview,
    memoryview,
    Callable[[], tuple[int, ...]],
    Callable[[int], None],
    Callable[[], tuple[int, ...]],
    Callable[[], tuple[int, ...]],
]


def view_over(raw: memoryview) -> View:
    """A view over these bytes."""
    words = raw.cast("I")
    return (
        raw,
        words,
        partial(_FRAME.unpack_from, raw),
        partial(words.__setitem__, 0),
        partial(_SELECTORS.unpack_from, raw, at.SEGMENT_CACHES),
        partial(_INTERRUPTED.unpack_from, raw),
    )


class EngineRegisters:
    """The registers of the CPU that runs, in place.

    Raises:
        ProbeError: they are not found.

    Attributes:
        all: everything that a context has of it, from EAX on.
        view: what a guest can change.
        exception: gives error code; 1 after INT n, INT3 and INTO; and the EIP behind such an instruction.
        old_exception: the vector being delivered, -1 for none: one number.
    """

    def __init__(self, engine: Engine, layout: at.Layout) -> None:
        self._scratch = Context(engine)
        address = at.running_registers(engine, layout)
        self._scratch.resume()
        size = len(self._scratch.raw) - layout.general
        self.all = memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")
        self.view = view_over(self.all[: layout.span])
        self._copy = self._scratch.raw[layout.general : layout.general + layout.span]
        self.exception = partial(_EXCEPTION.unpack_from, self.all, layout.error_code - layout.general)
        old = layout.old_exception - layout.general
        self.old_exception = self.all[old : old + 4].cast("i")
        # It also keeps the engine, whose memory all this is.
        self.eflags = engine.eflags

    def eflags_of(self, raw: memoryview) -> int:
        """The flags of a copy, whatever form they are kept in."""
        self._copy[:] = raw
        return self._scratch.eflags()

    def floating_point_of(self, raw: memoryview) -> dict[str, int]:
        """The x87 and SSE registers of a copy, by name."""
        self._copy[:] = raw
        return self._scratch.floating_point()

    def set_floating_point_of(self, raw: memoryview, values: Mapping[str, int]) -> None:
        """Set x87 and SSE registers of a copy, in the order of ``values``."""
        self._copy[:] = raw
        self._scratch.set_floating_point(values)
        raw[:] = self._copy
