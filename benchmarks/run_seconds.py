"""How long `gossamer run` takes as a user meets it: whole processes, from the shell's start to the picture on disk.

    python benchmarks/run_seconds.py --out benchmarks/results

One warm-up, then `--runs` counted ones for each storage format, each with one style adapter at 20 steps. Other programs
on the same cores slow it down several times over: `load` is the machine's load average before and after. By itself the
command brings it to about the number of its threads.
"""

from __future__ import annotations

import argparse
import os
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
        done = subprocess.run(
            [*command, "--device", "cpu", "--output", str(Path(folder) / "picture.png")],
            check=False,
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return seconds


def measure(storage: str, lora: str, runs: int) -> dict[str, Any]:
    """Median and spread of the counted runs."""
    before = os.getloadavg()[0]
    run_once(storage, lora)
    seconds = [run_once(storage, lora) for _ in range(runs)]
    after = os.getloadavg()[0]
    return {
        "storage": storage,
        "lora": lora,
        "runs": runs,
        "load": [round(before, 1), round(after, 1)],
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
