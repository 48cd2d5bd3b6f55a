"""What the pre-pass of the modulation saves at full size, and how long it takes.

    PYTHONPATH=src python benchmarks/prepass.py
    PYTHONPATH=src python benchmarks/prepass.py --models bf16/bf16,nf4/fp8

FLUX.1-dev on random weights, the transformer alone, 1024x1024, a run of 28 steps. Every model is measured twice: with
all weights on the GPU and the modulation computed in each step, as diffusers does; then by a placement whose modulation
weights come to the GPU for the pre-pass only. Steps run call by call, so that no graph's memory is in the figures.

    weight_bytes        of the modulation, counted
    allocated_bytes     tensors on the GPU between two steps, inputs and, after the pre-pass, the vectors of the run
    peak_bytes          most that tensors took in a step        prepass_peak_bytes      in the pre-pass itself
    step_ms             median of a step; the pre-pass is not in it
    prepass_seconds     modulation of 28 steps, its weights where the row's placement has them
    saved_bytes         of the peak of a step                   kept    saved is at least 6 GB, prepass at most 0.3 s
    relative_error      of a step's result after the pre-pass, against the plain way
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from flux_step_cases import build_ours
from flux_step_rows import RUN_STEPS, prepass_of, run_modulation
from gossamer.bench.metrics import relative_error
from gossamer.bench.random_flux import Workload, full_size, step_inputs, tiny
from gossamer.bench.record import record_path, stamp, write_record
from gossamer.bench.timing import Repeats, Timing, allocated_bytes, measure, release_memory, require_gpu
from gossamer.errors import GossamerError
from gossamer.memory.offload import block_count, offload
from gossamer.memory.offload_part import modulation_linears
from gossamer.memory.placement import Placement
from gossamer.models.flux.step import run_step

MODELS = "bf16/bf16"
SAVED_BYTES = 6 * 10**9  # at least, in bf16
PREPASS_SECONDS = 0.3  # at most
Row = dict[str, Any]


def main() -> None:
    options = parser().parse_args()
    device = torch.device("cpu" if options.quick else "cuda:0")
    require_gpu(device, "What is measured is the memory of a GPU.")
    work, repeats = (tiny if options.quick else full_size)(device), Repeats(2, options.steps)
    record = {**stamp(device), "workload": work.name, "run_steps": RUN_STEPS, "rows": []}
    path = record_path(options.out, "prepass", record)
    for model in options.models.split(","):
        for row in rows_of(model, work, repeats):
            record["rows"].append(row)
            write_record(path, record)
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        release_memory(device)
    print(path)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", default=MODELS, help="storage/compute, with commas between them")
    made.add_argument("--steps", type=int, default=8, help="timed steps a row")
    made.add_argument("--quick", action="store_true", help="three small blocks on the CPU, to try the benchmark itself")
    made.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the record")
    return made


@torch.no_grad()
def rows_of(name: str, work: Workload, repeats: Repeats) -> Iterator[Row]:
    """The row of each place of the modulation's weights, the GPU first."""
    storage, compute = name.split("/")
    model, inputs = build_ours(work, storage, compute), step_inputs(work)
    model.stepper = run_step
    weights = sum(layer.stored.kept.nbytes for layer in modulation_linears(model))
    plain, result = row_of(model, inputs, repeats)
    yield {"model": name, "modulation": "resident", "weight_bytes": weights, **plain}
    placement = Placement(block_count(model), modulation="prepass")
    handle = offload({"transformer": model}, placement, work.device)
    model.modulator = prepass_of(model, inputs)
    row, other = row_of(model, inputs, repeats)
    yield {
        "model": name,
        "modulation": "prepass",
        "weight_bytes": weights,
        **row,
        **compared(plain, row),
        "relative_error": relative_error(other, result),
        "host_bytes": handle.parts["modulation"].host_bytes,
    }


def row_of(model: Any, inputs: dict[str, torch.Tensor], repeats: Repeats) -> tuple[Row, torch.Tensor]:
    """Memory and time as the model is now, and the result of a step."""
    device = inputs["timestep"].device
    passing = prepass_timing(model, inputs, repeats)
    release_memory(device)
    timing = measure(lambda: model(**inputs, return_dict=False)[0], device, repeats, 0)
    row = {
        "allocated_bytes": allocated_bytes(device) - timing.result.nbytes if device.type == "cuda" else None,
        "peak_bytes": timing.peak_bytes,
        "prepass_peak_bytes": passing.peak_bytes,
        "step_ms": timing.median_ms,
        "prepass_seconds": passing.median_ms / 1e3,
    }
    return row, timing.result.clone()


def prepass_timing(model: Any, inputs: dict[str, torch.Tensor], repeats: Repeats) -> Timing:
    """The modulation of a whole run, its weights where the placement has them."""
    return measure(run_modulation(model, prepass_of(model, inputs), inputs), inputs["timestep"].device, repeats, 0)


def compared(plain: Row, row: Row) -> Row:
    """What is saved, and whether that and the time are within what was promised; None where nobody counts memory."""
    if plain["peak_bytes"] is None:
        return {"saved_bytes": None, "kept": None}
    saved = plain["peak_bytes"] - row["peak_bytes"]
    return {"saved_bytes": saved, "kept": saved >= SAVED_BYTES and row["prepass_seconds"] <= PREPASS_SECONDS}


if __name__ == "__main__":
    try:
        main()
    except GossamerError as error:
        sys.exit(f"{type(error).code}: {error}")
