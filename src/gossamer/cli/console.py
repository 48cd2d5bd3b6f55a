"""What the command line prints: results on stdout, progress and errors on stderr; with JSON, one document on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from gossamer.errors import GossamerError

if TYPE_CHECKING:
    from gossamer.adapters.cost import Cost
    from gossamer.pipeline.adapter_report import AdapterReport


def wants_json(argv: Sequence[str]) -> bool:
    """Whether the arguments ask for JSON, looked up without parsing, because parsing itself may be what fails."""
    return "--format=json" in argv or ("--format", "json") in pairwise(argv)


def print_json(document: Mapping[str, Any]) -> None:
    """One JSON document on stdout."""
    print(json.dumps(document, indent=2))


def print_error(error: GossamerError, as_json: bool) -> None:
    """The three parts of an error."""
    if as_json:
        parts = {"code": error.code, "what": error.what, "why": error.why, "next": error.next_step}
        print_json({"error": parts})
    else:
        print(f"error[{error.code}]: {error}", file=sys.stderr)


def note(text: str) -> None:
    """A remark on stderr."""
    print(text, file=sys.stderr)


def note_adapters(reports: Iterable[AdapterReport], steps: int) -> None:
    """What each adapter of a run of so many steps is, and what of its file has no effect."""
    for report in reports:
        for line in (report.line(steps), *report.unused_lines()):
            note(line)


def note_costs(costs: Mapping[str, Cost]) -> None:
    """The adapters that cost more than their factors: memory, or time at every call."""
    for name, cost in costs.items():
        if cost.reason:
            memory = f" ({cost.merged_bytes / 1e6:.1f} MB)" if cost.merged_bytes else ""
            note(f"{name}: {cost.reason}{memory}")


class Bar:
    """Denoising steps of a whole run, with the time left."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task
        self._before = 0

    def say(self, text: str) -> None:
        """What is being done now."""
        self._progress.update(self._task, description=text)

    def on_step(self, done: int, total: int) -> None:
        """One more step of the current picture."""
        self._progress.update(self._task, completed=self._before + done)
        if done == total:
            self._before += total


@contextmanager
def progress_bar(steps: int) -> Iterator[Bar]:
    """A bar over `steps` steps, on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps, left"))
    progress = Progress(
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        redirect_stdout=sys.stdout.isatty(),  # a pipe or a file on stdout must get what is printed meanwhile
    )
    with progress:
        yield Bar(progress, progress.add_task("Loading", total=steps))
