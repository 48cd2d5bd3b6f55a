"""FLUX.1-dev at full size in a given amount of GPU memory: whole pictures by the planner's plans, and diffusers' ways.

    PYTHONPATH=src python benchmarks/fits.py
    PYTHONPATH=src python benchmarks/fits.py --rows 'nf4/*,Q8_0/4GB' --steps 20
    PYTHONPATH=src python benchmarks/fits.py --resume benchmarks/results/fits-nvidia-h200-2026-11-20.json --rows 'fp8/*'

1024x1024, batch 1, 512 text tokens, random weights; transformer, T5-XXL, CLIP-L and VAE at full size, text encoders in
NF4. A row is STORAGE/BUDGET: its plan is made for that budget as `gossamer run --vram BUDGET --storage STORAGE` makes
it, the allocator is capped, and a picture is painted after one of two steps that warms up. `free` is without a budget;
`streamed` has none of the transformer's blocks stay, in 2.3 GB for everything (--offload sequential): 1.5 GB for the
transformer with its tensors, and the VAE, what CUDA takes, and gaps.
Parts are built once and placed anew for each row. Rows of diffusers are steps of its transformer alone, or whole
pictures of a few steps (`-picture`).

    peak_bytes            most that tensors took, all parts together    predicted_peak_bytes      the plan's word for it
    reserved_bytes        most that the allocator took                  limit_bytes               what it was capped at
    driver_bytes          what the driver counts for the device, less what it counted before this process took any
    step_seconds          mean from the third step on                   predicted_step_seconds
    picture_seconds       prompt to pixels                              host_bytes   resident memory at the end
    bus_seconds           streamed bytes of a step at the rate of a plain copy from pinned memory, measured here
    prepass_seconds       modulation of a run of 28 steps, weights from the host; in rows named `free` only
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from fits_peers import PEERS
from fits_pictures import PICTURES
from fits_pictures import painted as painted_by_diffusers
from fits_pipeline import PROMPT, SMALL, TEXT_STORAGE, Model, build, build_shared, pipeline_of
from flux_step_rows import prepass_of, run_modulation
from gossamer.bench.host_memory import host_memory
from gossamer.bench.random_flux import full_size, step_inputs, tiny
from gossamer.bench.record import read_resumed, record_path, stamp, write_record
from gossamer.bench.timing import Repeats, release_memory, require_gpu, wait
from gossamer.errors import GossamerError, InvalidOptionError, UnknownOptionError
from gossamer.memory.budget import Budget
from gossamer.memory.byte_sizes import parse_bytes, show_bytes
from gossamer.memory.cards import find_card
from gossamer.memory.gpu_memory import reset_peak
from gossamer.memory.model_specs import DEV
from gossamer.memory.offload_carousel import Arrangement
from gossamer.memory.offload_host import host_bytes
from gossamer.memory.picture import Job
from gossamer.memory.plan import smallest
from gossamer.memory.request import PlanRequest
from gossamer.pipeline.fit import Fit, card_here, fit_request
from gossamer.pipeline.options import PaintOptions
from gossamer.pipeline.painter import Pipeline
from gossamer.pipeline.parse import Size
from gossamer.pipeline.residence import Residence

Row = dict[str, Any]

FREE, STREAMED = "free", "streamed"
STREAMED_BUDGET = "2.3GB"
BUDGETS = {
    "nf4": (FREE, "8GB", "6GB", "5GB", "4GB", "3GB", "2GB", STREAMED),
    "nf4-dq": (FREE, STREAMED),
    "Q8_0": (FREE, "12GB", "8GB", "6GB", "4GB"),
    "fp8": (FREE, "12GB", "6GB"),
    "bf16": (FREE, "24GB", "16GB", "8GB", "4GB"),
}
OURS = tuple(f"{storage}/{budget}" for storage, budgets in BUDGETS.items() for budget in budgets)
NAMES = (*OURS, *PEERS, *PICTURES)
HOST_BYTES = 100 * 10**9
BUS_BYTES = 1 << 29
ERROR_LENGTH = 400


def main() -> None:
    options = parser().parse_args()
    if options.list:
        print("\n".join(NAMES))
        return
    names = wanted(options.rows.split(","))
    device = torch.device("cpu" if options.quick else "cuda:0")
    require_gpu(device, "What is measured is how a GPU's memory is used.")
    model = model_of(device, options.quick)
    record = read_resumed(options.resume, fresh(model)) if options.resume else fresh(model)
    path = record_path(options.out, "fits", record)
    done = {row["name"] for row in record["rows"]}
    for row in measured([name for name in names if name not in done], model, options):
        record["rows"].append(row)
        write_record(path, record)
        print(line(row), flush=True)
    print(path)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rows", default="*", help="patterns of row names, with commas between them")
    made.add_argument("--list", action="store_true", help="print all row names")
    made.add_argument("--steps", type=int, default=20, help="of a picture")
    made.add_argument("--peer-steps", type=int, default=3, help="timed steps of a row of diffusers")
    made.add_argument("--host", type=parse_bytes, default=HOST_BYTES, help="host memory to plan with")
    made.add_argument("--quick", action="store_true", help="three small blocks on the CPU, to try the benchmark itself")
    made.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the record")
    made.add_argument("--resume", type=Path, help="a record of the same machine and versions; its rows are kept")
    return made


# which rows -----------------------------------------------------------------------------------------------------------


def wanted(patterns: Sequence[str]) -> list[str]:
    """Row names that any pattern fits."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in NAMES):
            raise UnknownOptionError(
                f"No row is called {pattern!r}.",
                f"There are {len(NAMES)} rows, such as {NAMES[0]!r}.",
                "See them all with --list; patterns may hold * and ?.",
            )
    return [name for name in NAMES if any(fnmatchcase(name, pattern) for pattern in patterns)]


def model_of(device: torch.device, quick: bool) -> Model:
    work = (tiny if quick else full_size)(device)
    if not quick:
        return Model(DEV, work)
    return Model(replace(SMALL, transformer=work.spec), replace(work, side=64, text_tokens=SMALL.text_tokens))


# the record -----------------------------------------------------------------------------------------------------------


def fresh(model: Model) -> dict[str, Any]:
    return {**stamp(model.work.device), "workload": model.work.name, "text_storage": TEXT_STORAGE, "rows": []}


def line(row: Row) -> str:
    """A row for people."""
    if "error" in row:
        return f"{row['name']:26} failed: {row['error']}"
    if "plan" not in row:
        return (
            f"{row['name']:26} {row['step_seconds'] * 1000:8.1f} ms a step, peak {show_bytes(row['peak_bytes'] or 0)}"
        )
    plan = row["plan"]
    placed = f"{plan['resident_blocks']:2} blocks, text {plan['text']}, VAE {plan['vae']}"
    memory = "" if row["peak_bytes"] is None else _beside(row["peak_bytes"], row["predicted_peak_bytes"], "GB", 1e-9)
    step = _beside(row["step_seconds"], row["predicted_step_seconds"], "ms", 1000)
    return f"{row['name']:12} {placed:42} {memory:28} {step:28} {row['picture_seconds']:6.2f} s a picture"


def _beside(actual: float, predicted: float, unit: str, factor: float) -> str:
    return f"{actual * factor:.2f} {unit} ({predicted * factor:.2f}, {actual / predicted - 1:+.0%})"


# measuring ------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Bench:
    """What all rows of ours share: the parts besides the transformer, and what the driver counted at the beginning."""

    model: Model
    options: argparse.Namespace
    before: int
    bus: float | None  # bytes a second

    def request(self, storage: str, budget: str) -> PlanRequest:
        """As `gossamer run` asks the planner."""
        device = self.model.work.device
        card = card_here(device) if device.type == "cuda" else find_card("H200")
        side, tokens = self.model.work.side, self.model.spec.text_tokens
        free = PlanRequest(
            subject=self.model.subject,
            card=card,
            budget=Budget(card.memory_bytes, self.options.host, host_reserve=0),
            job=Job(side, side, 1, self.options.steps, tokens),
            storage=storage,
            text_storage=TEXT_STORAGE,
        )
        if budget == FREE:
            return free
        given = STREAMED_BUDGET if budget == STREAMED else budget
        offload = "sequential" if budget == STREAMED else "auto"
        return replace(free, budget=replace(free.budget, gpu=self._bytes(given, free)), offload=offload)

    def _bytes(self, budget: str, free: PlanRequest) -> int:
        """Of the GPU; a small model gets 2 GB for its smallest plan, and 24 for having everything there."""
        size = parse_bytes(budget)
        if not self.options.quick:
            return size
        most = fit_request(free, is_promise=False).chosen
        least, whole = smallest(free, most).peak_gpu_bytes, most.peak_gpu_bytes
        return free.budget.gpu_for(least + int((whole - least) * (size - 2e9) / 22e9))


def measured(names: Sequence[str], model: Model, options: argparse.Namespace) -> Iterator[Row]:
    """Every row; our own first, by storage format, then diffusers'."""
    before = driver_bytes(model.work.device)
    bench = Bench(model, options, before, bus_rate(model.work.device))
    shared = build_shared(model) if any(name in OURS for name in names) else {}
    for storage, budgets in BUDGETS.items():
        own = [budget for budget in budgets if f"{storage}/{budget}" in names]
        if own:
            yield from rows_of(bench, storage, own, shared)
            release_memory(model.work.device)
    shared.clear()
    for name in names:
        if name not in OURS:
            release_memory(model.work.device)
            yield peer_row(name, bench)


def rows_of(bench: Bench, storage: str, budgets: Sequence[str], shared: dict[str, Any]) -> Iterator[Row]:
    """All budgets of one storage format over the same parts, placed anew for each."""
    model, device = bench.model, bench.model.work.device
    parts = build(model, storage, shared)
    residence: Residence | None = None
    for budget in budgets:
        name = f"{storage}/{budget}"
        try:
            fit = fit_request(bench.request(storage, budget), is_promise=budget != FREE)
        except InvalidOptionError as error:
            yield {"name": name, "storage": storage, "error": f"{error.what} {error.why}"[:ERROR_LENGTH]}
            continue
        placing = time.perf_counter()
        if residence is None:
            residence = Residence(parts, fit, device)
        else:
            residence.place(fit)
        wait(device)
        placed = time.perf_counter() - placing
        pipeline = pipeline_of(model, parts, storage, residence)
        yield {"name": name, "storage": storage, "placing_seconds": placed, **painted(bench, pipeline, fit, budget)}
    if residence is not None:
        residence.withdraw()


def painted(bench: Bench, pipeline: Pipeline, fit: Fit, budget: str) -> Row:
    """One picture after a short one, and what it took."""
    model, device = bench.model, bench.model.work.device
    paint = PaintOptions(PROMPT, steps=bench.options.steps, size=Size(model.work.side, model.work.side))
    release_memory(device)
    reset_peak(device)
    pipeline.paint(replace(paint, steps=2))
    painting = pipeline.paint(paint)
    plan = pipeline.plan
    assert plan is not None  # it was placed by one
    row = {
        "plan": {key: value for key, value in plan.as_json().items() if key not in ("reasons", "gpu_bytes")},
        "fell_back": plan != fit.chosen,
        "budget_bytes": fit.request.budget.gpu,
        "limit_bytes": fit.limit,
        "predicted_peak_bytes": plan.peak_gpu_bytes,
        "predicted_step_seconds": plan.step_seconds,
        "predicted_picture_seconds": plan.total_seconds,
        "gpu_bytes": {phase: dict(taken) for phase, taken in plan.gpu_bytes.items()},
        "peak_bytes": pipeline.peak_gpu_bytes,
        "reserved_bytes": torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
        "driver_bytes": driver_bytes(device) - bench.before,
        "streamed_bytes": streamed_bytes(fit),
        "bus_seconds": None if bench.bus is None else streamed_bytes(fit) / bench.bus,
        "step_seconds": painting.seconds_per_step,
        "picture_seconds": painting.seconds,
        "host_bytes": resident_bytes(),
        "pixels_sha256": painting.pixels_sha256,
    }
    return {**row, "prepass_seconds": prepass_seconds(pipeline, model)} if budget == FREE else row


@torch.no_grad()
def prepass_seconds(pipeline: Pipeline, model: Model) -> float:
    """The modulation of a whole run, its weights where the placement has them; the better of two."""
    transformer, inputs = pipeline.transformer, step_inputs(model.work)
    modulation = run_modulation(transformer, prepass_of(transformer, inputs), inputs)
    times = []
    for _ in range(2):
        wait(model.work.device)
        started = time.perf_counter()
        modulation()
        wait(model.work.device)
        times.append(time.perf_counter() - started)
    return min(times)


def peer_row(name: str, bench: Bench) -> Row:
    """A few steps of diffusers' transformer, or a picture by its pipeline; what fails is a row that says so."""
    labels = {"name": name, "storage": name.rpartition("/")[2]}
    if bench.options.quick:
        return {**labels, "error": "diffusers offloads to a GPU only"}
    try:
        measured = (steps_of_peer if name in PEERS else picture_of_peer)(name, bench)
    except Exception as error:  # noqa: BLE001 - a peer that fails is a result
        return {**labels, "error": f"{type(error).__name__}: {error}"[:ERROR_LENGTH]}
    driver = driver_bytes(bench.model.work.device) - bench.before
    return {**labels, **measured, "driver_bytes": driver, "host_bytes": resident_bytes()}


def steps_of_peer(name: str, bench: Bench) -> Row:
    timing = PEERS[name](bench.model.work, Repeats(1, bench.options.peer_steps))
    return {
        "step_seconds": timing.median_ms / 1000,
        "first_call_seconds": timing.first_call_seconds,
        "peak_bytes": timing.peak_bytes,
    }


def picture_of_peer(name: str, bench: Bench) -> Row:
    return painted_by_diffusers(PICTURES[name](bench.model), bench.model, bench.options.peer_steps + 1)


def streamed_bytes(fit: Fit) -> int:
    """Weights that a step of the plan copies."""
    blocks = fit.request.subject.transformer(fit.chosen.storage).blocks
    return sum(Arrangement.of(fit.chosen.placement, len(blocks)).streamed(dict(enumerate(blocks))).values())


def bus_rate(device: torch.device) -> float | None:
    """Bytes a second of one large copy from pinned memory, the best of five; None without a GPU."""
    if device.type != "cuda":
        return None
    source = host_bytes(BUS_BYTES, device)
    target = torch.empty(BUS_BYTES, dtype=torch.uint8, device=device)
    times = []
    for _ in range(5):
        wait(device)
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        wait(device)
        times.append(time.perf_counter() - started)
    del target
    release_memory(device)  # torch would put the first weights into its segment, and then keep all of it under a cap
    return BUS_BYTES / min(times)


def driver_bytes(device: torch.device) -> int:
    """What the driver counts as taken on the device, by whomever; 0 without a GPU. Asking makes no CUDA context."""
    if device.type != "cuda":
        return 0
    query = ("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", f"--id={device.index or 0}")
    return int(subprocess.run(query, check=True, capture_output=True, text=True).stdout) * 2**20


def resident_bytes() -> int | None:
    """Resident memory of this process, pinned pages included; None where the system does not say."""
    now = host_memory()
    return None if now is None else now.resident


if __name__ == "__main__":
    try:
        main()
    except GossamerError as error:
        sys.exit(f"{type(error).code}: {error}")
