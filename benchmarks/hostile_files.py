"""What a hostile file costs before it is refused: seconds and memory, one row a file.

    python benchmarks/hostile_files.py --out benchmarks/results [--only gguf]

Every file is written to a temporary folder, then read by a child process of its own that has everything imported: the
header is checked, and in files whose headers are sound every encoded weight is decoded. `seconds` is the wall time,
`cpu_seconds` that of the processor (other programs on the same cores make the first longer), `extra_bytes` the growth
of the child's memory; each is the largest of `--runs` reads. A row must be refused with an error of three parts, in
under a second of the processor and under 100 MB; the command ends with 1 if one is not. Files are up to 100 MB long,
and sparse where they can be.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from gossamer.bench.record import record_path, stamp, write_record
from gossamer.checkpoints import gguf_file, safetensors_file
from gossamer.checkpoints.encodings import find_encoded, read_encoded
from gossamer.checkpoints.safetensors_file import TensorEntry
from gossamer.errors import GossamerError
from gossamer.formats.dynamic_map import dynamic_map
from gossamer.formats.four_bit import NF4_VALUES

MOST_SECONDS = 1.0
MOST_BYTES = 100_000_000
HUGE = 2**62
MB = 1_000_000

# name of the case, the file, and the length that it is extended to without taking disk space
Case = tuple[str, bytes, int]


# GGUF, byte by byte


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def key(name: bytes, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


def array(kind: int, count: int, payload: bytes = b"") -> bytes:
    return key(b"k", 9, struct.pack("<IQ", kind, count) + payload)


def tensor(name: bytes, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf(keys: list[bytes], tensors: list[bytes], data: bytes = b"", counts: tuple[int, int] | None = None) -> bytes:
    header = b"GGUF" + struct.pack("<IQQ", 3, *(counts or (len(tensors), len(keys)))) + b"".join(keys + tensors)
    return header + bytes(-len(header) % 32) + data


def gguf_cases() -> Iterator[Case]:
    a, b = tensor(b"a", (3,), 0, 0), tensor(b"b", (3,), 0, 0)
    names = b"".join(text("🙂".encode() * 60 + b"%d" % number) + struct.pack("<IB", 0, 0) for number in range(8_192))
    yield "60 bytes that claim an array of 2^62 items", gguf([array(0, HUGE)], [])[:60].ljust(60, b"\0"), 0
    yield "2^62 tensors", gguf([], [], counts=(HUGE, 0)), 0
    yield "2^62 keys", gguf([], [], counts=(0, HUGE)), 0
    yield "a text of 2^62 bytes", gguf([key(b"k", 8, struct.pack("<Q", HUGE))], []), 0
    yield "arrays nested 2 million times", gguf([array(9, 1, struct.pack("<IQ", 9, 1) * 2_000_000)], []), 0
    yield "2 million empty texts, then a lie", gguf([array(8, 2_000_000, bytes(16 * MB)), array(0, HUGE)], []), 0
    yield "3 million empty texts", gguf([array(8, 3_000_000, bytes(24 * MB))], []), 0
    yield "a header of 100 MB", gguf([array(0, 100 * MB)], []), 100 * MB + 1000
    yield "8,192 long keys, then a lie", gguf([names], [], counts=(1, 8_192)), 0
    yield "a key twice", gguf([key(b"k", 0, b"\0")] * 2, []), 0
    yield "a tensor twice", gguf([], [a, a], bytes(64)), 0
    yield "tensors that overlap", gguf([], [a, b], bytes(64)), 0
    yield "a shape whose product overflows", gguf([], [tensor(b"a", (2**32, 2**32), 0, 0)], bytes(32)), 0
    yield "a shape that overflows beside a zero", gguf([], [tensor(b"a", (HUGE, 0, HUGE), 0, 0)], bytes(32)), 0
    yield "an offset past the end", gguf([], [tensor(b"a", (3,), 0, 2**64 - 32)], bytes(32)), 0
    yield "2^32 - 1 dimensions", gguf([], [text(b"a") + struct.pack("<I", 2**32 - 1)], bytes(99)), 0
    yield "cut off in the data", gguf([], [tensor(b"a", (25 * MB,), 0, 0)], bytes(32)), 99 * MB
    yield "cut off in the header", gguf([key(b"k", 8, text(b"value"))], [a])[:50], 0
    yield "random bytes", b"GGUF\3\0\0\0" + random.Random(0).randbytes(1000), 0


# safetensors

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def container(header: object, data: bytes = bytes(8)) -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(content).to_bytes(8, "little") + content + data


def filled(start: bytes, end: bytes) -> bytes:
    """A header as long as allowed, of characters that Python holds in four bytes each."""
    middle = "🙂".encode() + b"a" * (safetensors_file.MAX_HEADER_BYTES - len(start) - len(end) - 4)
    return container(start + middle + end, b"")


def safetensors_cases() -> Iterator[Case]:
    sound = save({"a": torch.zeros(256), "b": torch.ones(256)})
    yield "a header of 100 MB", (100 * MB).to_bytes(8, "little") + b"{", 100 * MB + 8
    yield "a header of 2^63 bytes", (2**63).to_bytes(8, "little") + b"{}", 0
    yield "one text as long as allowed", filled(b'{"__metadata__": {"k": "', b'"}, "a": 1}'), 0
    yield "98,000 lists", filled(b'{"a": [' + b"[]," * 98_000 + b'"', b'"]}'), 0
    keys = b"".join('"🙂%x":{},'.encode() % number for number in range(98_000))
    yield "98,000 keys", filled(b"{" + keys + b'"', b'":1}'), 0
    yield "lists nested 3 million times", container(b'{"a":' + b"[" * 3 * MB), 0
    yield "objects nested a million times", container(b'{"a":' + b'[{"":' * MB), 0
    yield "a key twice", container(b'{"a":{},"a":{}}'), 0
    yield "tensors that overlap", container({"a": F32, "b": F32}), 0
    yield "a shape whose product overflows", container({"a": {**F32, "shape": [2**32, 2**32]}}), 0
    zero = {**F32, "shape": [0, HUGE, HUGE], "data_offsets": [0, 0]}
    yield "a shape that overflows beside a zero", container({"a": zero}, b""), 0
    past = {"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]}
    yield "an offset past the end", container({"a": past}), 0
    far = {"dtype": "U8", "shape": [1], "data_offsets": [2**62, 2**62 + 1]}
    yield "a tensor at 2^62", container({"a": far}), 0
    yield "a hole between tensors", container({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, bytes(20)), 0
    large = {"dtype": "U8", "shape": [100 * MB], "data_offsets": [0, 100 * MB]}
    yield "cut off in the data", container({"a": large}), 99 * MB
    yield "cut off in the header", sound[:60], 0
    yield "bytes past the end", sound + b"\0", 0
    yield "a pickle", b"\x80\x04\x95" + bytes(100), 0
    yield "a web page", b"<!DOCTYPE html><html></html>", 0


# sound headers, lying weights


def layer(tensors: dict[str, torch.Tensor | bytes], metadata: dict[str, str] | None = None) -> bytes:
    """A file with tensors of these names; bytes become a tensor of bytes."""
    as_bytes = {
        name: torch.frombuffer(bytearray(part), dtype=torch.uint8)
        for name, part in tensors.items()
        if isinstance(part, bytes)
    }
    return save({**tensors, **as_bytes}, metadata)


def nf4(state: bytes | dict[str, Any], **more: torch.Tensor | bytes) -> bytes:
    """A layer (64, 64) in NF4 with nested block scales."""
    described = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 64]}
    described |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.02}
    content = state if isinstance(state, bytes) else json.dumps(described | state).encode()
    parts = {
        "": torch.zeros(2048, 1, dtype=torch.uint8),
        ".absmax": torch.zeros(64, dtype=torch.uint8),
        ".quant_map": torch.tensor(NF4_VALUES),
        ".nested_absmax": torch.ones(1),
        ".nested_quant_map": dynamic_map(torch.device("cpu")).clone(),
        ".quant_state.bitsandbytes__nf4": content,
        **more,
    }
    return layer({"a.weight" + role: part for role, part in parts.items()})


def comfy(settings: bytes | dict[str, Any], **more: torch.Tensor | bytes) -> bytes:
    """A layer (64, 64) in fp8 with a marker."""
    content = settings if isinstance(settings, bytes) else json.dumps(settings).encode()
    parts = {
        "weight": torch.ones(64, 64).to(torch.float8_e4m3fn),
        "weight_scale": torch.ones(()),
        "comfy_quant": content,
    }
    return layer({"a." + role: part for role, part in {**parts, **more}.items()})


def encoding_cases() -> Iterator[Case]:
    fp8 = {"format": "float8_e4m3fn"}
    codes = torch.ones(64, 64, dtype=torch.int8)
    yield "a quant_state of 10 MB", nf4(b'{"a": "' + b"x" * 10 * MB + b'"}'), 0
    yield "a quant_state of 64 kB of lists", nf4(b'{"a": [' + b"[]," * 21_000 + b"[]]}"), 0
    yield "a quant_state nested 60,000 times", nf4(b"[" * 60_000), 0
    yield "a shape whose product overflows", nf4({"shape": [2**31 - 1, 2**31 - 1]}), 0
    yield "a shape that is too large for its bytes", nf4({"shape": [64, 65]}), 0
    yield "a negative shape", nf4({"shape": [-64, -64]}), 0
    yield "blocks of 0", nf4({"blocksize": 0}), 0
    yield "blocks of 2^62", nf4({"blocksize": HUGE}), 0
    yield "groups of 0 block scales", nf4({"nested_blocksize": 0}), 0
    yield "an offset of 1e300", nf4({"nested_offset": 1e300}), 0
    yield "block scales of the wrong length", nf4({}, **{".absmax": torch.zeros(63, dtype=torch.uint8)}), 0
    yield "block scales of NaN", nf4({}, **{".nested_absmax": torch.tensor([math.nan])}), 0
    yield "a marker of 10 MB", comfy(b'{"format": "' + b"x" * 10 * MB + b'"}'), 0
    yield "a marker that is no JSON", comfy(b"\xff\xfe"), 0
    yield "an unknown format", comfy({"format": "int3"}), 0
    yield "a format for another dtype", comfy({"format": "nvfp4"}), 0
    yield (
        "a rotation of 2^31 - 1",
        comfy({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 2**31 - 1}, weight=codes),
        0,
    )
    yield "groups of 0", comfy({"format": "int8_blockwise", "group_size": 0}, weight=codes), 0
    yield "a scale of NaN", comfy(fp8, weight_scale=torch.tensor(math.nan)), 0
    yield "scales of the wrong shape", comfy(fp8, weight_scale=torch.ones(63)), 0
    metadata = {"_quantization_metadata": '{"layers": [' + "[]," * 1_900_000 + "[]]}"}
    weight = {"a.weight": torch.ones(64, 64).to(torch.float8_e4m3fn)}
    yield "metadata of 5.7 MB", layer(weight, metadata), 0
    short = {"_quantization_metadata": '{"layers": {' + ",".join(f'"{n:x}":' + "{}" for n in range(97_000)) + "}, 1}"}
    yield "metadata of 1 MB", layer(weight, short), 0


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "gguf": gguf_cases,
    "safetensors": safetensors_cases,
    "encodings": encoding_cases,
}


# reading


class Source:
    """The tensors of a safetensors file whose header is sound."""

    def __init__(self, path: Path) -> None:
        header = safetensors_file.read_header(path)
        self.entries, self.metadata = header.tensors, header.metadata
        with path.open("rb") as file:
            self._start = 8 + int.from_bytes(file.read(8), "little")
        self._path = path

    def read(self, name: str) -> torch.Tensor:
        """One tensor, copied."""
        entry: TensorEntry = self.entries[name]
        dtypes = {"U8": torch.uint8, "I8": torch.int8, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}
        with self._path.open("rb") as file:
            file.seek(self._start + entry.start)
            data = bytearray(file.read(entry.stop - entry.start))
        return torch.frombuffer(data, dtype=dtypes[entry.dtype]).view(entry.shape)


def read_gguf(path: Path) -> None:
    gguf_file.read_header(path)


def read_safetensors(path: Path) -> None:
    """The header, and every encoded weight."""
    source = Source(path)
    for weight in find_encoded(source, source.entries).values():
        read_encoded(source, weight)


def outcome(path: Path) -> tuple[str, str]:
    """Code and first line of the error that a file is refused with."""
    read = read_gguf if path.suffix == ".gguf" else read_safetensors
    try:
        read(path)
    except GossamerError as error:
        return (error.code if all((error.what, error.why, error.next_step)) else "fewer than three parts", error.why)
    except Exception as error:  # noqa: BLE001 - anything else is the finding
        return f"{type(error).__name__}", str(error)
    return "not refused", ""


def in_child(path: Path) -> dict[str, Any]:
    """Outcome, seconds and growth of one read in a forked process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        before = _peak_bytes(reset=True)
        started, cpu = time.perf_counter(), time.process_time()
        code, why = outcome(path)
        spent = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
        row = {"code": code, "why": why, **spent, "extra_bytes": _peak_bytes() - before}
        os.write(writing, json.dumps(row).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as result:
        content = result.read()
    os.waitpid(child, 0)
    lost = {"code": "the process ended", "why": "", "seconds": 0.0, "cpu_seconds": 0.0, "extra_bytes": 0}
    return json.loads(content) if content else lost


def _peak_bytes(*, reset: bool = False) -> int:
    """The most memory that this process had resident, since a reset if there was one (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(kind: str, case: Case, folder: Path, runs: int) -> dict[str, Any]:
    name, content, length = case
    path = folder / ("file.gguf" if kind == "gguf" else "file.safetensors")
    path.write_bytes(content)
    if length:
        os.truncate(path, length)
    rows = [in_child(path) for _ in range(runs)]
    return {
        "kind": kind,
        "file": name,
        "file_bytes": path.stat().st_size,
        "code": rows[0]["code"],
        "why": rows[0]["why"][:200],
        "seconds": round(max(row["seconds"] for row in rows), 4),
        "cpu_seconds": round(max(row["cpu_seconds"] for row in rows), 4),
        "extra_bytes": max(row["extra_bytes"] for row in rows),
    }


def is_bounded(row: dict[str, Any]) -> bool:
    refused = row["code"] in ("file-damaged", "unknown-storage")
    return refused and row["cpu_seconds"] < MOST_SECONDS and row["extra_bytes"] < MOST_BYTES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(CASES), action="append", help="one kind; may be repeated")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    load = round(os.getloadavg()[0], 1)
    record = {
        **stamp(torch.device("cpu")),
        "load": load,
        "runs": options.runs,
        "bounds": {"seconds": MOST_SECONDS, "bytes": MOST_BYTES},
        "rows": [],
    }
    path = record_path(options.out, "hostile_files", record)
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.only or CASES:
            for case in CASES[kind]():
                row = measure(kind, case, Path(folder), options.runs)
                record["rows"].append(row)
                verdict = "" if is_bounded(row) else "  <-- out of bounds"
                megabytes = row["extra_bytes"] / MB
                print(f"{row['cpu_seconds']:7.3f} s {megabytes:6.1f} MB  {kind}: {row['file']}: {row['code']}{verdict}")
    write_record(path, record)
    return 0 if all(map(is_bounded, record["rows"])) else 1


if __name__ == "__main__":
    sys.exit(main())
