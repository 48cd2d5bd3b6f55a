"""Every path through the kernels paints the same picture: the embedded model on a GPU, storage by compute type.

    PYTHONPATH=src python benchmarks/embedded_paths.py
    PYTHONPATH=src python benchmarks/embedded_paths.py --table RECORD.json

A path's pictures are held to those of the reference on the same GPU: the same stored weights, decoded in torch and
multiplied in bf16 without any kernel of ours. Beside it stands what the storage itself changes: its reference against
bf16 weights. PSNR in dB, the mean over prompts; with and without a style adapter. --table prints a record as Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gossamer
from gossamer.bench import markdown
from gossamer.bench.record import read_resumed, record_path, stamp, write_record
from gossamer.errors import GossamerError, InvalidOptionError
from gossamer.models.flux import Operators
from gossamer.models.swap import linear_layers

PROMPTS = (
    "a red cube to the left of a blue sphere",
    "a glossy yellow cone on top of a large green cube",
    "a purple cylinder",
    "a teal ring behind an orange ball",
)
STORAGES = ("bf16", "fp8", "fp8_e5m2", "int8", "nf4", "nf4-dq", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "IQ4_XS")
COMPUTES = ("exact", "fp8", "int8")
ADAPTER = "pencil"
PEAK_SQUARED = 255.0**2
Pictures = list[np.ndarray[Any, np.dtype[np.float64]]]


def main() -> None:
    options = parser().parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text("utf-8"))["rows"]))
        return
    if not torch.cuda.is_available():
        raise InvalidOptionError(
            "There is no GPU to measure on.",
            "Kernels run on an NVIDIA GPU only.",
            "Run the benchmark on a machine with one.",
        )
    fresh = {**stamp(torch.device("cuda")), "steps": options.steps, "prompts": list(PROMPTS), "rows": []}
    record = read_resumed(options.resume, fresh) if options.resume else fresh
    done = {row["storage"] for row in record["rows"]}
    path = record_path(options.out, "embedded_paths", record)
    plain = reference_pictures("bf16", options.steps, None)
    for storage in (each for each in options.storages.split(",") if each not in done):
        record["rows"].append(row_of(storage, options.steps, plain))
        write_record(path, record)
        print(record["rows"][-1], flush=True)
    print(path)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--storages", default=",".join(STORAGES), help="formats, with commas between them")
    made.add_argument("--steps", type=int, default=20)
    made.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the record")
    made.add_argument("--resume", type=Path, help="a record of the same machine and versions; its rows are kept")
    made.add_argument("--table", type=Path, help="print the table of a record and measure nothing")
    return made


def row_of(storage: str, steps: int, plain: Pictures) -> dict[str, Any]:
    """PSNR of every path of a storage, and of the storage itself."""
    row: dict[str, Any] = {"storage": storage}
    for adapter, ending in ((None, ""), (ADAPTER, "+adapter")):
        expected = reference_pictures(storage, steps, adapter)
        if adapter is None:
            row["storage alone"] = likeness(expected, plain)
        for compute in COMPUTES:
            pipe = gossamer.load(storage=storage, device="cuda", compute=compute)
            row[f"{compute}{ending}"] = likeness(paint(pipe, steps, adapter), expected)
    return row


def reference_pictures(storage: str, steps: int, adapter: str | None) -> Pictures:
    """The pictures of the torch reference on this GPU."""
    pipe = gossamer.load(storage=storage, device="cuda")
    pipe.transformer.operators = Operators()
    for layer in linear_layers(pipe.transformer).values():
        layer.execution = None
    return paint(pipe, steps, adapter)


def paint(pipe: Any, steps: int, adapter: str | None) -> Pictures:
    """One picture a prompt, the first with seed 0."""
    if adapter:
        pipe.attach(adapter)
    made = (pipe(prompt, seed=seed, steps=steps) for seed, prompt in enumerate(PROMPTS))
    return [np.asarray(picture, dtype=np.float64) for picture in made]


def likeness(pictures: Pictures, others: Pictures) -> float | None:
    """Mean PSNR in dB over the pictures that differ; None where all are the same to the last pixel."""
    errors = [float(np.mean((one - other) ** 2)) for one, other in zip(pictures, others, strict=True)]
    found = [10 * float(np.log10(PEAK_SQUARED / error)) for error in errors if error]
    return round(statistics.fmean(found), 1) if found else None


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The record as Markdown."""
    heads, lines = list(rows[0]), []
    for row in rows:
        figures = (row[head] for head in heads[1:])
        lines.append([f"`{row['storage']}`", *("same" if each is None else f"{each:.1f}" for each in figures)])
    return markdown.table(heads, lines)


if __name__ == "__main__":
    try:
        main()
    except GossamerError as error:
        sys.exit(f"{type(error).code}: {error}")
