"""Debug registers by hypercall and by move."""

from __future__ import annotations

from typing import Any

import pytest
from hypercall_bench import Bench
from hypothesis import given
from hypothesis import strategies as st

from xenlab.abi.numbers import Errno, Hypercall
from xenlab.errors import HypercallError
from xenlab.hypervisor.debug_registers import written
from xenlab.machine.paging import PagingMode

EXTENSIONS = "mov eax, 8\n mov cr4, eax"


@pytest.fixture
def bench(mode: PagingMode) -> Bench:
    return Bench(mode)


def set_register(bench: Bench, number: int, value: int) -> int:
    return bench.call(Hypercall.set_debugreg, number, value)


def get_register(bench: Bench, number: int) -> int:
    return bench.call(Hypercall.get_debugreg, number) & 0xFFFF_FFFF


class TestHypercalls:
    """By the rules of Xen's arch/x86/pv/misc-hypercalls.c for 32-bit guests."""

    def test_addresses_are_any(self, bench: Bench) -> None:
        for number, value in enumerate((0, 0xC000_0000, 0xF580_0000, 0xFFFF_FFFF)):
            assert set_register(bench, number, value) == 0
            assert get_register(bench, number) == value

    @pytest.mark.parametrize("number", [4, 6])
    def test_status(self, number: int, bench: Bench) -> None:
        assert get_register(bench, number) == 0xFFFF_0FF0
        for value, kept in ((0, 0xFFFF_0FF0), (0xFFFF_FFFF, 0xFFFF_EFFF), (0x400F, 0xFFFF_4FFF)):
            assert set_register(bench, number, value) == 0
            assert get_register(bench, 6) == kept == get_register(bench, 4)

    @pytest.mark.parametrize("number", [5, 7])
    def test_control(self, number: int, bench: Bench) -> None:
        assert get_register(bench, number) == 0x400
        for value, kept in (
            (0, 0x400),
            (0xD800, 0x400),
            (0x300, 0x700),
            (0x000D_0001, 0x000D_0401),
            (0xF000_0000, 0xF000_0400),
        ):
            assert set_register(bench, number, value) == 0
            assert get_register(bench, 7) == kept == get_register(bench, 5)
        for value in (0x2000, 0xFFFF_FFFF, 0x0002_0001, 0x2000_0080):
            assert set_register(bench, number, value) == -Errno.EPERM
        # Not for a breakpoint that nobody has switched on.
        assert set_register(bench, number, 0x2222_0000) == 0

    def test_with_extensions(self, bench: Bench) -> None:
        bench.vcpu.control["cr4"] |= 8
        for number in (4, 5):
            assert set_register(bench, number, 0) == -Errno.ENODEV
            assert bench.call(Hypercall.get_debugreg, number) == -Errno.ENODEV
        assert set_register(bench, 7, 0x0002_0001) == 0
        assert get_register(bench, 7) == 0x0002_0401

    @pytest.mark.parametrize("number", [8, 15, 0x8000_0000, 0xFFFF_FFFF])
    def test_registers_that_do_not_exist(self, number: int, bench: Bench) -> None:
        assert set_register(bench, number, 0) == -Errno.ENODEV
        assert bench.call(Hypercall.get_debugreg, number) == -Errno.ENODEV


@pytest.mark.parametrize(
    ("probe", "ebx"),
    [
        ("mov eax, 0x1234\n mov dr4, eax\n mov ebx, dr6", 0xFFFF_0FF0 | 0x0234),
        ("mov eax, 0x700\n mov dr5, eax\n mov ebx, dr7", 0x700),
        ("mov ebx, dr5", 0x400),
    ],
)
def test_the_two_other_names(probe: str, ebx: int, play: Any) -> None:
    seen = play(probe, 1)
    assert (seen.first.vector, seen.word("seen", 4)) == (0x80, 0x600D)
    assert seen.vcpu.control["dr6" if "dr6" in probe else "dr7"] == ebx


@pytest.mark.parametrize("probe", ["mov ebx, dr4", "mov ebx, dr5", "mov dr4, eax", "mov dr5, eax"])
def test_with_extensions_the_two_do_not_exist(probe: str, ring: int, play: Any) -> None:
    seen = play(probe, ring, setup=EXTENSIONS)
    assert seen.first.vector == (6 if ring == 1 else 13)
    assert seen.frame["eip"] == seen.label("probe")


@given(number=st.integers(0, 9), value=st.integers(0, 2**32 - 1), extensions=st.booleans())
def test_what_is_kept_can_be_written_back(number: int, value: int, extensions: bool) -> None:
    control = {"cr4": 8 if extensions else 0}
    try:
        changes = written(control, number, value)
    except HypercallError:
        return
    ((name, kept),) = changes.items()
    assert written(control, int(name[2]), kept) == changes
    if name == "dr7":
        assert kept & 0x2000 == 0
