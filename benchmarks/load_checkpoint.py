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

import gguf
import numpy as np
import torch

import gossamer
from gossamer.bench.record import record_path, stamp, write_record
from gossamer.bench.timing import wait
from gossamer.checkpoints.flux_names import bfl_linears, bfl_norms
from gossamer.models.flux_spec import FluxSpec, linear_shapes

CHUNK_BYTES = 64 << 20
SMALL = ("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer")  # published files keep them BF16

Shapes = dict[str, tuple[str, tuple[int, ...]]]


def spec_of(gigabytes: float, storage: str) -> FluxSpec:
    """FLUX.1-dev, with fewer blocks where the size does not hold all: one double block for two single ones."""
    for double in range(19, 0, -1):
        spec = FluxSpec(double, 2 * double, 24, 128, 64, 64, 4096, 768, guidance_embeds=True)
        if sum(nbytes(*entry) for entry in shapes_of(spec, storage).values()) <= gigabytes * 1e9:
            return spec
    raise SystemExit("The file has to hold at least one block of each kind: 1 GB.")


def shapes_of(spec: FluxSpec, storage: str) -> Shapes:
    """Type and shape by BFL name, as published GGUF files choose them."""
    linears = linear_shapes(spec)
    shapes: Shapes = dict.fromkeys(bfl_norms(spec.num_layers, spec.num_single_layers), ("F32", (128,)))
    for name, parts in bfl_linears(spec.num_layers, spec.num_single_layers, spec.width, guidance=True).items():
        rows, width = sum(linears[part.name][0] for part in parts), linears[parts[0].name][1]
        kind = "BF16" if name.startswith(SMALL) else storage
        shapes |= {f"{name}.weight": (kind, (rows, width)), f"{name}.bias": ("F32", (rows,))}
    return shapes


def nbytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in a GGUF type."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return int(np.prod(shape)) // block * size


def write_file(path: Path, shapes: Shapes) -> None:
    """The header by the gguf package; then random bytes, so that no disk or file system can shorten them."""
    writer = gguf.GGUFWriter(path, "flux")
    for name, (kind, shape) in shapes.items():
        number = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[number]
        stored = (*shape[:-1], shape[-1] // block * size) if block > 1 else shape
        dtype = np.dtype(np.uint8 if block > 1 else np.float32)
        writer.add_tensor_info(name, stored, dtype, nbytes(kind, shape), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    start = -(-writer.fout[0].tell() // 32) * 32
    writer.close()
    left = sum(-(-nbytes(*entry) // 32) * 32 for entry in shapes.values())
    # bytes of 0x3f and below: no half or bfloat16 made of them is infinite
    noise = (np.random.default_rng(0).integers(0, 64, CHUNK_BYTES, dtype=np.uint8)).tobytes()
    with path.open("r+b") as file:
        file.seek(start)
        while left:
            left -= file.write(noise[:left])
        os.fsync(file.fileno())


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
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def begin_peak() -> None:
    """Have the system count the most that is resident from now on."""
    Path("/proc/self/clear_refs").write_text("5", "ascii")


def status_bytes(key: str) -> int:
    """An amount of memory of this process, as Linux counts it."""
    text = Path("/proc/self/status").read_text("ascii")
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(f"{key}:"))


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
        "host_peak_bytes": status_bytes("VmHWM"),
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
        write_file(path, shapes)
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
