"""``xenlab lab --check``: every lesson executed from its first cell to its last, without a browser.

The problem: a lesson that does not run is found by a student.  Here each lesson is executed
in a kernel of its own, as JupyterLab would, in the folder where it lies.

The invariant: the files stay as they are; the outputs are thrown away.  Ctrl-C cancels the
executions, and cancelling ends their kernels.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import Any

CELL_SECONDS = 120
_WORKERS = 2
_POLL_SECONDS = 0.1
_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the execution of a lesson went.

    Attributes:
        lesson: its file's name without suffix.
        seconds: how long it took.
        problem: what went wrong where, and what to do; empty when nothing did.
    """

    lesson: str
    seconds: float
    problem: str = ""

    def line(self, width: int) -> str:
        """One line, and below it what is to be known about a failure."""
        head = f"{self.lesson:{width}}  {'FAILED' if self.problem else 'ok':6}  {self.seconds:.1f} s"
        return "\n".join([head, *(f"    {line}" for line in self.problem.splitlines())])


def check_lessons(lessons: Sequence[Path], cell_seconds: int = CELL_SECONDS) -> Generator[Outcome, None, None]:
    """Execute ``lessons``, up to two at a time; their outcomes in the given order, each as soon as it is known."""
    # On Windows the usual loop cannot watch the kernels' sockets.
    loop = asyncio.SelectorEventLoop() if sys.platform == "win32" else asyncio.new_event_loop()
    outcomes: Queue[Outcome | None] = Queue()
    task = loop.create_task(_check_all(lessons, cell_seconds, outcomes))
    # Outside the main thread nbclient leaves the signal handlers alone, and Ctrl-C comes here.
    thread = threading.Thread(target=loop.run_until_complete, args=(_settled(task),))
    thread.start()
    try:
        yield from _until_none(outcomes)
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        loop.close()
    task.result()


async def _settled(task: asyncio.Task[None]) -> None:
    await asyncio.wait([task])
    # A client whose execution was cancelled leaves tasks of its own behind.
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for other in left:
        other.cancel()
    await asyncio.gather(*left, return_exceptions=True)


def _until_none(outcomes: Queue[Outcome | None]) -> Iterator[Outcome]:
    while True:
        try:
            # In short waits: on Windows a long one cannot be interrupted by Ctrl-C.
            outcome = outcomes.get(timeout=_POLL_SECONDS)
        except Empty:
            continue
        if outcome is None:
            return
        yield outcome


async def _check_all(lessons: Sequence[Path], cell_seconds: int, outcomes: Queue[Outcome | None]) -> None:
    turns = asyncio.Semaphore(min(_WORKERS, os.cpu_count() or 1))

    async def in_turn(lesson: Path) -> Outcome:
        async with turns:
            begin = time.perf_counter()
            problem = await _execute(lesson, cell_seconds)
            return Outcome(lesson.stem, time.perf_counter() - begin, problem)

    try:
        async with asyncio.TaskGroup() as group:
            for execution in [group.create_task(in_turn(lesson)) for lesson in lessons]:
                outcomes.put(await execution)
    finally:
        outcomes.put(None)


async def _execute(lesson: Path, cell_seconds: int) -> str:
    """What went wrong; empty when nothing did."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    read: Callable[..., Any] = nbformat.read  # it has no types
    try:
        notebook = read(lesson, as_version=4)
    except (OSError, ValueError, nbformat.ValidationError) as problem:
        return f"the file is no notebook: {_first_line(str(problem))}\n{_advice(lesson)}"
    started: list[int] = []
    client = NotebookClient(
        notebook,
        timeout=cell_seconds,
        kernel_name="python3",
        resources={"metadata": {"path": str(lesson.parent)}},
        on_cell_execute=lambda cell, cell_index: started.append(cell_index),
        shutdown_kernel="immediate",
        # A kernel's warnings about its own transport would stand between the lines of the report.
        extra_arguments=["--log-level=ERROR"],
    )
    try:
        await client.async_execute()
    except CellExecutionError as problem:
        found = f"{problem.ename}: {_first_line(problem.evalue)}"
    except CellTimeoutError:
        found = f"still running after {cell_seconds} s"
    except DeadKernelError:
        found = "the kernel died"
    else:
        return ""
    return f"{_place(notebook, started)}: {found}\n{_advice(lesson)}"


def _place(notebook: Any, started: Sequence[int]) -> str:
    """The cell that was running, by the number that JupyterLab gives it and by its first line."""
    if not started:
        return "before the first cell"
    return f"cell [{len(started)}], which begins `{_first_line(notebook.cells[started[-1]].source)}`"


def _advice(lesson: Path) -> str:
    return (
        f"`xenlab lab` opens it: run it up to there. If it was changed by mistake, `git checkout {lesson.name}` in "
        f"{lesson.parent} brings it back; `xenlab doctor` checks the installation"
    )


def _first_line(text: str) -> str:
    lines = [line for line in _TERMINAL_CODES.sub("", text).splitlines() if line.strip()]
    return lines[0] if lines else ""
