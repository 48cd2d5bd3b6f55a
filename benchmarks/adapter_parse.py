"""How long it takes to read an adapter for the full-size model from memory: header, names, values checked, SHA-256.

    python benchmarks/adapter_parse.py --out benchmarks/results

A file of random bf16 factors for all 504 linears of FLUX.1-dev is written to a temporary folder in each spelling and
read by a process of its own, once before it counts (so that the file is in memory; that time is `first_seconds`, with
the tables of names still to be made) and then `--runs` times. `hash_seconds` is what the SHA-256 alone takes.
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
from pathlib import Path
from typing import Any

import torch

from gossamer.adapters import Adapter, LowRankTerm, read_adapter, write_adapter
from gossamer.bench.random_flux import FLUX_DEV
from gossamer.bench.record import record_path, stamp, write_record
from gossamer.checkpoints.safetensors_file import sha256_file
from gossamer.models.flux_spec import FluxSpec, linear_shapes

SPEC = FluxSpec.from_config(FLUX_DEV)
SPELLINGS = ("kohya", "diffusers", "bfl")


def write(path: Path, spelling: str, rank: int) -> None:
    """A random adapter; parts of a fused module share their `down`, as trainers of BFL's names write them."""
    generator = torch.Generator().manual_seed(0)
    terms, downs = {}, {}
    for name, (out_features, in_features) in linear_shapes(SPEC).items():
        shared = spelling != "diffusers" and name.rpartition(".")[2] in PARTS
        block = name.split(".attn.")[0].removesuffix(".proj_mlp") + ("add" if ".add_" in name else "")
        key = block if shared else name
        if key not in downs:
            downs[key] = torch.randn(rank, in_features, generator=generator).mul_(0.02).bfloat16()
        up = torch.randn(out_features, rank, generator=generator).mul_(0.02).bfloat16()
        terms[name] = LowRankTerm(downs[key], up)
    write_adapter(Adapter(SPEC, terms), path, spelling)


PARTS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "proj_mlp")


def seconds(call: Any) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure(path: Path, runs: int) -> dict[str, Any]:
    """In this process, which has read no adapter yet."""
    path.read_bytes()
    first = seconds(lambda: read_adapter(path, SPEC))
    later = [seconds(lambda: read_adapter(path, SPEC)) for _ in range(runs)]
    hashing = statistics.median(seconds(lambda: sha256_file(path)) for _ in range(runs))
    return {
        "mb": round(path.stat().st_size / 1e6, 1),
        "linears": len(read_adapter(path, SPEC).terms),
        "runs": runs,
        "first_seconds": round(first, 4),
        "seconds_median": round(statistics.median(later), 4),
        "seconds_min": round(min(later), 4),
        "seconds_max": round(max(later), 4),
        "hash_seconds": round(hashing, 4),
    }


def in_own_process(path: Path, runs: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", str(path), "--runs", str(runs)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure, options.runs)))
        return
    record = {**stamp(torch.device("cpu")), "threads": torch.get_num_threads(), "load": os.getloadavg()[0], "rows": []}
    path = record_path(options.out, "adapter_parse", record)
    for spelling in SPELLINGS:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "adapter.safetensors"
            write(file, spelling, options.rank)
            row = {"spelling": spelling, "rank": options.rank, **in_own_process(file, options.runs)}
        record["rows"].append(row)
        write_record(path, record)
        print(row)


if __name__ == "__main__":
    main()
