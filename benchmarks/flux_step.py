"""One denoising step of full-size FLUX.1-dev on random weights: Gossamer's rows and its peers', in one run.

    PYTHONPATH=src python benchmarks/flux_step.py
    PYTHONPATH=src python benchmarks/flux_step.py --rows 'gossamer/nf4/*,torchao+compile/*/none'
    PYTHONPATH=src python benchmarks/flux_step.py --resume benchmarks/results/flux_step-nvidia-h200-2026-11-21.json

1024x1024, batch 1, 512 text tokens. A row is `system/storage/compute/adapters`; `gossamer-copies` gets no merged copies
of weights that are multiplied as stored. Every row is timed after --settle seconds of steps, or a third of that where
the same model ran just before: a chip that was idle while a model was built or compiled is faster for a while. Each
model runs in a process of its own with empty kernel caches, so that the `first_call_seconds` of its first row owes
nothing to another model, and a crash ends one model only; with --one-process all share one, which saves their starts.
The record is written anew after every row. A peer that fails leaves a row with its "error"; a row of our own that fails
ends the run.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from flux_step_cases import CASES, OURS, Case, row_names
from flux_step_rows import Bench, Row, keep_reference, labels, name_of, rows_of
from gossamer.bench.random_flux import ADAPTERS, Workload, full_size, tiny
from gossamer.bench.record import read_resumed, record_path, stamp, write_record
from gossamer.bench.timing import Repeats, require_gpu
from gossamer.errors import GossamerError, UnknownOptionError

Plan = list[tuple[Case, list[str]]]

SETTLE = 8.0  # seconds
LIBRARIES = ("accelerate", "bitsandbytes", "gguf", "optimum-quanto", "peft", "torchao", "triton")


def main() -> None:
    options = parser().parse_args()
    # bitsandbytes logs a line at every 8-bit product; writing hundreds of them a step would be timed along
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if options.list:
        print("\n".join(row_names()))
        return
    device = torch.device("cpu" if options.quick else "cuda")
    require_gpu(device, "The full-size model takes 48 GB in float32 and minutes a step on a CPU.")
    plan = planned(options.rows.split(","))
    work = (tiny if options.quick else full_size)(device)
    record = read_resumed(options.resume, fresh(work)) if options.resume else fresh(work)
    path = record_path(options.out, "flux_step", record)
    plan = without_rows(plan, record["rows"])
    with tempfile.TemporaryDirectory() as folder:
        references = options.references or Path(folder)
        if options.one_process:
            repeats = Repeats(options.warmup, options.steps, options.settle)
            run_here(Bench(work, repeats, references), plan, record, path)
        else:
            run_apart(options, references, plan, record, path)
    print(path)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rows", default="*", help="patterns of row names, with commas between them")
    made.add_argument("--list", action="store_true", help="print all row names")
    made.add_argument("--quick", action="store_true", help="three small blocks on the CPU, to try the benchmark itself")
    made.add_argument("--one-process", action="store_true", help="measure all models in this process")
    made.add_argument("--steps", type=int, default=20, help="timed steps a row")
    made.add_argument("--warmup", type=int, default=Repeats.warmup, help="untimed steps after the first, at least")
    made.add_argument(
        "--settle", type=float, default=SETTLE, help="seconds of untimed steps before a model's first row"
    )
    made.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the record")
    made.add_argument("--resume", type=Path, help="a record of the same machine and versions; its rows are kept")
    made.add_argument("--references", type=Path, help="folder to keep the float32 results in between runs")
    return made


# which rows -----------------------------------------------------------------------------------------------------------


def planned(patterns: Sequence[str]) -> Plan:
    """Cases, each with its kinds of adapters, that any pattern fits."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in row_names()):
            raise UnknownOptionError(
                f"No row is called {pattern!r}.",
                f"There are {len(row_names())} rows, such as {row_names()[0]!r}.",
                "See them all with --list; patterns may hold * and ?.",
            )
    wanted = [
        (case, [kind for kind in ADAPTERS if any(fnmatchcase(case.row_name(kind), pattern) for pattern in patterns)])
        for case in CASES
    ]
    return [(case, kinds) for case, kinds in wanted if kinds]


def without_rows(plan: Plan, rows: Sequence[Row]) -> Plan:
    """The plan without what is measured already."""
    done = {name_of(row) for row in rows}
    left = [(case, [kind for kind in kinds if case.row_name(kind) not in done]) for case, kinds in plan]
    return [(case, kinds) for case, kinds in left if kinds]


# the record -----------------------------------------------------------------------------------------------------------


def fresh(work: Workload) -> dict[str, Any]:
    """A record without rows."""
    begun = stamp(work.device)
    found = {library: _version(library) for library in LIBRARIES}
    installed = {library: number for library, number in found.items() if number is not None}
    return {**begun, "versions": {**begun["versions"], **installed}, "workload": work.name, "rows": []}


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def add(row: Row, record: dict[str, Any], path: Path) -> None:
    """Append a row, write the record, print the row."""
    record["rows"].append(row)
    write_record(path, record)
    head = f"{name_of(row):34}"
    if "error" in row:
        print(f"{head} failed: {row['error']}", flush=True)
        return
    spread = f"({row['step_ms_min']:.1f} to {row['step_ms_max']:.1f})"
    memory = ["-" if row[key] is None else f"{row[key] / 1e9:.2f} GB" for key in ("weight_bytes", "peak_bytes")]
    rest = f"first {row['first_call_seconds']:6.1f} s  error {row['relative_error']:.4f}"
    print(f"{head} {row['step_ms']:8.1f} ms {spread:20} weights {memory[0]:9} beyond {memory[1]:8} {rest}", flush=True)


# measuring ------------------------------------------------------------------------------------------------------------


def run_here(bench: Bench, plan: Plan, record: dict[str, Any], path: Path) -> None:
    """Every row in this process, references first: one of them takes more memory than any model measured."""
    for kind in ADAPTERS:
        if any(kind in kinds for _, kinds in plan):
            keep_reference(bench, kind)
    for case, kinds in plan:
        for row in rows_of(case, kinds, bench):
            add(row, record, path)


def run_apart(options: argparse.Namespace, references: Path, plan: Plan, record: dict[str, Any], path: Path) -> None:
    """Every case in a process of its own."""
    for case, kinds in plan:
        write_record(path, record)
        command = _command(options, references, case, kinds, path)
        with tempfile.TemporaryDirectory() as caches:
            code = subprocess.run(command, env=_fresh_caches(caches)).returncode
        record |= json.loads(path.read_text("utf-8"))
        missing = [left for _, left in without_rows([(case, kinds)], record["rows"])]
        if code and case.system == OURS:
            sys.exit(code)
        for kind in missing[0] if missing else []:
            add({**labels(case, kind), "error": f"its process ended with code {code}"}, record, path)


def _command(options: argparse.Namespace, references: Path, case: Case, kinds: Sequence[str], path: Path) -> list[str]:
    rows = ",".join(case.row_name(kind) for kind in kinds)
    same = ["--steps", str(options.steps), "--warmup", str(options.warmup), "--settle", str(options.settle)]
    same += ["--quick"] if options.quick else []
    where = ["--resume", str(path), "--out", str(path.parent), "--references", str(references)]
    return [sys.executable, __file__, "--one-process", "--rows", rows, *where, *same]


def _fresh_caches(folder: str) -> dict[str, str]:
    return {**os.environ, "TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}


if __name__ == "__main__":
    try:
        main()
    except GossamerError as error:
        sys.exit(f"{type(error).code}: {error}")
