"""How near our kernels come to a plain device copy: bytes moved over time, against a copy that moves as many bytes.

    PYTHONPATH=src python benchmarks/kernel_bandwidth.py --out benchmarks/results [--only "nf4"] [--seconds 75]

Needs a CUDA device. Each case and its copy are timed one after the other with CUDA events, all calls queued while the
GPU sleeps, so that it never waits for the host; that the queue really was ahead is checked. Beside the times stands
what one call costs the host. The share is the copy's median time over the kernel's. The JSON file is written anew after
every case; after `--seconds` no further case begins.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import decode_cases
import pointwise_cases
from gossamer.bench.record import record_path, stamp, write_record

WARM_UPS, RUNS = 5, 30
SETS = 3  # of copy buffers, so that none is found in the cache
KEPT = 2  # results kept alive, so that the next is not written over the last one, still in the cache
SLEEP_MARGIN_SECONDS, SLEEPS = 1e-3, 6
CYCLES_A_SECOND = 2e9  # no chip is faster; on a slower one the sleep is longer

Call = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Of each counted call: milliseconds on the GPU, microseconds that the host took to queue it."""

    gpu_ms: list[float]
    host_us: list[float]


def host_seconds(call: Call) -> float:
    """Seconds that the host takes for a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def queued(call: Call, sleep_seconds: float) -> Times | None:
    """Times of calls that were all queued while the GPU slept; None where it woke before."""
    kept: deque[object] = deque(maxlen=KEPT)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(RUNS)]
    awake, host = torch.cuda.Event(), []
    torch.cuda._sleep(int(sleep_seconds * CYCLES_A_SECOND))
    awake.record()
    for start, end in events:
        start.record()
        host.append(host_seconds(lambda: kept.append(call())))
        end.record()
    in_time = not awake.query()
    torch.cuda.synchronize()
    return Times([start.elapsed_time(end) for start, end in events], [1e6 * one for one in host]) if in_time else None


@torch.inference_mode()
def times_of(call: Call) -> Times:
    """Times of the counted calls, none of which waited for the host."""
    warm = [host_seconds(call) for _ in range(WARM_UPS)]
    torch.cuda.synchronize()
    sleep_seconds = SLEEP_MARGIN_SECONDS + 2 * RUNS * statistics.median(warm)
    for longer in range(SLEEPS):
        times = queued(call, sleep_seconds * 2**longer)
        if times is not None:
            return times
    raise RuntimeError("the calls cannot be queued ahead of the GPU: one of them waits for it")


def copy_of(moved_bytes: int) -> Call:
    """A device copy that reads half of the bytes and writes the other half."""
    half = moved_bytes // 2
    buffers = [torch.zeros(2, half, dtype=torch.uint8, device="cuda") for _ in range(SETS)]
    order = itertools.cycle(buffers)

    def copy() -> None:
        source, target = next(order)
        target.copy_(source)

    return copy


def measure(name: str, call: Call, moved_bytes: int) -> dict[str, Any]:
    """One row: the kernel, and the copy right after it."""
    ours, copy = times_of(call), times_of(copy_of(moved_bytes))
    ms, copy_ms = statistics.median(ours.gpu_ms), statistics.median(copy.gpu_ms)
    return {
        "kernel": name,
        "bytes": moved_bytes,
        "ms": ms,
        "ms_min": min(ours.gpu_ms),
        "ms_max": max(ours.gpu_ms),
        "host_us": statistics.median(ours.host_us),
        "copy_ms": copy_ms,
        "copy_host_us": statistics.median(copy.host_us),
        "share_of_copy": copy_ms / ms,
        "terabytes_per_second": moved_bytes / ms / 1e9,
    }


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    return (
        f"{row['kernel']:40} {row['bytes'] / 1e6:8.1f} MB {row['ms']:8.4f} ms  copy {row['copy_ms']:8.4f} ms  "
        f"{row['share_of_copy']:5.2f} of copy  {row['terabytes_per_second']:5.2f} TB/s  "
        f"host {row['host_us']:4.0f} us  copy's {row['copy_host_us']:4.0f} us"
    )


def cases(only: str) -> Iterator[tuple[str, Call, int]]:
    """The cases whose name contains `only`."""
    every = itertools.chain(pointwise_cases.cases(), decode_cases.cases())
    return (case for case in every if only in case[0])


def main() -> None:
    """Measure, print and write."""
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON file")
    parser.add_argument("--only", default="", help="measure the cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further case after this time")
    arguments = parser.parse_args()
    record = stamp(torch.device("cuda", torch.cuda.current_device()))
    record["rows"], record["stopped_at"] = [], None
    path = record_path(arguments.out, "kernels", record)
    for name, call, moved_bytes in cases(arguments.only):
        if time.perf_counter() - started > arguments.seconds:
            record["stopped_at"] = name
            write_record(path, record)
            print(f"stopped after {arguments.seconds:.0f} s, before {name!r}", flush=True)
            break
        record["rows"].append(measure(name, call, moved_bytes))
        print(line(record["rows"][-1]), flush=True)
        write_record(path, record)


if __name__ == "__main__":
    main()
