"""Which geometry decodes FLUX's widest layer fastest, with and without low-rank terms: times free of host cost.

    PYTHONPATH=src python benchmarks/tune_decode.py --seconds 90 --out benchmarks/results

Needs a CUDA device. Kernels are compiled by worker processes, which put them into Triton's cache and run nothing; this
process takes each variant as it becomes ready, times it behind large products that keep the GPU busy while the calls
queue, and compares its result with torch. It stops by itself; what was not reached is left out of the table.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import astuple
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from gossamer.bench.record import record_path, stamp, write_record
from tune_decode_bench import Bench, compile_variant, start_worker
from tune_decode_variants import OUTPUTS, STORAGES, TRITON_PLAIN, jobs

Row = dict[str, Any]


def measure(deadline: float, storages: list[str], workers: int) -> list[Row]:
    """Rows of all variants that were reached."""
    rows, wanted = [], jobs(storages)
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=start_worker)
    pending = {pool.submit(compile_variant, *job): job for job in wanted}
    bench = Bench()
    torch.mm(bench.cover[0], bench.cover[1], out=bench.cover[2])
    # while the workers start
    for storage in storages:
        for output in OUTPUTS:
            moved = bench.layers(storage)[0].nbytes + bench.outs[output][0].nbytes
            rows.append({"case": f"{storage} -> {output} ", "variant": "copy", "us": bench.copy(moved), "wrong": 0})
    while pending and time.monotonic() < deadline:
        done, _ = wait(pending, timeout=max(0.1, deadline - time.monotonic()), return_when=FIRST_COMPLETED)
        for future in sorted(done, key=lambda f: (pending[f][0].storage, pending[f][0].rank)):
            case, variant = pending.pop(future)
            if time.monotonic() > deadline:
                break
            row = {"case": str(case), **case.__dict__, "variant": str(variant), "numbers": astuple(variant)}
            try:
                failure = future.result()
                bench_one = bench.row_scale if case.output == "scale" else bench.decode
                row |= {"failed": failure} if failure else bench_one(case, variant)
            except Exception as error:  # noqa: BLE001 - a variant that fails is a result
                traceback.print_exc()
                row["failed"] = repr(error)[:200]
                if "CUDA error" in str(error) or "illegal" in str(error):
                    print("the GPU is lost; stopping", flush=True)
                    pending.clear()
                    break
            rows.append(row)
            if "failed" in row or row["wrong"] or row.get("inexact") or not row["hidden"]:
                print("!", json.dumps(row), flush=True)
    print(f"{len(wanted) - len(pending)} of {len(wanted)} variants", flush=True)
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.kill()
    return rows


def show(rows: list[Row]) -> None:
    """The table: a line a case, its variants from fast to slow; then the best, and what its terms add."""
    good = [row for row in rows if "us" in row and not row["wrong"]]
    cases = list(dict.fromkeys(row["case"] for row in sorted(good, key=lambda r: r["case"])))
    by_case = {
        c: sorted((r for r in good if r["case"] == c and r["variant"] != "copy"), key=lambda r: r["us"]) for c in cases
    }
    copies = {row["case"]: row["us"] for row in rows if row["variant"] == "copy" and "us" in row}
    for case, found in by_case.items():
        print(f"{case:18}", "  ".join(f"{row['variant']} {row['us']:.1f}" for row in found))
    print("best a case: us, share of a copy, and what terms add to Triton's plain variant and to the best one")
    for case, found in by_case.items():
        if not found:
            continue
        best, plain = found[0], by_case.get(case.rsplit(" ", 1)[0] + " ", [])
        first = next((r["us"] for r in plain if r["variant"] == str(TRITON_PLAIN)), float("nan"))
        least = plain[0]["us"] if plain else float("nan")
        copy = copies.get(case.rsplit(" ", 1)[0] + " ", float("nan"))
        added = f"+{best['us'] - first:5.1f} / +{best['us'] - least:5.1f}" if best.get("rank") else f"{'':15}"
        print(f"{case:18} {best['us']:6.1f}  {copy / best['us']:4.2f} of copy  {added}  {best['variant']}")


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--only", default=",".join(STORAGES), help="stored formats, with commas")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the record")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("There is no GPU to measure on: kernels are timed on an NVIDIA GPU only.")
    rows = measure(time.monotonic() + arguments.seconds - 4, arguments.only.split(","), arguments.workers)
    record = {**stamp(torch.device("cuda")), "rows": rows}
    write_record(record_path(arguments.out, "tune_decode", record), record)
    show(rows)
    sys.stdout.flush()
    os._exit(0)  # compiling threads of the pool must not keep the machine


if __name__ == "__main__":
    main()
