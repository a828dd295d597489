"""What snapshots of the hypervisor's own state share, and that nobody can tell."""

from __future__ import annotations

from array import array
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from xenlab import Hypervisor, Machine, boot
from xenlab.timeline.sharing import own_bytes, pack, unpack

leaves = st.none() | st.booleans() | st.integers(-1, 2) | st.sampled_from((b"", b"ab", "ab", 0.0, -0.0))
columns = st.lists(st.integers(0, 1), max_size=3).map(lambda values: array("i", values * 1500))
values = st.recursive(
    leaves | columns,
    lambda inner: (
        st.dictionaries(st.sampled_from("abc"), inner)
        | st.lists(inner, max_size=3).map(tuple)
        | st.lists(inner, max_size=3)
    ),
    max_leaves=12,
)
states = st.dictionaries(st.sampled_from(("frames", "states", "parts")), values)


def exact(value: Any) -> str:
    """With types, and the order of dictionaries."""
    return repr(value)


@given(st.lists(states, min_size=1, max_size=4))
def test_what_was_packed_is_unpacked_whatever_was_there_before(moments: list[dict[str, Any]]) -> None:
    before: dict[str, Any] = {}
    for state in moments:
        expected = exact(state)
        before = pack(state, before)
        assert exact(unpack(before)) == expected


def test_a_part_keeps_its_own_objects() -> None:
    both = [1]
    state = {"parts": {"scheduler": {"queue": both, "other": both}}}
    kept = pack(state, {"parts": {"scheduler": {"queue": [1], "other": [1]}}})
    assert kept["parts"]["scheduler"]["queue"] is kept["parts"]["scheduler"]["other"]


def test_what_did_not_change_is_kept_once() -> None:
    xen = Hypervisor(Machine(64))
    for _number in range(3):
        boot(xen, "start: inc eax\n jmp start")
    xen.run(10)
    first = pack(xen.snapshot(), {})
    xen.run(100)
    second = pack(xen.snapshot(), first)
    assert second["frames"] is first["frames"]
    assert second["states"][1] is first["states"][1]
    assert second["states"][0]["vcpus"][0]["registers"] != first["states"][0]["vcpus"][0]["registers"]
    assert own_bytes(second, first) == len(second["states"][0]["vcpus"][0]["registers"])
    xen.frames.allocate(1, 0)
    third = pack(xen.snapshot(), second)
    assert own_bytes(third, second) < 20_000 < own_bytes(third, {})
