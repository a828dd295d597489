"""Saving what a part knows, whoever wrote it.

The problem: a run can be taken back only if every part of the hypervisor goes back with it,
also a scheduler that a student wrote and that has no thought of being saved.

The invariant: a part that was loaded behaves as it did when it was saved.  A part that has
the pair ``state()`` and ``load(state)`` says itself what it knows; of any other all
attributes are copied.  What breaks without it: a replay in which the second turn is not
like the first.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from xenlab.errors import TimelineError


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


def _has_pair(part: Any) -> bool:
    return hasattr(part, "state") and hasattr(part, "load")
