"""The tables of README, docs/speed.md and docs/planning.md, from the records of the benchmarks on a GPU.

    PYTHONPATH=src python benchmarks/speed_tables.py --write README.md docs/speed.md docs/planning.md
    PYTHONPATH=src python benchmarks/speed_tables.py --machine nvidia-h200 --date 2026-11-21

A table is made from the newest record of its benchmark, or from that of the date; without one it stays as it is.
Without --write every table is printed. A file has room for the table NAME between the lines `<!-- NAME: begin -->` and
`<!-- NAME: end -->`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plot_fits
from embedded_paths import table as paths_table
from embedded_table import filled
from flux_step_cases import OURS
from flux_step_rows import name_of
from gossamer.bench.markdown import table
from gossamer.bench.random_flux import ADAPTERS
from plot_flux_step import cell, models, promise_table, step_ms

RESULTS = Path(__file__).parent / "results"
KINDS = tuple(ADAPTERS)  # of adapters, none first
Record = Mapping[str, Any]


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--machine", default="nvidia-h200")
    made.add_argument("--date", default="????-??-??", help="of the records (default: the newest of each)")
    made.add_argument("--write", nargs="*", type=Path, default=[], help="files to put the tables into")
    options = made.parse_args()
    found = tables(options.machine, options.date)
    for path in options.write:
        path.write_text(filled(path.read_text("utf-8"), found), "utf-8")
    if not options.write:
        print("\n".join(f"# {name}\n{text}" for name, text in found.items()))


def tables(machine: str, date: str) -> dict[str, str]:
    """Every table whose record is there, by its name; `date` may hold wildcards, of which the newest is taken."""
    sources: dict[str, tuple[str, Callable[[Record], str]]] = {
        "flux-step": ("flux_step", step_table),
        "flux-promises": ("flux_step", promises),
        "fits": ("fits", fits_table),
        "fits-promises": ("fits", fits_promises),
        "fits-beside": ("fits_beside_pictures", beside_table),
        "kernels": ("kernels", kernel_table),
        "changes": ("flux_changes", changes_table),
        "prepass": ("prepass", prepass_table),
        "host-memory": ("host_memory", host_table),
        "attention": ("attention", attention_table),
        "embedded-paths": ("embedded_paths", path_table),
    }
    return {
        name: make(json.loads(found[-1].read_text("utf-8")))
        for name, (benchmark, make) in sources.items()
        if (found := sorted(RESULTS.glob(f"{benchmark}-{machine}-{date}.json")))
    }


def step_table(record: Record) -> str:
    """One row a model: time, with adapters, weights, memory beyond them without and with adapters, error."""
    rows = {name_of(row): row for row in record["rows"]}
    head = ["storage -> products", "ms a step", "rank 16", "rank 64", "4 x rank 16", "weights, GB"]
    head += ["beyond, GB", "with adapters", "error"]
    lines = []
    for model in models(rows):
        system, storage, compute = model.split("/")
        bare, adapted = (
            rows[f"{model}/none"],
            [rows[f"{model}/{kind}"] for kind in KINDS[1:] if f"{model}/{kind}" in rows],
        )
        label = f"{system} {storage} -> {compute}".replace(f"{OURS}-copies", f"{OURS}, no copies,")
        label = label.replace(OURS, f"**{OURS}**")
        times = [step_ms(rows, f"{model}/{kind}") for kind in KINDS]
        cells = ["" if each is None else f"{each:.1f}" for each in times]
        most = max(adapted, key=lambda row: row.get("peak_bytes", 0), default=None)
        cells += [cell(bare, "weight_bytes", 1e-9, ".1f"), cell(bare, "peak_bytes", 1e-9, ".2f")]
        cells += [cell(most, "peak_bytes", 1e-9, ".2f"), cell(bare, "relative_error", 1, ".3f")]
        lines.append([label, *cells])
    return table(head, lines) + "\n" + described(record)


def promises(record: Record) -> str:
    """Our time over another's beside what was aimed at."""
    return promise_table({name_of(row): row for row in record["rows"]})


def fits_table(record: Record) -> str:
    """Whole pictures in given amounts of GPU memory."""
    return plot_fits.row_table({row["name"]: row for row in record["rows"]}) + "\n" + described(record)


def fits_promises(record: Record) -> str:
    """What they take beside what was aimed at."""
    return plot_fits.promise_table({row["name"]: row for row in record["rows"]})


def beside_table(record: Record) -> str:
    """Whole pictures by diffusers' pipelines beside ours: time of a step, memory, and what was aimed at."""
    rows, lines = {row["name"]: row for row in record["rows"]}, []
    for way in plot_fits.WAYS:
        theirs, ours = rows[way.picture], rows[way.ours]
        cells = [*_time_and_memory(way.picture, theirs), *_time_and_memory(way.ours, ours)]
        times = theirs["step_seconds"] / ours["step_seconds"]
        kept = times >= way.least and ours["peak_bytes"] <= theirs["peak_bytes"]
        lines.append([*cells, f"{times:.1f}", f"{way.least:g}, at no more memory", "kept" if kept else "**missed**"])
    own = ["ms a step", "peak, GB"]
    head = ["diffusers", *own, "gossamer", *own, "times as fast", "at least", " "]
    return table(head, lines) + "\n" + described(record)


def _time_and_memory(name: str, row: Mapping[str, Any]) -> tuple[str, str, str]:
    return name.removeprefix("diffusers-"), f"{row['step_seconds'] * 1e3:.1f}", f"{row['peak_bytes'] / 1e9:.2f}"


def kernel_table(record: Record) -> str:
    """Every kernel's share of a copy that moves as many bytes."""
    lines = [
        [f"`{row['kernel']}`", f"{row['bytes'] / 1e6:.1f}", f"{row['ms'] * 1e3:.1f}", f"{row['share_of_copy']:.2f}"]
        for row in record["rows"]
        if not row["kernel"].startswith("row scale")
    ]
    return table(["kernel", "MB moved", "us", "share of a copy"], lines) + "\n" + described(record)


CHANGES = {
    "first step, seconds": "first_step_seconds",
    "a step, ms": "step_ms",
    "new resolution: first": "new_resolution_first_ms",
    "its usual step": "new_resolution_step_ms",
    "swap of rank 16": "r16_swap_ms",
    "step after it": "r16_step_after_swap_ms",
    "swap of 4 x rank 16": "4xr16_swap_ms",
    "a scale": "r16_scale_ms",
    "step after it ": "r16_step_after_scale_ms",
}


def changes_table(record: Record) -> str:
    """What changes cost, by model and kernel cache."""
    lines = [
        [row["model"], row["kernel_cache"], *(f"{row[key]:.{1 if row[key] < 100 else 0}f}" for key in CHANGES.values())]
        for row in record["rows"]
    ]
    return table(["model", "kernel cache", *CHANGES], lines) + "\n" + described(record)


def prepass_table(record: Record) -> str:
    """Memory and seconds with the modulation's weights on the GPU and without."""
    lines = [
        [
            "in every step, weights on the GPU"
            if row["modulation"] == "resident"
            else "once a run, weights on the host",
            *(f"{row[key] / 1e9:.2f}" for key in ("allocated_bytes", "peak_bytes")),
            f"{row['step_ms']:.1f}",
            f"{row['prepass_seconds']:.3f}",
        ]
        for row in record["rows"]
    ]
    head = ["modulation, bf16", "allocated, GB", "peak of a step, GB", "ms a step", "seconds of 28 steps"]
    return table(head, lines) + "\n" + described(record)


def host_table(record: Record) -> str:
    """Host memory of a pipeline that streams from a file."""
    lines = [
        [
            row["vram"],
            *(f"{row[key] / 1e9:.2f}" for key in ("file_bytes", "text_bytes", "peak_bytes", "limit_bytes")),
            "kept" if row["kept"] else "**missed**",
            f"{row['most']['owned'] / 1e9:.2f}",
        ]
        for row in record["rows"]
    ]
    head = [
        *("GPU budget", "file, GB", "text encoders", "peak, all of the process", "file + 2 GB", "without the texts"),
        "peak, no page cache",
    ]
    return table(head, lines) + "\n" + described(record)


def attention_table(record: Record) -> str:
    """Each attention backend, alone and sustained."""
    lines = [
        [f"`{row['backend']}`", f"{row['us']:.0f}", f"{row['us_sustained']:.0f}", f"{row['relative_error']:.4f}"]
        for row in record["rows"]
    ]
    return table(["backend", "us alone", "us sustained", "error"], lines) + "\n" + described(record)


def path_table(record: Record) -> str:
    """PSNR of the embedded model's pictures through every path."""
    return paths_table(record["rows"]) + "\n" + described(record)


def described(record: Record) -> str:
    """Machine, date and versions."""
    versions: Mapping[str, str] = record["versions"]
    named = [f"{name} {versions[name]}" for name in ("torch", "triton", "diffusers", "torchao") if name in versions]
    words: Sequence[str] = [f"one {record['machine']['name']}", record["date"], *named]
    return ", ".join(words) + ".\n"


if __name__ == "__main__":
    main()
