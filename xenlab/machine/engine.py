"""libunicorn through ctypes: the few calls that a trap needs, without the binding's overhead.

The problem: the Python binding of Unicorn wraps each callback and each register access in
checks and conversions that cost several times the call itself.  A trap is the hypervisor's
unit of work, so the calls that one trap makes are bound here by hand, once.  Everything
that is not on that path goes through the binding.

The invariant: an exception never crosses from Python into libunicorn, where ctypes would
swallow it.  `Cpu` catches it in the callback, stops the engine and raises it again outside.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import unicorn
from unicorn import x86_const as x86
from unicorn.unicorn_py3.unicorn import uclib

from xenlab.errors import MachineError
from xenlab.machine.memory import Memory

ENGINE_VERSION = "2.1.4"
# Bytes for translated code; all is forgotten when it is full.  The library's own choice is 1 GiB, which a
# guest that keeps changing its code fills within seconds.
TRANSLATIONS = 64 << 20

_ptr = ctypes.c_void_p
INTERRUPT_CALLBACK = ctypes.CFUNCTYPE(None, _ptr, ctypes.c_uint32, _ptr)
INVALID_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, _ptr, _ptr)
CODE_CALLBACK = ctypes.CFUNCTYPE(None, _ptr, ctypes.c_uint64, ctypes.c_uint32, _ptr)
MEMORY_CALLBACK = ctypes.CFUNCTYPE(None, _ptr, ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_int64, _ptr)

GENERAL = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")
SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")
REGISTER_IDS: dict[str, int] = {
    name: getattr(x86, f"UC_X86_REG_{name.upper()}")
    for name in (*GENERAL, *SEGMENTS, "eip", "eflags", "cr0", "cr2", "cr3", "cr4")
}


def _function(name: str, *arguments: Any) -> Callable[..., int]:
    prototype = ctypes.CFUNCTYPE(ctypes.c_int, *arguments)
    function: Callable[..., int] = prototype((name, uclib))
    return function


# Bound without converters and without giving up the GIL: a call costs half as much, and
# these are made on every trap or every switch.
_direct = ctypes.PyDLL(uclib._name)
_direct_save, _direct_restore = _direct["uc_context_save"], _direct["uc_context_restore"]
_direct_reg_read, _direct_reg_write = _direct["uc_reg_read"], _direct["uc_reg_write"]
_direct_control = _direct["uc_ctl"]
_direct_control.argtypes = (_ptr, ctypes.c_uint32)  # those behind them are variadic
_REMOVE_CACHE = unicorn.UC_CTL_IO_WRITE << 30 | 2 << 26 | unicorn.UC_CTL_TB_REMOVE_CACHE

context_reg_read = _function("uc_context_reg_read", _ptr, ctypes.c_int, _ptr)
context_reg_write = _function("uc_context_reg_write", _ptr, ctypes.c_int, _ptr)
# A run keeps the GIL: taking it back on every trap costs a tenth of the trap, and far more
# when another thread wants it.  Runs are slices of some milliseconds.
_emu_start = _direct["uc_emu_start"]
_emu_start.argtypes = (_ptr, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t)
_emu_stop = _function("uc_emu_stop", _ptr)
_mem_map_ptr = _function("uc_mem_map_ptr", _ptr, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_uint32, _ptr)
_hook_add = _function(
    "uc_hook_add", _ptr, ctypes.POINTER(ctypes.c_size_t), ctypes.c_int, _ptr, _ptr, ctypes.c_uint64, ctypes.c_uint64
)
_hook_del = _function("uc_hook_del", _ptr, ctypes.c_size_t)


class Engine:
    """One Unicorn x86 CPU in 32-bit mode over a `Memory`, with no policy of its own.

    Attributes:
        uc: the binding's object, for everything that is not on a trap's path.
        handle: the ``uc_engine`` pointer as an integer.
        cr3, load_cr3: the two steps of `write_cr3`, for where a call is too much: one number, and what makes it CR3.

    Raises:
        MachineError: when libunicorn refuses the memory or is of another version.
    """

    def __init__(self, memory: Memory) -> None:
        found = ".".join(str(part) for part in unicorn.uc_version()[:2])
        if not ENGINE_VERSION.startswith(found):
            raise MachineError(f"Unicorn: expected version {ENGINE_VERSION}, found {found}")
        self.memory = memory
        self.uc: Any = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_32)
        # Core 2 Duo: it has NX, and RDRAND is an invalid opcode on it instead of a source of chance.
        self.uc.ctl_set_cpu_model(x86.UC_CPU_X86_CORE2DUO)
        self.uc.ctl_set_tcg_buffer_size(TRANSLATIONS)
        self.handle: int = self.uc._uch.value
        status = _mem_map_ptr(self.handle, 0, memory.size, unicorn.UC_PROT_ALL, memory.host_address)
        if status:
            raise MachineError(f"machine memory of {memory.size:#x} bytes: Unicorn answered error {status}")
        # With an exit list, and an empty one, no address is special: see tests/emulator.
        self.uc.ctl_exits_enabled(True)
        self.uc.ctl_set_exits([])
        self._callbacks: list[Any] = []
        self._value = ctypes.c_uint64()
        self._write = partial(_direct_reg_write, _ptr(self.handle))
        value = ctypes.c_uint64()
        self.cr3 = memoryview(value).cast("B").cast("Q")
        number, buffer = ctypes.c_int(REGISTER_IDS["cr3"]), _ptr(ctypes.addressof(value))
        self.load_cr3 = partial(_direct_reg_write, _ptr(self.handle), number, buffer)
        self._flags = ctypes.c_uint64()
        number, buffer = ctypes.c_int(REGISTER_IDS["eflags"]), _ptr(ctypes.addressof(self._flags))
        self._read_flags = partial(_direct_reg_read, _ptr(self.handle), number, buffer)

    def start(self, eip: int, count: int) -> int:
        """Run from ``eip`` for at most ``count`` instructions; the status that Unicorn returns."""
        status: int = _emu_start(self.handle, eip, 0, 0, count)
        return status

    def stop(self) -> None:
        """End the run in progress; meant for callbacks."""
        _emu_stop(self.handle)

    def on_interrupt(self, function: Callable[[int, int, int], None]) -> None:
        """Call ``function(_, vector, _)`` for each exception and software interrupt."""
        self._raw_hook(unicorn.UC_HOOK_INTR, INTERRUPT_CALLBACK(function))

    def on_invalid(self, function: Callable[[int, int], bool]) -> None:
        """Call ``function(_, _)`` for each invalid opcode; true means: go on where EIP now points."""
        self._raw_hook(unicorn.UC_HOOK_INSN_INVALID, INVALID_CALLBACK(function))

    def on_instruction(self, instruction: int, function: Callable[..., Any]) -> None:
        """Call ``function`` for one of the instructions that Unicorn lets a hook replace."""
        self.uc.hook_add(unicorn.UC_HOOK_INSN, function, None, 1, 0, instruction)

    def on_code(self, function: Callable[[int, int, int, int], None]) -> None:
        """Call ``function(_, linear address, length, _)`` before each instruction."""
        self._raw_hook(unicorn.UC_HOOK_CODE, CODE_CALLBACK(function))

    def observe(
        self, begun: Callable[[int, int, int, int], None], accessed: Callable[[int, int, int, int, int, int], None]
    ) -> Callable[[], None]:
        """Have each instruction and each access to memory reported, which makes both many times slower.

        Args:
            begun: called as ``begun(_, linear address, length, _)``; the length of an invalid opcode is a huge number.
            accessed: called as ``accessed(_, kind, machine address, size, _, _)`` with Unicorn's kind.

        Returns:
            What ends it.  Neither is to be called during a run; the TLB keeps its entries.
        """
        both = unicorn.UC_HOOK_MEM_READ | unicorn.UC_HOOK_MEM_WRITE
        callbacks = {unicorn.UC_HOOK_CODE: CODE_CALLBACK(begun), both: MEMORY_CALLBACK(accessed)}
        hooks = {self._hook(kind, callback): callback for kind, callback in callbacks.items()}
        self.uc.ctl_flush_tb()  # code that is already translated would not report

        def end() -> None:
            self._end_hooks(hooks)
            self.uc.ctl_flush_tb()

        return end

    def observe_stores(
        self, begin: int, end: int, stored: Callable[[int, int, int, int, int, int], None]
    ) -> Callable[[], None]:
        """Have each store to machine addresses from ``begin`` up to ``end`` reported, before it is done.

        A run is hardly slower for it.  One that begins below ``begin``, in the page before, is not reported.

        Args:
            stored: called as ``stored(_, kind, machine address, size, value, _)``.

        Returns:
            What ends it.  Neither is to be called during a run.
        """
        callback = MEMORY_CALLBACK(stored)
        hook = self._hook(unicorn.UC_HOOK_MEM_WRITE, callback, begin, end - 1)
        self.uc.ctl_flush_tb()  # code that is already translated need not report

        def finish(_kept: Any = callback) -> None:
            self._end_hooks([hook])

        return finish

    def _end_hooks(self, hooks: Iterable[int]) -> None:
        # The library looks for the code of a hook by the current tables, and leaves the page faults of that behind.
        before = Context(self)
        for hook in hooks:
            _hook_del(self.handle, hook)
        before.resume()

    def write(self, register: str, value: int) -> None:
        """Set a register by name.  Raises UcError when the library refuses the value."""
        self._value.value = value
        if status := self._write(REGISTER_IDS[register], ctypes.byref(self._value)):
            raise unicorn.UcError(status)

    def forget_code(self, begin: int, end: int) -> None:
        """Drop what was translated from the code at these addresses, which the current tables translate."""
        bounds = ctypes.c_uint64(begin), ctypes.c_uint64(end)
        if status := _direct_control(self.handle, _REMOVE_CACHE, *bounds):
            raise unicorn.UcError(status)

    def write_cr3(self, value: int) -> None:
        """Set CR3, which empties the TLB."""
        self.cr3[0] = value
        self.load_cr3()

    def eflags(self) -> int:
        """The flags, whatever form they are kept in."""
        self._read_flags()
        return self._flags.value & 0xFFFF_FFFF

    def read(self, register: str) -> int:
        """Read a register by name through the public API."""
        value: int = self.uc.reg_read(REGISTER_IDS[register])
        return value

    def _raw_hook(self, kind: int, callback: Any) -> None:
        self._hook(kind, callback)
        self._callbacks.append(callback)

    def _hook(self, kind: int, callback: Any, begin: int = 1, end: int = 0) -> int:
        # Hooks with begin > end apply to every address.
        hook = ctypes.c_size_t()
        status = _hook_add(self.handle, ctypes.byref(hook), kind, ctypes.cast(callback, _ptr), None, begin, end)
        if status:
            raise MachineError(f"Unicorn refused a hook of kind {kind}: error {status}")
        return hook.value


class Context:
    """A saved CPU context: Unicorn's own copy of its whole x86 state.

    Attributes:
        pointer: the ``uc_context`` pointer as an integer.
        raw: the context's bytes, writable in place while the `Context` lives.
        capture: copy the engine's state into this context.
        resume: make this context the engine's state.
    """

    capture: Callable[[], int]
    resume: Callable[[], int]

    def __init__(self, engine: Engine) -> None:
        # Restoring a context that was never saved aborts the process, so one is saved at once.
        self._owner = engine.uc.context_save()
        self.pointer: int = ctypes.cast(self._owner.context, _ptr).value or 0
        self.raw = memoryview((ctypes.c_ubyte * self._owner.size).from_address(self.pointer)).cast("B")
        handle, pointer = _ptr(engine.handle), _ptr(self.pointer)
        self.capture = partial(_direct_save, handle, pointer)
        self.resume = partial(_direct_restore, handle, pointer)

    def eflags(self) -> int:
        """The flags of the saved state, whatever form they are kept in."""
        return self.read("eflags")

    def read(self, register: str) -> int:
        """Read a register of the saved state through the public API."""
        value = ctypes.c_uint64()
        context_reg_read(self.pointer, REGISTER_IDS[register], ctypes.byref(value))
        return value.value & 0xFFFF_FFFF

    def floating_point(self) -> dict[str, int]:
        """The x87 and SSE registers of the saved state, by name."""
        values = {}
        for name, (identifier, size) in FLOATING_POINT.items():
            buffer = (ctypes.c_ubyte * 16)()
            context_reg_read(self.pointer, identifier, buffer)
            values[name] = int.from_bytes(bytes(buffer)[:size], "little")
        return values

    def set_floating_point(self, values: Mapping[str, int]) -> None:
        """Set x87 and SSE registers of the saved state, in the order of ``values``."""
        for name, value in values.items():
            identifier, size = FLOATING_POINT[name]
            buffer = (ctypes.c_ubyte * 16).from_buffer_copy(value.to_bytes(size, "little").ljust(16, b"\0"))
            context_reg_write(self.pointer, identifier, buffer)


FLOATING_POINT: dict[str, tuple[int, int]] = {
    **{f"st{n}": (getattr(x86, f"UC_X86_REG_ST{n}"), 10) for n in range(8)},
    **{f"xmm{n}": (getattr(x86, f"UC_X86_REG_XMM{n}"), 16) for n in range(8)},
    **{f"fp{word}": (getattr(x86, f"UC_X86_REG_FP{word.upper()}"), 2) for word in ("cw", "sw", "tag")},
    "mxcsr": (x86.UC_X86_REG_MXCSR, 4),
}
