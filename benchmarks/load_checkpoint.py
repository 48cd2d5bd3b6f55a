"""How fast a big GGUF file becomes weights that a GPU could take, against reading the same file and doing nothing.

    python benchmarks/load_checkpoint.py --gigabytes 12.7 --folder /tmp --out benchmarks/results
    python benchmarks/load_checkpoint.py --storage Q4_K --device cuda

A file with the names and shapes of FLUX.1-dev is written (as many blocks as fit the size; 12.7 GB is all of them),
read once by `cat FILE >/dev/null`, loaded by `gossamer.load_transformer`, and read by `cat` again, `--runs` times. In
the row "cold" the file is taken out of the page cache before each, in "warm" it is left there. The file is deleted at
the end. Loading copies every byte into memory of the process, or onto the GPU with `--device cuda`. `host_peak_bytes`
is the most of the process that was resident meanwhile, pages of the mapped file included.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import gossamer
from gossamer.bench.host_memory import begin_peak, peak_resident_bytes
from gossamer.bench.random_gguf import nbytes, shapes_of, write_gguf
from gossamer.bench.record import record_path, stamp, write_record
from gossamer.bench.timing import wait
from gossamer.models.flux_spec import FluxSpec


def spec_of(gigabytes: float, storage: str) -> FluxSpec:
    """FLUX.1-dev, with fewer blocks where the size does not hold all: one double block for two single ones."""
    for double in range(19, 0, -1):
        spec = FluxSpec(double, 2 * double, 24, 128, 64, 64, 4096, 768, guidance_embeds=True)
        if sum(nbytes(*entry) for entry in shapes_of(spec, storage).values()) <= gigabytes * 1e9:
            return spec
    raise SystemExit("The file has to hold at least one block of each kind: 1 GB.")


def read_by_cat(path: Path) -> None:
    with Path(os.devnull).open("wb") as nothing:
        subprocess.run(["cat", str(path)], check=True, stdout=nothing)


def load(path: Path, device: torch.device) -> None:
    """Every byte of the file in memory of our own, or on the GPU."""
    model = gossamer.load_transformer(path, device=str(device))
    wait(device)
    del model


def forget(path: Path) -> None:
    """Take the file out of the page cache, whose pages have to be on the disk for that."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_of(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(path: Path, device: torch.device, runs: int, cold: bool) -> dict[str, Any]:
    """Median rates in GB/s: `cat` before and after each loading, in turns, so that both meet the same disk."""
    size = path.stat().st_size / 1e9
    rates: dict[str, list[float]] = {"cat": [], "load": []}
    begin_peak()
    for name, work in _turns(path, device, runs):
        if cold:
            forget(path)
        rates[name].append(size / seconds_of(work))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "cache": "cold" if cold else "warm",
        "load_before": round(os.getloadavg()[0], 1),
        **{f"{name}_gb_per_second": round(value, 3) for name, value in medians.items()},
        **{f"{name}_all": [round(value, 3) for value in values] for name, values in rates.items()},
        "share_of_cat": round(medians["load"] / medians["cat"], 3),
        "host_peak_bytes": peak_resident_bytes(),
    }


def _turns(path: Path, device: torch.device, runs: int) -> Iterator[tuple[str, Callable[[], None]]]:
    yield "cat", lambda: read_by_cat(path)
    for _ in range(runs):
        yield "load", lambda: load(path, device)
        yield "cat", lambda: read_by_cat(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=12.7)
    parser.add_argument("--storage", default="Q8_0", help="type of the linears: Q8_0, Q4_K, ...")
    parser.add_argument("--folder", type=Path, default=None, help="where the file is written (default: the system's)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    device = torch.device(options.device)
    shapes = shapes_of(spec_of(options.gigabytes, options.storage), options.storage)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / f"flux-{options.storage}.gguf"
        write_gguf(path, shapes)
        size = path.stat().st_size
        facts = {"storage": options.storage, "file_bytes": size, "tensors": len(shapes)}
        record = {**stamp(device), "threads": torch.get_num_threads(), **facts}
        load(path, device)  # libraries are imported and set up by now
        record["rows"] = [measure(path, device, options.runs, cold) for cold in (True, False)]
    write_record(record_path(options.out, f"load_checkpoint_{options.storage}", record), record)
    print(f"{size / 1e9:.2f} GB, {len(shapes)} tensors")
    for row in record["rows"]:
        print(
            f"{row['cache']}: cat {row['cat_gb_per_second']:.2f} GB/s, load {row['load_gb_per_second']:.2f} GB/s, "
            f"{row['share_of_cat']:.2f} of it, {row['host_peak_bytes'] / 1e9:.2f} GB resident at most "
            f"(load average {row['load_before']})"
        )


if __name__ == "__main__":
    main()
