"""``xenlab lab``: JupyterLab on the course, in a server of its own on this computer only."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from xenlab.errors import XenlabError

DEFAULT_PORT = 8888
_SETTINGS = Path(__file__).with_name("lab_settings")
_PORTS_TRIED = 50
_START_SECONDS = 60.0
_POLL_SECONDS = 0.1
_END_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Server:
    """A JupyterLab to be started.

    Attributes:
        root: folder that it shows.
        first: what it opens, relative to ``root``.
        port: where it listens, on the loopback interface.
        token: what a browser must know to get in.
        browser: whether it opens one itself.
    """

    root: Path
    first: Path
    port: int
    token: str
    browser: bool

    @property
    def url(self) -> str:
        """The address to open by hand."""
        return f"http://localhost:{self.port}/lab/tree/{self.first.as_posix()}?token={self.token}"

    def command(self) -> list[str]:
        """How it is started.  The token is not in it: others can see a process's arguments."""
        options = {
            "ServerApp.root_dir": str(self.root),
            "ServerApp.port": self.port,
            "ServerApp.port_retries": 0,
            "ServerApp.open_browser": self.browser,
            "ServerApp.answer_yes": True,
            # A default of ours: nothing is asked of the network, and nobody is asked whether it may be.
            "LabApp.app_settings_dir": _SETTINGS,
            "LabApp.default_url": f"/lab/tree/{self.first.as_posix()}",
        }
        command = [sys.executable, "-m", "jupyterlab", "--log-level=WARN"]
        command += [f"--{name}={value}" for name, value in options.items()]
        return command + (["--allow-root"] if _is_root() else [])


def _is_root() -> bool:
    # JupyterLab refuses to run as root without being told; in a container that is the usual user.
    return sys.platform != "win32" and os.geteuid() == 0


def is_free(port: int) -> bool:
    """Whether a server could listen on ``port`` of the loopback interface."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        if sys.platform != "win32":
            # As servers do: connections that have just been closed do not count.  On Windows the
            # option means something else, and would take a port from its owner.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            return False
        return True


def _free_ports(after: int) -> Iterator[int]:
    return (port for port in range(after + 1, min(after + 1 + _PORTS_TRIED, 65536)) if is_free(port))


def choose_port(wanted: int | None, note: Callable[[str], None]) -> int:
    """The port to use: ``wanted``, or near the usual one where nothing was asked for.

    Raises:
        XenlabError: the wanted port is taken, or none is free.
    """
    first = DEFAULT_PORT if wanted is None else wanted
    if is_free(first):
        return first
    other = next(_free_ports(first), None)
    if wanted is not None:
        advice = f"write: xenlab lab --port {other}" if other else "leave --port out"
        raise XenlabError(f"port {wanted} is taken by another program; {advice}")
    if other is None:
        raise XenlabError(f"the ports from {first} to {first + _PORTS_TRIED} are all taken; name one with --port")
    note(f"Port {first} is taken; using port {other} instead.")
    return other


def has_browser() -> bool:
    """Whether Python knows a browser that it could open."""
    try:
        webbrowser.get()
    except webbrowser.Error:
        return False
    return True


def open_lab(root: Path, first: Path, port: int | None, *, browser: bool, note: Callable[[str], None]) -> int:
    """Start JupyterLab and stay until it ends; its exit status.

    Args:
        root: folder that it shows.
        first: what it opens, relative to ``root``.
        port: None for any.
        browser: whether to open one, if there is one.
        note: gets what the user should know.

    Raises:
        XenlabError: the port is taken, or JupyterLab does not start.
    """
    found = browser and has_browser()
    server = Server(root, first, choose_port(port, note), secrets.token_urlsafe(24), found)
    with subprocess.Popen(server.command(), env=os.environ | {"JUPYTER_TOKEN": server.token}) as process:
        try:
            _await_start(process, server.port)
            if browser and not found:
                note("No browser was found on this computer.")
            note(f"{'The lessons are at' if found else 'Open this address in a browser:'}\n  {server.url}")
            note("Ctrl-C here ends JupyterLab.")
            return process.wait()
        except KeyboardInterrupt:
            return _end(process)


def _end(process: subprocess.Popen[bytes]) -> int:
    try:
        # At a terminal the server got the same Ctrl-C and is ending its kernels.
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
    return 0


def _await_start(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None:
        with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if time.monotonic() > deadline:
            process.terminate()
            raise XenlabError(f"JupyterLab did not answer on port {port} within {_START_SECONDS:.0f} s")
        time.sleep(_POLL_SECONDS)
    raise XenlabError(
        f"JupyterLab ended at once with status {process.returncode}; its reason stands above. "
        "`xenlab doctor` checks the installation"
    )
