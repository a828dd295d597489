"""Parts that others wrote: what is expected of them, and saving what they know.

The problem: a run can be taken back only if every part of the hypervisor goes back with it,
also a scheduler that a student wrote and that has no thought of being saved.

The invariant: a part that was loaded behaves as it did when it was saved.  A part that has
the pair ``state()`` and ``load(state)`` says itself what it knows; of any other all
attributes are copied.  What breaks without it: a replay in which the second turn is not
like the first.

A part's own mistake is not the guest's.  Unless it is an error of our family already, it is
raised as a `PartError` at the person who put the part in, and leaves a machine that can be run on.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from xenlab.errors import PartError, TimelineError


def save_part(part: Any) -> Any:
    """What ``part`` knows, independent of what it does next.

    Raises:
        TimelineError: it holds something that cannot be copied, such as a generator.
    """
    try:
        return deepcopy(part.state() if _has_pair(part) else vars(part))
    except TypeError as problem:
        raise TimelineError(
            f"{type(part).__name__} cannot be saved ({problem}): "
            "give it a method state() that returns plain data, and load(state) that takes it back"
        ) from None


def load_part(part: Any, saved: Any) -> None:
    """Take ``part`` back to what `save_part` gave."""
    saved = deepcopy(saved)
    if _has_pair(part):
        part.load(saved)
    else:
        vars(part).clear()
        vars(part).update(saved)


def wrong(part: object, did: str, expected: str, found: object) -> PartError:
    """What to raise when ``part``, in what it ``did``, gave ``found`` instead of what was ``expected``."""
    if isinstance(found, Exception):
        return PartError(
            f"{type(part).__name__}, {did}: expected {expected}; it raised {type(found).__name__}: {found}"
        )
    return PartError(f"{type(part).__name__}, {did}: expected {expected}, found {found!r:.200}")


def is_mapping(found: object, keys: Any, values: type | tuple[type, ...]) -> bool:
    """Whether ``found`` maps members of ``keys`` to instances of ``values``."""
    if not isinstance(found, Mapping) or not all(isinstance(value, values) for value in found.values()):
        return False
    # A range is searched to its end for anything but a whole number.
    return all((not isinstance(keys, range) or type(key) is int) and key in keys for key in found)


def _has_pair(part: Any) -> bool:
    return hasattr(part, "state") and hasattr(part, "load")
