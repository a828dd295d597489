"""What every test may use: the repository's root, a browser, kernels compiled by gcc, one Hypothesis profile."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# Guests run on an emulator on shared machines: a deadline in wall time would fail at random.
settings.register_profile("xenlab", deadline=None, print_blob=True)
settings.load_profile("xenlab")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the storms unless they are asked for."""
    if "storm" not in config.option.markexpr:
        for item in [item for item in items if item.get_closest_marker("storm")]:
            item.add_marker(pytest.mark.skip(reason="asked for by -m storm"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the clone."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def browser_path() -> str:
    """A Chromium for Playwright's ``executable_path``. Without one the test is skipped, in CI it fails."""
    found = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if found is None:
        message = f"no browser on the PATH; looked for {', '.join(BROWSERS)}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return found


GCC = ["gcc", "-m32", "-march=i686", "-O1", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-ffreestanding", "-fno-pic"]
GCC += ["-fno-pie", "-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-c"]
LD = ["ld", "-m", "elf_i386", "-z", "noexecstack", "--no-warn-rwx-segments"]


@pytest.fixture(scope="session")
def compile_kernel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``compile_kernel("start_of_day", pae=1)`` builds a kernel of tests/toolstack/kernels and gives its path.

    ``base``, ``offset`` and ``physical`` are those of the linker script, ``defines`` are further macros.  Without a
    gcc for 32 bits the test is skipped; in CI, where there is one, it fails.
    """
    sources, folder = repository / "tests/toolstack/kernels", tmp_path_factory.mktemp("kernels")
    _expect_gcc(folder)

    def build(
        name: str, *defines: str, pae: int, base: int = 0xC000_0000, offset: int = 1 << 20, physical: int = 0
    ) -> Path:
        output = folder / "-".join((name, *defines, str(pae), *(f"{number:x}" for number in (base, offset, physical))))
        if output.exists():
            return output
        texts = {"BASE_TEXT": f'"{base:#X}"', "PAGE_TEXT": f'"{(offset >> 12) + 1:#x}"', "PAE": str(pae)}
        macros = [f"-D{define}" for define in (*defines, *(f"{key}={value}" for key, value in texts.items()))]
        objects = [folder / f"{output.name}.{part}.o" for part in ("head", name)]
        for source, target in zip((sources / "head.S", sources / f"{name}.c"), objects, strict=True):
            _run([*GCC, *macros, source, "-o", target])
        places = {"virt_base": base, "offset": offset, "physical": physical}
        symbols = [part for key, value in places.items() for part in ("--defsym", f"{key}={value:#x}")]
        _run([*LD, *symbols, "-T", sources / "kernel.lds", *objects, "-o", output])
        return output

    return build


def _run(command: list[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert not done.returncode, done.stderr


def _expect_gcc(folder: Path) -> None:
    probe = folder / "probe.c"
    probe.write_text("int probe;\n")
    try:
        _run([*GCC, probe, "-o", folder / "probe.o"])
    except (OSError, AssertionError) as problem:
        message = f"no gcc that builds 32-bit x86 code (Debian: gcc-multilib): {problem}"
        if os.environ.get("CI") and sys.platform == "linux" and platform.machine() == "x86_64":
            pytest.fail(message)
        pytest.skip(message)
