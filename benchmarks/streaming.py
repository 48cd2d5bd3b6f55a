"""A step of full-size FLUX.1-dev with its block weights streamed from the host: ours over resident blocks and slots.

    PYTHONPATH=src python benchmarks/streaming.py
    PYTHONPATH=src python benchmarks/streaming.py --cases nf4/fp8,Q8_0/bf16 --resident 0,28,57 --slots 2,3

1024x1024, batch 1, 512 text tokens, random weights. Each model is built once. Its first row has every weight on the GPU
as a plain model has; then all block weights go to the host, and every further row changes the placement in place. The
modulation is computed in a pre-pass from weights on the host, whose time is `prepass_ms`; a step does not count it.

    peak_bytes        most that the process had allocated during the timed steps, model, inputs and all
    streamed_bytes    copied to the GPU in every step
    slowdown          step_ms over that of the resident row with the same adapters
    same_result       whether the result is bit for bit that of the resident row
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from flux_step_cases import attach_ours, build_ours, detach_ours
from flux_step_rows import prepass_of, run_modulation
from gossamer.bench.random_flux import ADAPTERS, Workload, full_size, random_adapters, step_inputs, tiny
from gossamer.bench.record import record_path, stamp, write_record
from gossamer.bench.timing import Repeats, Timing, measure, release_memory, require_gpu
from gossamer.errors import GossamerError
from gossamer.memory.offload import Offload, arrange_blocks, block_count, offload
from gossamer.memory.placement import Placement

Row = dict[str, Any]

CASES = "nf4/fp8,Q8_0/fp8,fp8/fp8,bf16/bf16"
RESIDENT = "0,10,20,30,40,50,57"


def main() -> None:
    options = parser().parse_args()
    device = torch.device("cpu" if options.quick else "cuda")
    require_gpu(device, "What is measured is the overlap of copies with the computing of a GPU.", "stream to")
    work = (tiny if options.quick else full_size)(device)
    record = {**stamp(device), "workload": work.name, "rows": []}
    path = record_path(options.out, "streaming", record)
    for case in options.cases.split(","):
        for row in rows_of(case, options, work):
            record["rows"].append(row)
            write_record(path, record)
            print(line(row), flush=True)
        release_memory(device)
    print(path)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--cases", default=CASES, help="storage/compute, with commas between them")
    made.add_argument("--resident", default=RESIDENT, help="numbers of resident blocks, with commas between them")
    made.add_argument("--slots", default="2", help="numbers of slots, with commas between them")
    made.add_argument("--adapters", default="none", help=f"kinds of adapters: {', '.join(ADAPTERS)}")
    made.add_argument("--unpinned", action="store_true", help="through the staging ring, as from a file")
    made.add_argument("--quick", action="store_true", help="three small blocks on the CPU, to try the benchmark itself")
    made.add_argument("--steps", type=int, default=8, help="timed steps a row")
    made.add_argument("--warmup", type=int, default=2, help="untimed steps after the first")
    made.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the record")
    return made


# one model ------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Subject:
    """A built model with its inputs and a pre-pass, and the resident row of each kind of adapters."""

    work: Workload
    storage: str
    compute: str
    repeats: Repeats
    resident: dict[str, Timing] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.inputs = step_inputs(self.work)
        self.model = build_ours(self.work, self.storage, self.compute)
        self.prepass = self.model.modulator = prepass_of(self.model, self.inputs)

    @torch.no_grad()
    def timed(self) -> Timing:
        """Steps as they are now."""
        return measure(lambda: self.model(**self.inputs, return_dict=False)[0], self.work.device, self.repeats, 0)

    @torch.no_grad()
    def prepass_ms(self) -> float:
        """The modulation of a whole run."""
        modulation = run_modulation(self.model, self.prepass, self.inputs)
        return measure(modulation, self.work.device, replace(self.repeats, timed=3), 0).median_ms


def rows_of(case: str, options: argparse.Namespace, work: Workload) -> Iterator[Row]:
    """The resident row of each kind of adapters, then every placement with each of them."""
    storage, _, compute = case.partition("/")
    subject = Subject(work, storage, compute, Repeats(options.warmup, options.steps))
    kinds = options.adapters.split(",")
    for kind in with_adapters(subject, kinds):
        timing = subject.resident[kind] = subject.timed()
        yield {**labels(subject, kind), "resident_blocks": None, **figures(subject, kind, timing)}
    handle = offload({"transformer": subject.model}, Placement(0, pinned=not options.unpinned), work.device)
    release_memory(work.device)
    prepass_ms = subject.prepass_ms()
    for placement in placements(options, block_count(subject.model)):
        arrange_blocks(handle.parts["transformer"], placement, block_count(subject.model))
        for kind in with_adapters(subject, kinds):
            row = figures(subject, kind, subject.timed())
            yield {**labels(subject, kind), **placed(handle, placement), **row, "prepass_ms": prepass_ms}


def with_adapters(subject: Subject, kinds: Sequence[str]) -> Iterator[str]:
    """Each kind, its adapters attached while the caller looks at it."""
    for kind in kinds:
        attach_ours(subject.model, random_adapters(subject.work, kind))
        yield kind
        detach_ours(subject.model)


def placements(options: argparse.Namespace, count: int) -> Iterator[Placement]:
    """Every number of resident blocks with every number of slots, the fewest resident ones first."""
    for resident in sorted({min(int(number), count) for number in options.resident.split(",")}):
        for slots in options.slots.split(",") if resident < count else ("1",):
            yield Placement(resident, int(slots), not options.unpinned)


# one row --------------------------------------------------------------------------------------------------------------


def labels(subject: Subject, kind: str) -> Row:
    """What was measured."""
    return {"storage": subject.storage, "compute": subject.compute, "adapters": kind}


def placed(handle: Offload, placement: Placement) -> Row:
    """Where the weights were."""
    part = handle.parts["transformer"]
    return {
        "resident_blocks": placement.resident_blocks,
        "slots": placement.slots,
        "pinned": placement.pinned,
        "device_bytes": part.device_bytes,
        "streamed_bytes": part.streamed_bytes,
    }


def figures(subject: Subject, kind: str, timing: Timing) -> Row:
    """What came out, against the resident row."""
    resident = subject.resident[kind]
    return {
        "step_ms": timing.median_ms,
        "step_ms_min": timing.min_ms,
        "step_ms_max": timing.max_ms,
        "first_call_seconds": timing.first_call_seconds,
        "peak_bytes": timing.peak_bytes,
        "slowdown": timing.median_ms / resident.median_ms,
        "same_result": bool(torch.equal(timing.result, resident.result)),
    }


def line(row: Row) -> str:
    """A row for people."""
    where = "resident" if row["resident_blocks"] is None else f"{row['resident_blocks']:2} blocks, {row['slots']} slots"
    memory = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f} GB"
    bus = f"{row.get('streamed_bytes', 0) / row['step_ms'] / 1e6:5.1f} GB/s"
    same = "same" if row["same_result"] else "OTHER RESULT"
    name = f"{row['storage']}/{row['compute']}/{row['adapters']}"
    return f"{name:16} {where:18} {row['step_ms']:8.1f} ms  x {row['slowdown']:.3f}  peak {memory:8}  bus {bus}  {same}"


if __name__ == "__main__":
    try:
        main()
    except GossamerError as error:
        sys.exit(f"{type(error).code}: {error}")
