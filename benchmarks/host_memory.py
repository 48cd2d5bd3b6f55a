"""Host memory of a pipeline whose transformer is streamed from a 4-bit GGUF file, against the file's size + 2 GB.

    PYTHONPATH=src python benchmarks/host_memory.py
    PYTHONPATH=src python benchmarks/host_memory.py --file flux1-dev-Q4_K_S.gguf --rows 6GB/T5-XXL,8GB/T5-XXL

A FLUX.1-dev transformer of random values is written as a GGUF file (or `--file` is taken), and beside it a folder with
random text encoders, VAE, and the tokenizers of the embedded model. `gossamer.load(FILE, base=FOLDER, vram=BUDGET)`
loads them, and a picture of a few steps is painted, in a process of its own for each row. A row is BUDGET/TEXTS:

    short-T5    one layer of T5's width: what the process takes for the transformer, with little else beside it
    T5-XXL      FLUX.1's encoder, in bf16 as its file has it; `text_bytes` of the process' memory are its and CLIP's

Memory is what Linux counts for the process. `resident` is all of it, which is `anonymous` + `shared` + `file`:

    shared      pinned memory that copies to the GPU start from
    file        pages of mapped files that were looked at, the checkpoint's and those of libraries; they are the page
                cache's, and the system takes them back when it needs them. What is read with `read` is not in it.
    owned       anonymous and shared together, which nobody takes back

    before              after Python, torch, diffusers and the CUDA context, before any weight
    loaded, painted     afterwards                  most     of each kind by samples of 20 ms
    peak_bytes          VmHWM, files included       limit_bytes     the checkpoint's size + 2 GB
    kept                peak_bytes - text_bytes is at most limit_bytes
    kept_with_texts     peak_bytes itself is
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gossamer
from fits import model_of
from fits_pipeline import PROMPT, Model, write_base
from gossamer.bench.host_memory import HostMemory, host_memory, peak_resident_bytes, watched
from gossamer.bench.random_gguf import shapes_of, write_gguf
from gossamer.bench.record import record_path, stamp, write_record
from gossamer.bench.timing import release_memory, require_gpu, wait
from gossamer.errors import GossamerError, InvalidOptionError
from gossamer.memory.model_specs import T5Spec
from gossamer.pipeline.components import pipeline_kinds
from gossamer.pipeline.options import STORED, PaintOptions
from gossamer.pipeline.painter import Pipeline
from gossamer.pipeline.parse import Size

Row = dict[str, Any]

XXL, SHORT = "T5-XXL", "short-T5"
ROWS = f"2GB/{SHORT},6GB/{SHORT},3GB/{XXL},6GB/{XXL}"  # two layers of T5-XXL in bf16 do not fit 2 GB
ALLOWED_BYTES = 2 * 10**9  # beside the file
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Task:
    """One row, as its process is told of it. `vram` is None where there is no GPU, and nothing is streamed then."""

    name: str
    file: str
    base: str
    vram: str | None
    steps: int
    side: int


def main() -> None:
    options = parser().parse_args()
    if options.one:
        print(json.dumps(measured(Task(**json.loads(options.one)))))
        return
    device = torch.device("cpu" if options.quick else "cuda:0")
    require_gpu(device, "What is measured is the host's part of a model that is streamed to a GPU.")
    record = {**stamp(device), "storage": options.storage, "steps": options.steps, "rows": []}
    path = record_path(options.out, "host_memory", record)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for task in written(model_of(device, options.quick), Path(folder), options):
            record["rows"].append(apart(task))
            write_record(path, record)
            print(line(record["rows"][-1]), flush=True)
    print(path)
    sys.exit(any("error" in row for row in record["rows"]))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--file", type=Path, help="a GGUF file of a FLUX.1-dev transformer (default: one is written)")
    made.add_argument("--storage", default="Q4_K", help="block type of the file that is written")
    made.add_argument("--rows", default=ROWS, help="BUDGET/TEXTS, with commas between them")
    made.add_argument("--steps", type=int, default=4, help="of a picture")
    made.add_argument("--folder", type=Path, help="where files are written (default: the system's)")
    made.add_argument("--quick", action="store_true", help="three small blocks on the CPU, to try the benchmark itself")
    made.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the record")
    made.add_argument("--one", help=argparse.SUPPRESS)  # one row, in this process
    return made


# in the first process -------------------------------------------------------------------------------------------------


def written(model: Model, folder: Path, options: argparse.Namespace) -> Iterator[Task]:
    """All rows, once their files are there; no two folders of text encoders at a time."""
    file = options.file or folder / f"flux-{options.storage}.gguf"
    if options.file is None:
        write_gguf(file, shapes_of(model.spec.transformer, options.storage), model.work.std)
    names = options.rows.split(",")
    for texts in dict.fromkeys(name.partition("/")[2] for name in names):
        with tempfile.TemporaryDirectory(dir=folder) as base:
            write_base(with_texts(model, texts), Path(base))
            release_memory(model.work.device)
            for name in names:
                budget, _, own = name.partition("/")
                vram = budget if model.work.device.type == "cuda" else None
                if own == texts:
                    yield Task(name, str(file), base, vram, options.steps, model.work.side)


def with_texts(model: Model, texts: str) -> Model:
    """The model with one of the two T5 encoders."""
    if texts == XXL:
        return model
    if texts != SHORT:
        raise InvalidOptionError(
            f"No text encoder is called {texts!r}.",
            f"A row is a budget of the GPU, a slash, and {SHORT} or {XXL}.",
            f"Name rows such as {ROWS}.",
        )
    short = T5Spec(layers=1, width=model.spec.t5.width, heads=1, head_size=64, hidden=256, vocabulary=1000)
    return replace(model, spec=replace(model.spec, t5=short))


def apart(task: Task) -> Row:
    """The row of a task, from a process of its own."""
    command = [sys.executable, __file__, "--one", json.dumps(asdict(task))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"name": task.name, "error": f"its process ended with code {done.returncode}"}
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def line(row: Row) -> str:
    """A row for people, in GB."""
    if "error" in row:
        return f"{row['name']:14} failed: {row['error']}"
    most, before = row["most"] or {}, row["before"] or {}
    kinds = ", ".join(f"{kind} {most[kind] / 1e9:.2f} ({before[kind] / 1e9:.2f} before)" for kind in most)
    peak, texts, limit = (f"{(row[key] or 0) / 1e9:.2f}" for key in ("peak_bytes", "text_bytes", "limit_bytes"))
    kept = {True: "kept", False: "MISSED", None: "not measured"}[row["kept"]]
    return f"{row['name']:14} peak {peak} GB with {texts} of texts, limit {limit}: {kept}; most {kinds}"


# in a process of its own ----------------------------------------------------------------------------------------------


def measured(task: Task) -> Row:
    """Load and paint once, and what that took."""
    device = torch.device("cpu" if task.vram is None else "cuda:0")
    pipeline_kinds()
    started = torch.zeros(1, device=device)  # the CUDA context comes with the first tensor
    wait(started.device)
    before = host_memory()
    with watched() as watch:
        chosen = {"text_storage": STORED, "device": str(device), "vram": task.vram}
        pipeline = gossamer.load(task.file, base=task.base, storage=STORED, **chosen)
        loaded = host_memory()
        size = Size(task.side, task.side)
        painting = pipeline.paint(PaintOptions(PROMPT, steps=task.steps, size=size))
        painted = host_memory()
    file_bytes, peak, texts = Path(task.file).stat().st_size, peak_resident_bytes(), text_bytes(pipeline)
    limit = file_bytes + ALLOWED_BYTES
    return {
        "name": task.name,
        "vram": task.vram,
        "plan": planned(pipeline),
        "before": as_json(before),
        "loaded": as_json(loaded),
        "painted": as_json(painted),
        "most": as_json(watch.most),
        "peak_bytes": peak,
        "text_bytes": texts,
        "file_bytes": file_bytes,
        "text_file_bytes": sum(file.stat().st_size for file in text_files(task)),
        "limit_bytes": limit,
        "kept": None if peak is None else peak - texts <= limit,
        "kept_with_texts": None if peak is None else peak <= limit,
        "peak_gpu_bytes": pipeline.peak_gpu_bytes,
        "step_seconds": painting.seconds_per_step,
        "picture_seconds": painting.seconds,
    }


def planned(pipeline: Pipeline) -> Row | None:
    """The plan that was carried out; None without a GPU."""
    plan = pipeline.plan
    return None if plan is None else {key: value for key, value in plan.as_json().items() if key != "reasons"}


def as_json(memory: HostMemory | None) -> Row | None:
    return None if memory is None else asdict(memory)


def text_files(task: Task) -> Iterator[Path]:
    """Weights of the text encoders."""
    for name in TEXT_ENCODERS:
        yield from (Path(task.base) / name).glob("*.safetensors")


def text_bytes(pipeline: Pipeline) -> int:
    """Weights of the text encoders in host memory, each once."""
    modules = [part for name, part in pipeline.components.items() if name in TEXT_ENCODERS]
    found = {id(tensor): tensor for part in modules for tensor in tensors(part) if tensor.device.type == "cpu"}
    return sum(tensor.nbytes for tensor in found.values())


def tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


if __name__ == "__main__":
    try:
        main()
    except GossamerError as error:
        sys.exit(f"{type(error).code}: {error}")
