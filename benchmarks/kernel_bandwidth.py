"""How near our kernels come to a plain device copy: bytes moved over time, against a copy that moves as many bytes.

    PYTHONPATH=src python benchmarks/kernel_bandwidth.py --out benchmarks/results [--only "nf4"]

Needs a CUDA device. Each case and its copy are timed one after the other with CUDA events; the share is the copy's
median time over the kernel's. The JSON file is written anew after every case.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import decode_cases
import pointwise_cases
from gossamer.bench.record import record_path, stamp, write_record

WARM_UPS, RUNS = 5, 30
SETS = 3  # of copy buffers, so that none is found in the cache


def times_ms(call: Callable[[], object]) -> list[float]:
    """Milliseconds of each counted call."""
    for _ in range(WARM_UPS):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(RUNS)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def copy_of(moved_bytes: int) -> Callable[[], object]:
    """A device copy that reads half of the bytes and writes the other half."""
    half = moved_bytes // 2
    buffers = [torch.zeros(2, half, dtype=torch.uint8, device="cuda") for _ in range(SETS)]
    order = itertools.cycle(buffers)

    def copy() -> None:
        source, target = next(order)
        target.copy_(source)

    return copy


def measure(name: str, call: Callable[[], object], moved_bytes: int) -> dict[str, Any]:
    """One row: the kernel, and the copy right after it."""
    ours, copy = times_ms(call), times_ms(copy_of(moved_bytes))
    ms, copy_ms = statistics.median(ours), statistics.median(copy)
    return {
        "kernel": name,
        "bytes": moved_bytes,
        "ms": ms,
        "ms_min": min(ours),
        "ms_max": max(ours),
        "copy_ms": copy_ms,
        "share_of_copy": copy_ms / ms,
        "terabytes_per_second": moved_bytes / ms / 1e9,
    }


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    return (
        f"{row['kernel']:40} {row['bytes'] / 1e6:8.1f} MB {row['ms']:8.4f} ms  copy {row['copy_ms']:8.4f} ms  "
        f"{row['share_of_copy']:5.2f} of copy  {row['terabytes_per_second']:5.2f} TB/s"
    )


def cases(only: str) -> Iterator[tuple[str, Callable[[], object], int]]:
    """The cases whose name contains `only`."""
    every = itertools.chain(pointwise_cases.cases(), decode_cases.cases())
    return (case for case in every if only in case[0])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON file")
    parser.add_argument("--only", default="", help="measure the cases whose name contains this")
    arguments = parser.parse_args()
    record = stamp(torch.device("cuda", torch.cuda.current_device()))
    record["rows"] = []
    path = record_path(arguments.out, "kernels", record)
    for case in cases(arguments.only):
        record["rows"].append(measure(*case))
        print(line(record["rows"][-1]), flush=True)
        write_record(path, record)


if __name__ == "__main__":
    main()
