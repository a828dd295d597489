"""What a student's part decided: recorded where it runs, replayed where it is judged.

The problem: a student's code must not run in the judge's process, where it could change the
judge.  But it has to run guests.  So it runs them in a process of its own, which hands back
nothing but the values that the part returned, in order.  The judge runs the same guests with
a part that returns these values, and looks at what became of its own machine.

The invariant: a decision is plain data, and each is checked before it is used.  What breaks
without it: an object with an ``__eq__`` of its own judges itself.  A forged list of decisions is
only a list of wrong decisions.

As JSON, a decision about an instruction is ``{"refuse": true}`` or ``{"changes": {name: number}}``;
one about a hypercall is ``{"result": number, "writes": [[address, hex], ...]}``; one about types and counts of
frames is a bare number; instead of each there may be ``{"unusable": why}``.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any, Protocol

from xenlab.errors import XenlabError
from xenlab.hypervisor.emulate import Emulator, Values
from xenlab.hypervisor.hypercalls import HypercallPart

# An object, or for slots that are asked often a bare number (`page_types_slot`) or numbers (`schedules`).
Decision = dict[str, Any] | list[int] | int
Reader = Callable[[int, int], bytes | None]
_REGISTERS = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi", "eip", "eflags")
_CONTROL = ("cr0", "cr2", "cr4", "dr0", "dr1", "dr2", "dr3", "dr6", "dr7")
# No guest of ours asks half as often; a part that leaves EIP where it is is asked for ever.
MAX_DECISIONS = 100
_MAX_WRITES, _MAX_WRITTEN = 64, 1 << 16
_U32 = 0xFFFF_FFFF


class Unusable(XenlabError):
    """A decision that cannot be carried out; the text says why."""


class Sink(Protocol):
    """Where decisions go on their way: remembered in one process, looked up in the other."""

    def next(self, ask: Callable[[], Decision]) -> Decision:
        """The next decision; ``ask`` asks the student's part."""
        ...


class Recorder:
    """Asks the part, at most ``most`` times, and remembers."""

    def __init__(self, most: int = MAX_DECISIONS) -> None:
        self._most = most
        self.decisions: list[Decision] = []

    def next(self, ask: Callable[[], Decision]) -> Decision:
        decision = ask() if len(self.decisions) < self._most else self._too_many()
        self.decisions.append(decision)
        return decision

    def _too_many(self) -> Decision:
        return {"unusable": f"the part was asked {self._most} times; does EIP stay where it is?"}


class Replayer:
    """Gives back what was recorded, at most ``most`` decisions and why there are no more."""

    def __init__(self, decisions: Iterable[Any], most: int = MAX_DECISIONS) -> None:
        self._decisions = islice(decisions, most + 1)

    def next(self, ask: Callable[[], Decision]) -> Decision:
        decision = next(self._decisions, None)
        if decision is None:
            raise Unusable("the part handed back no decision here: it stopped before, or ran out of time")
        checked: Decision = decision
        return checked


class EmulatorSlot:
    """An emulator whose decisions pass through a `Sink`."""

    def __init__(self, sink: Sink, part: Emulator | None = None) -> None:
        self._sink, self._part = sink, part

    def emulate(self, code: bytes, registers: Values, system: Values) -> Values | None:
        # Copies: a part that changes what it was given must not change the machine.
        return changes_of(self._sink.next(lambda: self._ask(code, dict(registers), dict(system))))

    def _ask(self, code: bytes, registers: Values, system: Values) -> Decision:
        assert self._part is not None
        try:
            return _encode_changes(self._part.emulate(code, registers, system))
        except (Exception, SystemExit) as problem:
            return {"unusable": f"emulate raised {described(problem)}"}


class HypercallSlot:
    """A hypercall whose decisions pass through a `Sink`."""

    def __init__(self, sink: Sink, part: HypercallPart | None = None) -> None:
        self._sink, self._part = sink, part

    def call(self, arguments: tuple[int, ...], read: Reader) -> tuple[int, Mapping[int, bytes]]:
        return result_of(self._sink.next(lambda: self._ask(arguments, read)))

    def _ask(self, arguments: tuple[int, ...], read: Reader) -> Decision:
        assert self._part is not None
        try:
            return _encode_result(self._part.call(arguments, read))
        except (Exception, SystemExit) as problem:
            return {"unusable": f"call raised {described(problem)}"}


def described(problem: BaseException) -> str:
    """Type, text and line of an exception, in one line."""
    text = f"{type(problem).__name__}: {problem!s:.300}".rstrip(": ")
    frames = traceback.extract_tb(problem.__traceback__)
    inside = [frame for frame in frames if frame.filename.startswith(("<cell", "<ipython"))] or frames[-1:]
    return f"{text} (line {inside[-1].lineno}: {inside[-1].line or inside[-1].name})" if inside else text


def _encode_changes(value: Any) -> Decision:
    if value is None:
        return {"refuse": True}
    if not isinstance(value, Mapping):
        return {"unusable": f"emulate must return a dict of changes or None, it returned {value!r:.80}"}
    for name, number in value.items():
        if not isinstance(name, str) or not isinstance(number, int):
            return {
                "unusable": f"emulate must name registers and give whole numbers, it gave {name!r:.40}: {number!r:.80}"
            }
    return {"changes": {str(name): int(number) for name, number in value.items()}}


def _encode_result(value: Any) -> Decision:
    if not isinstance(value, tuple | list) or len(value) != 2:
        return {"unusable": f"call must return (result, writes), it returned {value!r:.80}"}
    result, writes = value
    if not isinstance(result, int) or not isinstance(writes, Mapping):
        return {"unusable": f"call must return a whole number and a dict of writes, it returned {value!r:.80}"}
    for address, data in writes.items():
        if not isinstance(address, int) or not isinstance(data, bytes | bytearray):
            return {"unusable": f"a write must be address: bytes, found {address!r:.40}: {data!r:.80}"}
    return {"result": int(result), "writes": [[int(address), bytes(data).hex()] for address, data in writes.items()]}


def changes_of(decision: Any) -> dict[str, int] | None:
    """The changes that a decision about an instruction asks for; None for #GP.  Raises Unusable."""
    check_object(decision)
    if decision.get("refuse") is True:
        return None
    changes = decision.get("changes")
    if not isinstance(changes, dict):
        raise Unusable(f"expected changes or a refusal, found {decision!r:.80}")
    for name, value in changes.items():
        if name not in _REGISTERS + _CONTROL:
            raise Unusable(f"the changes name {name!r:.40}; expected one of {' '.join(_REGISTERS + _CONTROL)}")
        _check_word(f"the new {name}", value)
    return {name: value & _U32 for name, value in changes.items()}


def result_of(decision: Any) -> tuple[int, dict[int, bytes]]:
    """The result and the writes that a decision about a hypercall asks for.  Raises Unusable."""
    check_object(decision)
    result, writes = decision.get("result"), decision.get("writes")
    _check_word("the result", result)
    if not isinstance(result, int) or not isinstance(writes, list) or len(writes) > _MAX_WRITES:
        raise Unusable(f"expected a result and at most {_MAX_WRITES} writes, found {decision!r:.80}")
    decoded = dict(map(_write_of, writes))
    if sum(map(len, decoded.values())) > _MAX_WRITTEN:
        raise Unusable(f"expected at most {_MAX_WRITTEN} bytes to be written")
    return result, decoded


def _write_of(write: Any) -> tuple[int, bytes]:
    try:
        address, text = write
        data = bytes.fromhex(text)
    except (TypeError, ValueError):
        raise Unusable(f"expected a write as [address, hex], found {write!r:.80}") from None
    if isinstance(address, bool) or not isinstance(address, int) or not 0 <= address <= _U32:
        raise Unusable(f"the address of a write must be 0 to 0xffffffff, found {address!r:.40}")
    return address, data


def check_object(decision: Any) -> None:
    """Raise Unusable unless the decision is an object that says what was decided."""
    if not isinstance(decision, dict):
        raise Unusable(f"expected a decision as a JSON object, found {decision!r:.80}")
    raise_if_unusable(decision)


def raise_if_unusable(decision: dict[str, Any]) -> None:
    """Raise Unusable with the reason, if that is what the decision is."""
    if "unusable" in decision:
        raise Unusable(str(decision["unusable"])[:600])


def _check_word(what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not -(1 << 31) <= value <= _U32:
        raise Unusable(f"{what} must be a whole number of 32 bits, found {value!r:.40}")
