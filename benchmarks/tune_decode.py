"""Which geometry decodes the linears of FLUX fastest, with and without low-rank terms: times free of host cost.

    PYTHONPATH=src python benchmarks/tune_decode.py --cases 'nf4 -> fp8*,Q4_K -> fp8 r16' --seconds 120

Needs a CUDA device. Kernels are compiled by worker processes, which put them into Triton's cache and run nothing; this
process takes each geometry as it becomes ready, times it on every shape that a step of FLUX.1 decodes, behind large
products that keep the GPU busy while the calls queue, and compares a result with torch. It stops by itself; what was
not reached is left out of the table.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict
from fnmatch import fnmatchcase
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from gossamer.bench.record import record_path, stamp, write_record
from gossamer.kernels.decode_geometry import Geometry
from gossamer.kernels.decode_support import READABLE
from tune_decode_bench import Bench, compile_geometry, start_worker
from tune_decode_variants import OUTPUTS, RANKS, Case, jobs, short_name

Row = dict[str, Any]


def measure(deadline: float, cases: list[Case], workers: int) -> list[Row]:
    """Rows of all geometries that were reached."""
    wanted = jobs(cases)
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=start_worker)
    pending = {pool.submit(compile_geometry, *job): job for job in wanted}
    bench = Bench()
    rows = [{"case": str(case), "geometry": "copy", **bench.copy(case)} for case in cases if not case.rank]
    while pending and time.monotonic() < deadline:
        done, _ = wait(pending, timeout=max(0.1, deadline - time.monotonic()), return_when=FIRST_COMPLETED)
        for future in sorted(done, key=lambda one: pending[one][0].storage):
            rows.append(measured(bench, *pending.pop(future), future.result()))
            if time.monotonic() > deadline:
                break
    print(f"{len(wanted) - len(pending)} of {len(wanted)} geometries", flush=True)
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.kill()
    return rows


def measured(bench: Bench, case: Case, geometry: Geometry, failure: str) -> Row:
    """The row of one geometry; what went wrong is printed at once."""
    row: Row = {"case": str(case), "geometry": short_name(geometry), "numbers": asdict(geometry)}
    row |= {"failed": failure} if failure else bench.decode(case, geometry)
    if "failed" in row or row["wrong"]:
        print("!", json.dumps(row), flush=True)
    return row


def show(rows: list[Row]) -> None:
    """Two lines a case: its geometries from fast to slow, then the best against a copy."""
    copies = {row["case"]: row["ms"] for row in rows if row["geometry"] == "copy"}
    by_case: dict[str, list[Row]] = {}
    for row in rows:
        if "ms" in row and not row.get("wrong") and row["geometry"] != "copy":
            by_case.setdefault(row["case"], []).append(row)
    print("milliseconds of all decoding in a step")
    for case, found in sorted(by_case.items()):
        present = found[0]["ms"]
        found.sort(key=lambda row: row["ms"])
        print(f"{case:18}", "  ".join(f"{row['geometry']} {row['ms']:.2f}" for row in found[:12]))
        copy = copies.get(case.rsplit(" r", 1)[0], float("nan"))
        shares = f"{copy / found[0]['ms']:.2f} of a copy, us {found[0]['us']}"
        print(f"{'':18} first measured {present:.2f}, best {found[0]['ms']:.2f}, {shares}")


def known_cases() -> list[Case]:
    """Every format to every output at every rank; plain values need no geometry of their own."""
    storages = [name for name, known in READABLE.items() if known.family != "plain"]
    return [Case(storage, output, rank) for storage in storages for output in OUTPUTS for rank in RANKS]


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--cases", default="*", help="patterns of cases, with commas between them")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the record")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("There is no GPU to measure on: kernels are timed on an NVIDIA GPU only.")
    patterns = arguments.cases.split(",")
    cases = [case for case in known_cases() if any(fnmatchcase(str(case), pattern) for pattern in patterns)]
    rows = measure(time.monotonic() + arguments.seconds - 4, cases, arguments.workers)
    record = {**stamp(torch.device("cuda")), "rows": rows}
    write_record(record_path(arguments.out, "tune_decode", record), record)
    show(rows)
    sys.stdout.flush()
    os._exit(0)  # compiling threads of the pool must not keep the machine


if __name__ == "__main__":
    main()
