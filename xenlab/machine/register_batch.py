"""Many registers in one call: Unicorn's batch interface over buffers that are made once."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

from unicorn.unicorn_py3.unicorn import uclib

from xenlab.errors import MachineError
from xenlab.machine.engine import Engine


class RegisterBatch:
    """A fixed list of registers of one engine.

    Args:
        engine: whose.
        registers: Unicorn's number and the size in bytes of each, at most 16.
    """

    SLOT = 16

    def __init__(self, engine: Engine, registers: Sequence[tuple[int, int]]) -> None:
        self._handle = ctypes.c_void_p(engine.handle)
        self._count = count = len(registers)
        self._numbers = (ctypes.c_int * count)(*(number for number, _size in registers))
        self._buffer = (ctypes.c_ubyte * (self.SLOT * count))()
        start = ctypes.addressof(self._buffer)
        self._slots = (ctypes.c_void_p * count)(*(start + self.SLOT * index for index in range(count)))
        self._words = memoryview(self._buffer).cast("B").cast("I")

    def read(self) -> bytes:
        """All values, each at the start of its 16 bytes."""
        self._call(uclib.uc_reg_read_batch)
        return bytes(self._buffer)

    def read_integers(self) -> list[int]:
        """All values as 32-bit numbers."""
        self._call(uclib.uc_reg_read_batch)
        return self._words[:: self.SLOT // 4].tolist()

    def write(self, values: bytes) -> None:
        """Set all registers from what `read` gave."""
        ctypes.memmove(self._buffer, values, len(self._buffer))
        self._call(uclib.uc_reg_write_batch)

    def _call(self, function: Callable[..., int]) -> None:
        status = function(self._handle, self._numbers, self._slots, self._count)
        if status:
            raise MachineError(f"{self._count} registers at once: Unicorn answered error {status}")
