"""What every test may use: the repository's root, a browser, one Hypothesis profile."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import settings

# Guests run on an emulator on shared machines: a deadline in wall time would fail at random.
settings.register_profile("xenlab", deadline=None, print_blob=True)
settings.load_profile("xenlab")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")


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
