"""Damaged and lying safetensors and GGUF files without end: none may raise anything but a GossamerError, or be slow.

    python tests/checkpoints/fuzz_headers.py --cases 100000 [--seed 0] [--format gguf]

A file that passes the check is also read whole. Files that fail this are kept in the current folder.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from safetensors.torch import save

from gossamer.checkpoints import gguf_file, gguf_header, safetensors_file
from gossamer.errors import GossamerError
from gossamer.formats.gguf import BLOCK_TYPES

EXPECTED = ("sound", "file-damaged")
SLOW_SECONDS = 1.0
MOST_BYTES = 100e6

# what a hostile writer puts where a size, a count, an offset or a type belongs
NUMBERS = (
    *(0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 24, 31, 32, 33, 41, 63, 64, 255, 256, 1000, 65_535, 10**6),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**58, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1),
)
ODD_JSON = (
    *NUMBERS,
    -1,
    2**70,
    1.5,
    float("nan"),
    True,
    None,
    "",
    "F32",
    "F4",
    "F8_E4M3",
    [],
    [0],
    {},
    {"dtype": "F32"},
)


# GGUF, written byte by byte so that every field can lie


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def key(name: bytes, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


def array(kind: int, count: int, payload: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + payload


def tensor(name: bytes, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf(
    keys: list[bytes] | tuple[bytes, ...] = (),
    tensors: list[bytes] | tuple[bytes, ...] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """A file; `counts` claims other numbers of tensors and keys than there are."""
    counts = (len(tensors), len(keys)) if counts is None else counts
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % alignment) + data


SOUND_GGUF = gguf(
    [
        key(b"general.architecture", 8, text(b"flux")),
        key(b"general.alignment", 4, struct.pack("<I", 32)),
        key(b"flux.scale", 6, struct.pack("<f", 1.5)),
        key(b"tokens", 9, array(8, 3, text(b"a") + text(b"") + text("é".encode()))),
        key(b"sizes", 9, array(10, 2, bytes(16))),
    ],
    [
        tensor(b"img_in.weight", (64, 3), 8, 0),  # Q8_0: 204 bytes, padded to 224
        tensor(b"norm.scale", (5,), 0, 224),  # F32: 20 bytes, padded to 32
        tensor(b"codes", (2, 2, 2), 24, 256),  # I8
        tensor(b"deep", (32, 2, 2), 2, 288),  # Q4_0 of three dimensions: 72 bytes
        tensor(b"scalar", (), 0, 384),
    ],
    bytes(range(128)) * 3 + b"\0" * 32,
)

SOUND_SAFETENSORS = save(
    {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.ones(4, dtype=torch.float16),
        "c": torch.zeros(2, 2, dtype=torch.uint8),
        "empty": torch.zeros(0, 2),
    },
    {"key": "text", "more": "{}"},
)


# mutations


def _random_bytes(rng: random.Random, sound: bytes) -> bytes:
    return sound[: rng.choice((0, 4, 8, 9, 24, 60))] + rng.randbytes(rng.randrange(200))


def _truncated(rng: random.Random, sound: bytes) -> bytes:
    return sound[: rng.randrange(len(sound))]


def _longer(rng: random.Random, sound: bytes) -> bytes:
    return sound + rng.randbytes(rng.randrange(1, 100))


def _changed_bytes(rng: random.Random, sound: bytes) -> bytes:
    changed = bytearray(sound)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _changed_number(rng: random.Random, sound: bytes) -> bytes:
    width = rng.choice((4, 8))
    place = rng.randrange(len(sound) - width)
    number = rng.choice((*NUMBERS, len(sound), len(sound) - place)) % 2 ** (8 * width)
    return sound[:place] + number.to_bytes(width, "little") + sound[place + width :]


def _spliced(rng: random.Random, sound: bytes) -> bytes:
    start, stop = sorted(rng.choices(range(len(sound)), k=2))
    place = rng.randrange(len(sound))
    return sound[:place] + sound[start:stop] + sound[rng.choice((place, stop)) :]


def _built_gguf(rng: random.Random, _: bytes) -> bytes:
    """A file that is right but for about one number."""
    lies = [rng.random() < 0.08 for _ in range(40)]

    def number(honest: int, width: int = 64) -> int:
        return rng.choice(NUMBERS) % 2**width if lies.pop() else honest

    kind = rng.randrange(14)
    payload = array(number(8, 32), number(2), text(b"x") * 2) if kind == 9 else text(b"value")
    keys = [key(b"k", kind, payload if kind in (8, 9) else bytes(rng.choice((1, 2, 4, 8))))]
    alignment = number(rng.choice((8, 32, 64)), 32)
    keys.append(key(b"general.alignment", number(4, 32), struct.pack("<I", alignment)))
    alignment = alignment if 0 < alignment < 4096 else 32
    tensors, offset = [], 0
    for index in range(rng.randrange(4)):
        rows = rng.randrange(3)
        name = b"same" if rng.random() < 0.05 else b"t%d" % index
        tensors.append(tensor(name, (number(32), number(rows)), number(2, 32), number(offset)))
        offset += -(-rows * 18 // alignment) * alignment
    counts = (number(len(tensors)), number(len(keys)))
    return gguf(keys, tensors, rng.randbytes(offset), version=number(3, 32), counts=counts, alignment=alignment)


def _any_gguf(rng: random.Random, _: bytes) -> bytes:
    """A consistent file of any types, shapes and alignment, in some cases with a wrong offset or length."""
    alignment = rng.choice((1, 2, 4, 8, 32, 64))
    tensors, offset = [], 0
    for index in range(rng.randrange(4)):
        name = rng.choice(gguf_header.TYPE_NAMES)
        block = BLOCK_TYPES.get(name)
        dims = rng.choices((0, 1, 2, 3, 4, 32, 64, 256), k=rng.choice((0, 1, 1, 2, 2, 3, 8, 9)))
        if block and dims and rng.random() < 0.8:
            dims[0] = block.elements
        if 0 in dims and rng.random() < 0.5:
            dims += rng.choices(NUMBERS, k=2)
        width = gguf_header.PLAIN_TYPES[name].itemsize if name in gguf_header.PLAIN_TYPES else 1
        nbytes = math.prod(dims) // block.elements * block.block_bytes if block else math.prod(dims) * width
        if nbytes < 10**6:
            tensors.append(tensor(b"t%d" % index, tuple(dims), gguf_header.TYPE_NAMES.index(name), offset))
            offset += -(-nbytes // alignment) * alignment
            offset += rng.choice((-alignment, 1, alignment)) if offset and rng.random() < 0.1 else 0
    keys = [key(b"general.alignment", 4, struct.pack("<I", alignment))]
    data = rng.randbytes(offset + (rng.choice((1, 8)) if rng.random() < 0.1 else 0))
    return gguf(keys, tensors, data, alignment=alignment)


def _built_safetensors(rng: random.Random, sound: bytes) -> bytes:
    """A sound file with about one value of its JSON replaced."""
    length = int.from_bytes(sound[:8], "little")
    content = json.loads(sound[8 : 8 + length])
    for _ in range(rng.choice((1, 1, 2))):
        entry = content[rng.choice(list(content))]
        if not isinstance(entry, dict) or not entry:
            continue
        field = rng.choice(list(entry))
        if isinstance(entry[field], list) and entry[field] and rng.random() < 0.7:
            entry[field][rng.randrange(len(entry[field]))] = deepcopy(rng.choice(ODD_JSON))
        elif field == "shape" and rng.random() < 0.5:
            entry[field] = rng.choices((0, 1, 2, 3, 2**29, 2**57, 2**62, 2**63 - 1), k=rng.randrange(40))
        else:
            entry[field] = deepcopy(rng.choice(ODD_JSON))
    header = json.dumps(content).encode()
    return len(header).to_bytes(8, "little") + header + sound[8 + length :]


def _any_safetensors(rng: random.Random, _: bytes) -> bytes:
    """A consistent file of any types and shapes, in one case out of three with a wrong offset or length."""
    content, end = {}, 0
    for index in range(rng.randrange(4)):
        dtype = rng.choice(list(safetensors_file.DTYPE_BITS))
        shape = rng.choices((0, 1, 2, 3, 4, 8), k=rng.choice((0, 1, 1, 2, 2, 3, 32, 33)))
        if 0 in shape and rng.random() < 0.5:
            shape.insert(rng.randrange(len(shape) + 1), rng.choice(NUMBERS))
        stop = end + math.prod(shape) * safetensors_file.DTYPE_BITS[dtype] // 8
        if stop < 10**6:
            content[f"t{index}"] = {"dtype": dtype, "shape": shape, "data_offsets": [end, stop]}
            end = stop + (rng.choice((-1, 1, 8)) if rng.random() < 0.1 else 0)
    header = json.dumps(content).encode()
    header += b" " * rng.randrange(9)
    data = rng.randbytes(max(end, 0) + (rng.choice((1, 8)) if rng.random() < 0.1 else 0))
    return len(header).to_bytes(8, "little") + header + data


_COMMON = (
    _random_bytes,
    _truncated,
    _longer,
    _changed_bytes,
    _changed_bytes,
    _changed_number,
    _changed_number,
    _spliced,
)


def hostile_gguf(rng: random.Random) -> bytes:
    return rng.choice((*_COMMON, *(_built_gguf,) * 2, *(_any_gguf,) * 3))(rng, SOUND_GGUF)


def hostile_safetensors(rng: random.Random) -> bytes:
    return rng.choice((*_COMMON, *(_built_safetensors,) * 2, *(_any_safetensors,) * 3))(rng, SOUND_SAFETENSORS)


# reading


def read_gguf(path: Path) -> None:
    """Read a file whole; every byte is looked at."""
    header = gguf_file.read_header(path)
    read = dict(gguf_file.iterate_tensors(path))
    assert read.keys() == header.tensors.keys()
    for name, content in read.items():
        assert tuple(content.shape) == header.tensors[name].shape
        for part in [content] if isinstance(content, torch.Tensor) else content.tensors.values():
            part.clone()


def read_safetensors(path: Path) -> None:
    """Read a file whole, with the safetensors reader behind our check."""
    header = safetensors_file.read_header(path)
    assert safetensors_file.read_tensors(path).keys() == header.tensors.keys()


FORMATS: dict[str, tuple[Callable[[random.Random], bytes], Callable[[Path], None]]] = {
    "gguf": (hostile_gguf, read_gguf),
    "safetensors": (hostile_safetensors, read_safetensors),
}


def outcome(path: Path, read: Callable[[Path], None]) -> str:
    """One of EXPECTED, or what is wrong with us."""
    started = time.thread_time()
    try:
        read(path)
        result = "sound"
    except GossamerError as error:
        parts = (error.what, error.why, error.next_step)
        result = error.code if all(parts) else "ERROR OF FEWER THAN THREE PARTS"
        str(error).encode()
    except Exception as error:  # noqa: BLE001 - anything else is the finding
        result = f"{type(error).__name__.upper()}: {error}"[:200]
    seconds = time.thread_time() - started
    if seconds > SLOW_SECONDS:
        result = f"SLOW: {seconds:.1f} s"
    return result


def fuzz(cases: int, seed: int, name: str) -> Counter[str]:
    """How often each outcome was met; files with an unexpected one are kept in the current folder."""
    make, read = FORMATS[name]
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file.{name}"
        for case in range(cases):
            content = make(rng)
            path.write_bytes(content)
            result = outcome(path, read)
            outcomes[result] += 1
            if result not in EXPECTED:
                Path(f"fuzz-{seed}-{case}.{name}").write_bytes(content)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="in all, shared among the formats")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", choices=list(FORMATS), action="append", help="only this one; may be repeated")
    chosen = parser.parse_args()
    names = chosen.format or list(FORMATS)
    bad = 0
    for name in names:
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        outcomes = fuzz(chosen.cases // len(names), chosen.seed, name)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        wrong = sum(count for result, count in outcomes.items() if result not in EXPECTED)
        bad += wrong + (grown > MOST_BYTES / 1024)
        print(
            json.dumps(
                {
                    "format": name,
                    "cases": outcomes.total(),
                    "seconds": round(time.perf_counter() - started, 1),
                    "peak_growth_kib": grown,
                    "outcomes": dict(outcomes.most_common(20)),
                }
            )
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
