"""What two moments have in common, kept once: the hypervisor's own state in snapshots.

The problem: `Hypervisor.snapshot` copies all that the hypervisor knows, for a hundred domains and for every frame.
From one snapshot to the next little of it changes: most domains did not run, most frames kept their type.

The idea: the new state is compared with the one before it, and what is equal is replaced by what is there already,
from a vCPU's registers up to a whole domain.  Long arrays, the columns of the frame table, are cut into pieces
first, as memory is cut into pages.

The invariant: `unpack` of what `pack` gave equals what was packed, in value and type, whatever it was compared with.
What breaks without it: a step back restores what never was.  What parts say of themselves is left alone: a
student's part may care which of its objects are the same.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from operator import is_
from typing import Any

PARTS = "parts"
_PIECE = 4096  # bytes
_LONG = 1024  # items of a sequence, beyond which they are not looked at one by one
_SHORT = 64  # of one that may hold something large
_PLAIN = (int, bytes, str)


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """A long array: its type code, and its bytes in pieces."""

    typecode: str
    pieces: tuple[bytes, ...]


def pack(state: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """A snapshot's state, with everything that equals the packed state ``before`` taken from there."""
    return {name: value if name == PARTS else _share(value, before.get(name)) for name, value in state.items()}


def unpack(state: dict[str, Any]) -> dict[str, Any]:
    """The state that was packed."""
    return {name: value if name == PARTS else _whole(value) for name, value in state.items()}


def own_bytes(state: dict[str, Any], before: dict[str, Any]) -> int:
    """About how much of the host's memory the pieces of ``state`` take that ``before`` does not have."""
    known = {id(piece) for piece in _pieces(before)}
    return sum(len(piece) for piece in _pieces(state) if id(piece) not in known)


def _share(new: Any, old: Any, *, cut: bool = True) -> Any:
    kind = type(new)
    if cut and kind is array and len(new) * new.itemsize > _PIECE:
        return _cut(new, old)
    if kind is dict:
        return _share_mapping(new, old if type(old) is dict else {}, cut)
    if kind is tuple or kind is list:
        return _share_sequence(new, old if type(old) is kind else kind())
    return old if kind is type(old) and kind in _PLAIN and new == old else new


def _share_mapping(new: dict[Any, Any], old: dict[Any, Any], cut: bool) -> dict[Any, Any]:
    shared = {key: _share(value, old.get(key), cut=cut) for key, value in new.items()}
    # In the same order, too, which may be that of domains in a table.
    same = len(shared) == len(old) and all(map(is_, shared.values(), old.values())) and list(shared) == list(old)
    return old if same else shared


def _share_sequence(new: Any, old: Any) -> Any:
    if len(new) == len(old) and all(map(is_, new, old)):
        return old
    if len(new) != len(old) or len(new) > _LONG:
        return new
    # Nothing in there is cut, so that it need not be searched for pieces.
    shared = [_share(one, other, cut=False) for one, other in zip(new, old, strict=True)]
    return old if all(map(is_, shared, old)) else type(new)(shared)


def _cut(column: array[Any], old: Any) -> Pieces:
    raw = memoryview(column).cast("B")
    known = old.pieces if type(old) is Pieces and old.typecode == column.typecode else ()
    pieces = [bytes(raw[at : at + _PIECE]) for at in range(0, len(raw), _PIECE)]
    kept = tuple(
        known[number] if number < len(known) and known[number] == piece else piece
        for number, piece in enumerate(pieces)
    )
    return old if known and len(kept) == len(known) and all(map(is_, kept, known)) else Pieces(column.typecode, kept)


def _whole(value: Any) -> Any:
    kind = type(value)
    if kind is Pieces:
        return array(value.typecode, b"".join(value.pieces))
    if kind is dict:
        return {key: _whole(item) for key, item in value.items()}
    return value


def _pieces(value: Any) -> Iterator[bytes]:
    kind = type(value)
    if kind is bytes:
        yield value
    elif kind is Pieces:
        yield from value.pieces
    elif kind is dict:
        for item in value.values():
            yield from _pieces(item)
    elif kind in (list, tuple) and len(value) <= _SHORT:
        for item in value:
            yield from _pieces(item)


__all__ = ["own_bytes", "pack", "unpack"]
