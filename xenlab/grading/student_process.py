"""The process in which a student's cells run: cells in, decisions out, both as JSON.

It knows nothing of checks.  It is given cells and guests, runs the cells in order in one
namespace (one that raises does not stop the next), runs each guest with the student's part,
and hands back what the part decided.  Whatever the cells do to this process, the judge, in
another one, sees only the reply.
"""

from __future__ import annotations

import builtins
import gc
import io
import json
import linecache
import os
import sys
from typing import Any, BinaryIO

from xenlab.grading.decisions import Decision, described
from xenlab.grading.guests import Slot, from_wire, record

OUTPUT_KEPT = 10_000


class Output(io.TextIOBase):
    """Standard output that keeps a beginning and lets the rest go."""

    def __init__(self) -> None:
        self.kept = ""

    def write(self, text: str) -> int:
        self.kept += text[: OUTPUT_KEPT - len(self.kept)]
        return len(text)


def main() -> None:
    """Read a request from standard input, answer it on what was standard output, and end."""
    request = json.load(sys.stdin.buffer)
    channel = _take_channel()
    output = Output()
    sys.stdout = sys.stderr = output
    limit(**request["limits"])
    reply = answer(request)
    channel.write(json.dumps({**reply, "output": output.kept}).encode())
    channel.flush()
    # Threads and exit handlers of the student's have nothing more to say.
    os._exit(0)


def _take_channel() -> BinaryIO:
    """Keep the pipe to the judge for ourselves; the cells' output goes nowhere."""
    channel = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    return channel


def limit(cpu_seconds: int, memory_mib: int, file_mib: int) -> None:
    """Set hard limits on this process where the system has them (POSIX)."""
    if sys.platform == "win32":
        return
    import resource

    wanted = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_AS: memory_mib << 20,
        resource.RLIMIT_FSIZE: file_mib << 20,
        resource.RLIMIT_CORE: 0,
    }
    for name, value in wanted.items():
        try:
            # One second between the soft and the hard limit of CPU time: the signal says which it was.
            resource.setrlimit(name, (value, value + (name == resource.RLIMIT_CPU)))
        except (ValueError, OSError):  # macOS refuses some; the wall time still holds
            continue


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run the cells and then the guests; the reply without the output."""
    namespace, notes = run_cells(request["cells"])
    slot = Slot(
        request["kind"],
        tuple(request["names"]),
        request["number"],
        request["scenarios"],
        tuple(request["rules"]),
    )
    missing = [name for name in slot.names if name not in namespace]
    if missing:
        return {"notes": notes, "missing": missing}
    if not slot.kind:
        return {"notes": notes, "answer": {name: _plain(namespace[name]) for name in slot.names}}
    part = namespace[slot.names[0]]
    return {
        "notes": notes,
        "answer": {name: _decisions(name, wire, slot, part) for name, wire in request["guests"].items()},
    }


def _decisions(name: str, wire: dict[str, Any], slot: Slot, part: Any) -> list[Decision]:
    gc.collect()  # each machine reserves much address space, which is limited
    try:
        return record(from_wire(name, wire), slot, part)
    except Exception as problem:
        return [{"unusable": f"the guest could not be run: {described(problem)}"}]


def run_cells(cells: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Execute cells in one namespace; the namespace, and what went wrong in which cell."""
    namespace: dict[str, Any] = {"__name__": "__main__", "__builtins__": builtins}
    notes = []
    for number, source in enumerate(cells, start=1):
        name = f"<cell {number}>"
        code = "\n".join(map(_without_magic, source.split("\n")))
        linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
        try:
            exec(compile(code, name, "exec"), namespace)
        # A cell may raise SystemExit or KeyboardInterrupt; the next cell runs all the same.
        except BaseException as problem:
            notes.append(f"code cell {number} raised {described(problem)}")
    return namespace, notes


def _without_magic(line: str) -> str:
    """IPython's ``%magic`` and ``!command`` lines mean nothing here."""
    bare = line.lstrip()
    return line[: len(line) - len(bare)] + "pass" if bare.startswith(("%", "!")) else line


def _plain(value: Any) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as problem:
        return {"unusable": f"expected plain data, found {type(value).__name__} ({problem!s:.200})"}
