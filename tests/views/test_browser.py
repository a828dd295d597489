"""A live view in JupyterLab: pressed, typed at, and found again in the saved notebook."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from view_guests import ROUND_TRIPS

pytestmark = [pytest.mark.browser, pytest.mark.slow]
WAIT = 120_000
SETUP = f"""
from xenlab import Hypervisor, Machine, boot
from xenlab.hypervisor.trace import Trace
from xenlab.timeline import Timeline
from xenlab.views import CallTimeline, MachineView, RegistersView, RingsView, live
SOURCE = {ROUND_TRIPS!r}
xen = Hypervisor(Machine(memory_mib=8), trace=Trace())
boot(xen, SOURCE, name="round trips")
timeline = Timeline(xen)
sources = {{0: SOURCE}}
code = RegistersView(xen, sources=sources)
live(timeline, code, RingsView(xen), CallTimeline(xen, sources=sources), MachineView(xen))
"""


def notebook(*cells: str) -> dict[str, Any]:
    empty = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    spec = {"name": "python3", "display_name": "Python 3"}
    return {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {"kernelspec": spec},
        "cells": [{**empty, "id": f"cell{place}", "source": text} for place, text in enumerate(cells)],
    }


@pytest.fixture(scope="module")
def lab(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of a JupyterLab and its folder, with one notebook in it."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "live.ipynb").write_text(json.dumps(notebook(SETUP, "6 * 7")), encoding="utf-8")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    options = ["--no-browser", "--allow-root", "--ServerApp.token=", "--ServerApp.password=", f"--port={port}"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(repository),
        "JUPYTER_CONFIG_DIR": str(folder / ".config"),
        "JUPYTER_DATA_DIR": str(folder / ".data"),
        "JUPYTER_RUNTIME_DIR": str(folder / ".run"),
        "IPYTHONDIR": str(folder / ".ipython"),
    }
    with (folder / "lab.log").open("w") as log:
        command = [sys.executable, "-m", "jupyterlab", *options]
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address, server, folder / "lab.log")
        yield address, folder
    finally:
        server.terminate()
        server.wait()


def wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _attempt in range(240):
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"{address}/api", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"JupyterLab did not answer: {log.read_text()}")


@pytest.fixture
def page(lab: tuple[str, Path], browser_path: str) -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(WAIT)
        yield page
        browser.close()


def open_notebook(page: Any, address: str) -> None:
    page.goto(f"{address}/lab/tree/live.ipynb?reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.wait_for_selector(".jp-NotebookPanel .jp-Notebook-ExecutionIndicator[data-status='idle']")


def run_cell(page: Any, place: int) -> None:
    """Run a cell; once more if JupyterLab lost the order while its kernel connected."""
    cell = f".jp-CodeCell >> nth={place}"
    for _attempt in range(10):
        page.click(f"{cell} >> .jp-InputArea-editor")
        page.keyboard.press("Shift+Enter")
        for _moment in range(30):
            # A number when it has run, a star while it runs.
            if page.inner_text(f"{cell} >> .jp-InputArea-prompt").strip("[]: \n"):
                return
            page.wait_for_timeout(200)
    pytest.fail("the cell was not run")


def number(page: Any) -> int:
    return int(page.inner_text(".xl-place").split("/")[0].replace(",", ""))


def reached(page: Any, condition: str) -> None:
    page.wait_for_function(
        "(condition) => { const place = document.querySelector('.xl-place').textContent;"
        " const n = Number(place.split('/')[0].replace(/\\D/g, '')); return eval(condition); }",
        arg=condition,
    )


def test_control_bar_keyboard_and_stills(page: Any, lab: tuple[str, Path], tmp_path: Path) -> None:
    address, folder = lab
    open_notebook(page, address)
    run_cell(page, 0)
    page.wait_for_selector(".xl-live svg")
    page.wait_for_function("document.querySelectorAll('.xl-live svg').length === 4")
    registers = page.inner_text(".xl-picture[data-view='0']")

    page.click(".xl-live .xl-step")
    reached(page, "n === 1")
    assert page.inner_text(".xl-picture[data-view='0']") != registers
    page.click(".xl-live .xl-back")
    reached(page, "n === 0")
    assert page.inner_text(".xl-picture[data-view='0']") == registers

    page.focus(".xl-live")
    page.keyboard.press("ArrowRight")
    reached(page, "n === 1")
    page.keyboard.press("Shift+ArrowRight")
    reached(page, "n === 101")
    page.keyboard.press("ArrowLeft")
    reached(page, "n === 100")
    page.keyboard.press("]")
    reached(page, "n > 100")
    after = number(page)
    page.keyboard.press("[")
    reached(page, f"n < {after}")
    page.keyboard.press("Home")
    reached(page, "n === 0")
    page.select_option(".xl-stop", "exceptions")
    page.click(".xl-live .xl-next")
    page.wait_for_function("document.querySelector('.xl-status').textContent.startsWith('trap of domain 0 at ')")

    page.select_option(".xl-speed", "100000")
    page.focus(".xl-live")
    page.keyboard.press("Space")
    reached(page, "n > 3000")
    # A cell runs while the view plays.
    run_cell(page, 1)
    page.wait_for_function("document.querySelector('.jp-Notebook').innerText.includes('42')")
    page.click(".xl-live .xl-toggle")
    page.wait_for_function("document.querySelector('.xl-toggle').textContent.includes('Play')")

    events = page.locator(".xl-live [data-event]")
    detail = page.inner_text(".xl-picture[data-view='2']")
    events.nth(3).click()
    page.wait_for_function(
        "(old) => document.querySelector(\".xl-picture[data-view='2']\").innerText !== old", arg=detail
    )
    chosen = page.inner_text(".xl-picture[data-view='2']")
    page.locator(".xl-live [data-event]").nth(6).focus()
    page.keyboard.press("Enter")
    page.wait_for_function(
        "(old) => document.querySelector(\".xl-picture[data-view='2']\").innerText !== old", arg=chosen
    )
    assert page.locator(".xl-live [data-event]").nth(6).evaluate("e => e === document.activeElement")

    # The control bar stays in sight at the last of the views.
    page.locator(".xl-frame").last.evaluate("frame => frame.scrollIntoView({block: 'end'})")
    bar, live = page.locator(".xl-bar").bounding_box(), page.locator(".xl-live").bounding_box()
    assert live["y"] < 0 < bar["y"] < 200

    # The stills are in the page but hidden beside the live widget.
    stills = page.locator(".jp-OutputArea-child:has(img[src*='xl-still'])")
    assert stills.count() == 4
    assert not stills.first.is_visible()
    page.screenshot(path=str(tmp_path / "light.png"))
    page.focus(".xl-live .xl-step")
    page.keyboard.press("Control+s")
    saved = wait_for_outputs(folder / "live.ipynb")
    assert "widgets" not in saved["metadata"]
    assert saved["cells"][0]["outputs"][1]["data"]["text/plain"]
    assert len(json.dumps(saved)) < 300_000


def wait_for_outputs(path: Path) -> dict[str, Any]:
    for _attempt in range(100):
        # Read while the server writes it, the file may be cut off.
        with contextlib.suppress(json.JSONDecodeError):
            saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if saved["cells"][0]["outputs"]:
                return saved
        time.sleep(0.2)
    pytest.fail("the notebook was not saved with its outputs")
