"""How long `gossamer run` takes as a user meets it: whole processes, from the shell's start to the picture on disk.

    python benchmarks/run_seconds.py --out benchmarks/results

One warm-up, then `--runs` counted ones for each storage format, each with one style adapter at 20 steps.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from gossamer.bench.record import record_path, stamp, write_record

PROMPT = "a glossy red ball on top of a large blue cube"


def run_once(storage: str, lora: str) -> float:
    """Wall seconds of one process, in a folder of its own: a picture that is there already is not painted again."""
    command = [sys.executable, "-m", "gossamer", "run", PROMPT, "--storage", storage, "--lora", lora, "--steps", "20"]
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        subprocess.run(
            [*command, "--device", "cpu", "--output", str(Path(folder) / "picture.png")],
            check=True,
            capture_output=True,
        )
        return time.perf_counter() - started


def measure(storage: str, lora: str, runs: int) -> dict[str, Any]:
    """Median and spread of the counted runs."""
    run_once(storage, lora)
    seconds = [run_once(storage, lora) for _ in range(runs)]
    return {
        "storage": storage,
        "lora": lora,
        "runs": runs,
        "seconds_median": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storages", default="nf4,fp32")
    parser.add_argument("--lora", default="pencil")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    record = {**stamp(torch.device("cpu")), "threads": torch.get_num_threads(), "rows": []}
    path = record_path(options.out, "run_seconds", record)
    for storage in options.storages.split(","):
        row = measure(storage, options.lora, options.runs)
        record["rows"].append(row)
        write_record(path, record)
        print(f"{storage:>8} {row['seconds_median']:6.2f} s ({row['seconds_min']:.2f} to {row['seconds_max']:.2f})")


if __name__ == "__main__":
    main()
