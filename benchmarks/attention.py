"""Attention of FLUX.1 at 1024x1024: every backend that the chip can run, alone and without a pause.

    PYTHONPATH=src python benchmarks/attention.py --out benchmarks/results [--seconds 1.5]

Needs a CUDA device. (1, 24, 4608, 128) in bf16, q, k and v being views of the buffer of a single block. Alone: the
median of calls that were all queued while the GPU slept. Sustained: the mean over `--seconds` of calls without a pause,
in which a chip comes to its limit of power and slows down. Beside them stand what a call costs the host, and the error
relative to float32. One JSON file.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from gossamer.bench.record import record_path, stamp, write_record
from gossamer.kernels.attention import attend
from gossamer.kernels.backends import attention_backend
from gossamer.kernels.detect import detect
from kernel_bandwidth import times_of

HEADS, TOKENS, HEAD_SIZE = 24, 4608, 128
WIDTH = HEADS * HEAD_SIZE
OPERATIONS = 4 * HEADS * TOKENS**2 * HEAD_SIZE
CHECKED = slice(0, 2)  # heads whose error is measured
QUEUED = 50  # calls between two looks at the clock


def tensors() -> list[torch.Tensor]:
    """q, k, v as a single block has them."""
    torch.manual_seed(0)
    buffer = torch.randn(1, TOKENS, 7 * WIDTH, device="cuda", dtype=torch.bfloat16)
    parts = (buffer[..., i * WIDTH : (i + 1) * WIDTH] for i in range(3))
    return [part.unflatten(-1, (HEADS, HEAD_SIZE)).transpose(1, 2) for part in parts]


def usable() -> list[str]:
    """The backends that nothing forbids here but that another comes first."""
    picked = attention_backend(detect("cuda"), "bf16", HEAD_SIZE, compute="fp8")
    return [picked.name, *(reason.option for reason in picked.rejected if reason.text.startswith("usable"))]


def sustained_us(call: Callable[[], object], seconds: float) -> float:
    """The mean time of calls without a pause."""
    first = before = last = torch.cuda.Event(enable_timing=True)
    started, count = time.perf_counter(), 0
    first.record()
    while time.perf_counter() - started < seconds:
        for _ in range(QUEUED):
            call()
        count += QUEUED
        before.synchronize()  # the host is two rounds ahead, and no further
        before, last = last, torch.cuda.Event(enable_timing=True)
        last.record()
    last.synchronize()
    return first.elapsed_time(last) / count * 1e3


def row(backend: str, given: list[torch.Tensor], seconds: float) -> dict[str, Any]:
    """What is measured of one backend."""
    call = partial(attend, *given, backend)
    expected = F.scaled_dot_product_attention(*(x[:, CHECKED].float() for x in given))
    error = (call()[:, CHECKED].float() - expected).norm() / expected.norm()
    times = times_of(call)
    us = statistics.median(times.gpu_ms) * 1e3
    without_pause = sustained_us(call, seconds)
    return {
        "backend": backend,
        "us": us,
        "us_min": min(times.gpu_ms) * 1e3,
        "us_max": max(times.gpu_ms) * 1e3,
        "teraflops": OPERATIONS / us / 1e6,
        "us_sustained": without_pause,
        "teraflops_sustained": OPERATIONS / without_pause / 1e6,
        "host_us": statistics.median(times.host_us),
        "relative_error": error.item(),
    }


def line(found: dict[str, Any]) -> str:
    """One row of the table."""
    return (
        f"{found['backend']:12} {found['us']:7.1f} us {found['teraflops']:5.0f} TFLOP/s   sustained "
        f"{found['us_sustained']:7.1f} us {found['teraflops_sustained']:5.0f} TFLOP/s   "
        f"host {found['host_us']:4.0f} us   error {found['relative_error']:.5f}"
    )


@torch.inference_mode()
def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON file")
    parser.add_argument("--seconds", type=float, default=1.5, help="of calls without a pause, each backend")
    arguments = parser.parse_args()
    record = stamp(torch.device("cuda", torch.cuda.current_device()))
    record["shape"], record["rows"] = [1, HEADS, TOKENS, HEAD_SIZE], []
    path = record_path(arguments.out, "attention", record)
    given = tensors()
    for backend in usable():
        record["rows"].append(row(backend, given, arguments.seconds))
        print(line(record["rows"][-1]), flush=True)
        write_record(path, record)


if __name__ == "__main__":
    main()
