"""What a change costs at full size: the first step of all, a new resolution, another set of adapters, another scale.

    PYTHONPATH=src python benchmarks/flux_changes.py
    PYTHONPATH=src python benchmarks/flux_changes.py --models fp8/fp8,nf4/fp8 --out benchmarks/results

FLUX.1-dev on random weights that are on the GPU already, 1024x1024. Every model is measured in two processes, the
first with empty kernel caches, the second with those that the first one left. A change is timed by the host's clock
around the call and a synchronisation; what the step after it takes longer than a usual step is told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flux_step_cases import attach_ours, build_ours, detach_ours
from flux_step_rows import prepass_of
from gossamer.adapters import attached, set_scale
from gossamer.adapters.host_memory import ready_for
from gossamer.bench.random_flux import Workload, full_size, random_adapters, step_inputs, tiny
from gossamer.bench.record import record_path, stamp, write_record
from gossamer.bench.timing import require_gpu, wait
from gossamer.errors import GossamerError

MODELS = "bf16/bf16,fp8/fp8,nf4/fp8,Q4_K/fp8,Q8_0/bf16"
USUAL_STEPS = 5  # of which the median is the usual step
SWAPS = 5  # likewise, each with the steps after it
OTHER_SIDE = 768  # pixels of the other resolution
Row = dict[str, Any]


def main() -> None:
    options = parser().parse_args()
    device = torch.device("cpu" if options.quick else "cuda")
    require_gpu(device, "The full-size model takes minutes a step on a CPU.")
    if options.one:
        print(json.dumps(measured((tiny if options.quick else full_size)(device), options.one)))
        return
    record = {**stamp(device), "workload": "FLUX.1-dev, 1024x1024" if not options.quick else "quick", "rows": []}
    path = record_path(options.out, "flux_changes", record)
    for model in options.models.split(","):
        with tempfile.TemporaryDirectory() as caches:
            for cache in ("empty", "filled"):
                row = {"model": model, "kernel_cache": cache, **apart(model, options.quick, caches)}
                record["rows"].append(row)
                write_record(path, record)
                print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    print(path)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", default=MODELS, help="storage/compute, with commas between them")
    made.add_argument("--quick", action="store_true", help="three small blocks on the CPU, to try the benchmark itself")
    made.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the record")
    made.add_argument("--one", help=argparse.SUPPRESS)  # one model, in this process
    return made


def apart(model: str, quick: bool, caches: str) -> Row:
    """The row of a model, from a process of its own with its own kernel caches."""
    folders = {"TRITON_CACHE_DIR": f"{caches}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor"}
    command = [sys.executable, __file__, "--one", model, *(["--quick"] if quick else [])]
    done = subprocess.run(command, env={**os.environ, **folders}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


@torch.no_grad()
def measured(work: Workload, name: str) -> Row:
    """All changes of one model, in milliseconds unless the name says seconds."""
    storage, compute = name.split("/")
    model = build_ours(work, storage, compute)
    inputs = step_inputs(work)
    model.modulator = prepass_of(model, inputs)

    def step() -> object:
        return model(**inputs, return_dict=False)[0]

    row: Row = {"first_step_seconds": milliseconds(step, work) / 1e3}
    row |= {"second_step_ms": milliseconds(step, work), "step_ms": usual(step, work)}
    other = step_inputs(replace(work, side=OTHER_SIDE if work.side > 64 else 32))
    times = [milliseconds(lambda: model(**other, return_dict=False), work) for _ in range(2 + USUAL_STEPS)]
    row |= {"new_resolution_first_ms": times[0], "new_resolution_second_ms": times[1]}
    row |= {"new_resolution_step_ms": statistics.median(times[2:])}
    for kind in ("r16", "4xr16"):
        row |= adapter_changes(model, work, step, kind)
    return {key: round(value, 3) for key, value in row.items()}


def adapter_changes(model: Any, work: Workload, step: Callable[[], object], kind: str) -> Row:
    """Swapping all adapters for others of the same ranks, several times, and changing the scale of one.

    The others were read before, and are in host memory. The step after a swap is told of the first one.
    """
    detach_ours(model)
    attach_ours(model, random_adapters(work, kind))
    before = usual(step, work)
    others = [ready_for(adapter, work.device) for adapter in random_adapters(work, kind)]  # as a reader leaves them

    def swap() -> None:
        detach_ours(model)
        attach_ours(model, others)

    swaps, steps = [], []
    for _ in range(SWAPS):
        swaps.append(milliseconds(swap, work))
        steps.append(milliseconds(step, work))
        usual(step, work)
    row = {f"{kind}_step_ms": before, f"{kind}_step_after_swap_ms": steps[0]}
    row |= {f"{kind}_swap_ms": statistics.median(swaps), f"{kind}_swap_ms_max": max(swaps)}
    name = next(iter(attached(model)))
    row[f"{kind}_scale_ms"] = milliseconds(lambda: set_scale(model, name, 0.5), work)
    row[f"{kind}_step_after_scale_ms"] = milliseconds(step, work)
    return row


def usual(step: Callable[[], object], work: Workload) -> float:
    """Milliseconds of a step that nothing preceded."""
    return statistics.median(milliseconds(step, work) for _ in range(USUAL_STEPS))


def milliseconds(call: Callable[[], object], work: Workload) -> float:
    """The host's clock around a call and all work that it queues."""
    wait(work.device)
    started = time.perf_counter()
    call()
    wait(work.device)
    return (time.perf_counter() - started) * 1e3


if __name__ == "__main__":
    try:
        main()
    except GossamerError as error:
        sys.exit(f"{type(error).code}: {error}")
