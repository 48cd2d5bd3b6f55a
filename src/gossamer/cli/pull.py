"""`gossamer pull`: download a model, or one weight file, from the Hugging Face hub, verified and ready to run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gossamer.cli.console import note, print_json
from gossamer.pipeline.parse import FORMATS, parse_choice

if TYPE_CHECKING:
    from gossamer.pipeline.pull import Plan
    from gossamer.pipeline.transfer import Watcher

INTERRUPTED = 130


def add_to(verbs: Any) -> None:
    """Add the verb to the parser."""
    parser = verbs.add_parser("pull", help="download a model from the hub", description=__doc__, allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="owner/name, or owner/name/path/file.safetensors")
    parser.add_argument("--revision", default="main", metavar="NAME", help="branch, tag or commit (default: main)")
    parser.add_argument("--offline", action="store_true", help="touch no network: check what is in the local cache")
    parser.add_argument("--format", type=parse_choice(FORMATS), default="text", metavar="{text,json}")
    parser.set_defaults(verb=pull)


def pull(arguments: argparse.Namespace) -> int:
    """Say what will be fetched, fetch and verify it, and print where it is."""
    from gossamer.pipeline.pull import fetch, plan_pull

    try:
        plan = plan_pull(arguments.model, arguments.revision, arguments.offline)
    except KeyboardInterrupt:
        return _interrupted(arguments, left=None)
    _announce(plan)
    try:
        with _progress(plan) as watcher:
            fetched = fetch(plan, watcher)
    except KeyboardInterrupt:
        return _interrupted(arguments, left=plan.bytes_left())
    if arguments.format == "json":
        print_json(_describe(plan, fetched))
    else:
        print(plan.path)
    return 0


def _announce(plan: Plan) -> None:
    """Size, files by folder, and place, before anything large is fetched."""
    from rich.filesize import decimal

    left = plan.bytes_left()
    name = f"{plan.target}, {plan.revision}, commit {plan.origin.commit[:12]}"
    if not plan.files:
        note(f"{name}: in the cache, fetched by another program; its files cannot be verified")
        return
    state = f"{decimal(left)} to fetch, {decimal(plan.size - left)} are here" if left else "all are here"
    note(f"{name}: {_count(len(plan.files))}, {decimal(plan.size)}; {state}")
    folders: dict[str, list[int]] = {}
    for file in plan.files:
        folders.setdefault(file.name.rpartition("/")[0] or file.name, []).append(file.size)
    for folder, sizes in folders.items():
        note(f"  {folder:<24} {_count(len(sizes)):<9} {decimal(sum(sizes)):>9}")
    note(f"  into {plan.origin.cache.path}")


def _count(files: int) -> str:
    return f"{files} file" if files == 1 else f"{files} files"


@contextmanager
def _progress(plan: Plan) -> Iterator[Watcher]:
    """A bar over all bytes on stderr, with the speed and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from gossamer.pipeline.transfer import Watcher

    class Bar(Watcher):
        def say(self, text: str) -> None:
            progress.update(task, description=text.rpartition("/")[0] or text)  # the folder: short, and steady

        def advance(self, count: int) -> None:
            progress.update(task, advance=count)

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    progress = Progress(
        *columns,
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        redirect_stdout=sys.stdout.isatty(),
    )
    task = progress.add_task("Starting", total=plan.size, completed=plan.size - plan.bytes_left())
    with progress:
        yield Bar()


def _interrupted(arguments: argparse.Namespace, left: int | None) -> int:
    from rich.filesize import decimal

    if arguments.format == "json":
        print_json({"model": arguments.model, "interrupted": True, "bytes_left": left})
    still = "" if left is None else f" with {decimal(left)} left"
    note(f"Interrupted{still}. What has arrived is kept: run the same command to resume.")
    return INTERRUPTED


def _describe(plan: Plan, fetched: tuple[str, ...]) -> dict[str, Any]:
    files = [
        {"name": file.name, "bytes": file.size, "digest": file.digest, "fetched": file.name in fetched}
        for file in plan.files
    ]
    return {
        "model": str(plan.target),
        "revision": plan.revision,
        "commit": plan.origin.commit,
        "path": str(plan.path),
        "bytes": plan.size,
        "files": files,
        "interrupted": False,
    }
