"""What ``import xenlab`` gives, and what it does not load."""

from __future__ import annotations

import subprocess
import sys

import pytest

import xenlab

HEAVY = ("plotly", "capstone", "ipywidgets", "ziglang", "numpy", "nbformat", "elftools", "unicorn")


def loaded_after(code: str) -> set[str]:
    """The modules of `HEAVY` that a fresh interpreter has loaded after ``code``."""
    script = f"{code}\nimport sys\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize("name", xenlab.__all__)
def test_every_name_can_be_imported(name: str) -> None:
    value = getattr(xenlab, name)
    assert value.__name__ == name
    assert value.__doc__


def test_names_are_sorted_and_unique() -> None:
    assert list(xenlab.__all__) == sorted(set(xenlab.__all__))


def test_the_names_that_others_script_against() -> None:
    assert {"Hypervisor", "assemble", "boot", "Machine", "XenlabError", "ImageError"} <= set(xenlab.__all__)


def test_errors_are_one_family() -> None:
    for name in xenlab.__all__:
        if name.endswith("Error") or name == "GuestCrashed":
            assert issubclass(getattr(xenlab, name), xenlab.XenlabError)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        xenlab.nonsense  # noqa: B018


def test_import_loads_nothing_heavy() -> None:
    assert loaded_after("import xenlab") == set()


def test_a_guest_boots_and_runs_without_views_and_disassembler() -> None:
    code = """
import xenlab
xen = xenlab.Hypervisor()
guest = xenlab.boot(xen, "start: inc eax\\n jmp start")
assert xen.run(1000).instructions == 1000
"""
    assert loaded_after(code).isdisjoint({"plotly", "capstone", "ipywidgets", "nbformat"})
