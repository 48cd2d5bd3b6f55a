"""GGUF headers: a bounded check of everything in front of the tensor data, in plain Python.

    bytes 0..3        "GGUF"
    bytes 4..23       version (2 or 3), unsigned 32 bit; number of tensors and number of keys, unsigned 64 bit
    keys              name, type, value; a text is its length (64 bit) and that many bytes of UTF-8; an array is the
                      type and number of its items, then the items
    tensors           name, number of dimensions, dimensions (fastest first), type, offset into the data
    padding           up to a multiple of `general.alignment` (32 unless said)
    data              tensors one after the other, each padded to the alignment; the padding of the last may be absent

All numbers are little-endian. Nothing is believed before it agrees with the size of the file, and what is kept is
bounded: about 60 MB for the most hostile header, some hundred kB for an honest one.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from gossamer.checkpoints.gguf_cursor import U32, Cursor, damaged
from gossamer.checkpoints.gguf_metadata import Value, read_metadata
from gossamer.checkpoints.safetensors_file import refuse_foreign
from gossamer.formats.gguf import BLOCK_TYPES

MAX_TENSORS = 16_384  # the largest files have some 4,000
MAX_KEYS = 8_192
MAX_DIMENSIONS = 8  # ggml knows 4
MAX_ELEMENTS = 2**58  # so that no count of bytes overflows 64 bit
DEFAULT_ALIGNMENT = 32

_COUNTS = struct.Struct("<QQ")

PLAIN_TYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}

# ggml's names by number, with those that it dropped or uses only inside a computation
TYPE_NAMES: tuple[str, ...] = (
    *("F32", "F16", "Q4_0", "Q4_1", "Q4_2", "Q4_3", "Q5_0", "Q5_1", "Q8_0", "Q8_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S"),
    *("IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS", "I8", "I16", "I32", "I64", "F64", "IQ1_M"),
    *("BF16", "Q4_0_4_4", "Q4_0_4_8", "Q4_0_8_8", "TQ1_0", "TQ2_0", "IQ4_NL_4_4", "IQ4_NL_4_8", "IQ4_NL_8_8", "MXFP4"),
    *("NVFP4", "Q1_0"),
)


@dataclass(frozen=True)
class GgufTensor:
    """One tensor as the header describes it; `start` and `stop` are byte offsets into the file.

    `shape` is in the order of torch: (out, in) for the weight of a linear layer.
    """

    type_name: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class GgufHeader:
    """A header that agrees with its file: tensors by name and metadata, both in the order of the header."""

    version: int
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]
    alignment: int
    data_start: int


def parse_header(path: Path, data: mmap.mmap) -> GgufHeader:
    """Read and check the header of the mapped file; `path` is for messages."""
    size = len(data)
    version = _check_start(path, data[:512], size)
    cursor = Cursor(path, data, size, position=8)
    tensor_count, key_count = cursor.take(_COUNTS, "the number of tensors and keys")
    # the shortest tensor has a name of one byte and no dimensions, the shortest key a name of one byte and a uint8
    cursor.check_count(tensor_count, 25, MAX_TENSORS, "tensors")
    cursor.check_count(key_count, 14, MAX_KEYS, "keys")
    metadata = read_metadata(cursor, key_count)
    alignment = _alignment(path, metadata)
    infos = _tensor_infos(cursor, tensor_count)
    data_start = _padded(cursor.position, alignment)
    tensors = {name: info.at(data_start) for name, info in infos.items()}
    _check_cover(path, tensors, alignment, data_start, size)
    return GgufHeader(version, metadata, tensors, alignment, data_start)


def _check_start(path: Path, start: bytes, size: int) -> int:
    """The version, once the first bytes are those of a GGUF file that can be read."""
    if start[:4] != b"GGUF":
        refuse_foreign(path, start, "GGUF")
        damaged(path, "It does not begin with the letters GGUF.")
    if size < 24:
        damaged(path, f"It has {size} bytes; the shortest header takes 24.")
    version: int = U32.unpack_from(start, 4)[0]
    if version in (2, 3):
        return version
    if int.from_bytes(start[4:8], "big") in (1, 2, 3):
        damaged(path, "It is big-endian, made for other processors; Gossamer reads little-endian files.")
    damaged(path, f"It has version {version} of the format; Gossamer reads versions 2 and 3.")


def _alignment(path: Path, metadata: Mapping[str, Value]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    # below 8 the numbers of a tensor could lie across their natural boundaries
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        damaged(path, f"Its alignment is {alignment}; a power of two from 8 on is allowed.")
    return alignment


@dataclass(frozen=True)
class _Info:
    """A tensor before it is known where the data begins."""

    type_name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def at(self, data_start: int) -> GgufTensor:
        start = data_start + self.offset
        return GgufTensor(self.type_name, self.shape, start, start + self.nbytes)


def _tensor_infos(cursor: Cursor, count: int) -> dict[str, _Info]:
    infos: dict[str, _Info] = {}
    for index in range(count):
        name = cursor.take_name(f"the name of tensor {index}")
        if name in infos:
            damaged(cursor.path, f"The tensor {name[:80]!r} appears twice.")
        infos[name] = _tensor_info(cursor, name)
    return infos


def _tensor_info(cursor: Cursor, name: str) -> _Info:
    (dimensions,) = cursor.take(U32, f"the dimensions of {name[:80]!r}")
    if dimensions > MAX_DIMENSIONS:
        damaged(cursor.path, f"{name[:80]!r} has {dimensions} dimensions; at most {MAX_DIMENSIONS} are allowed.")
    *sizes, number, offset = cursor.take(struct.Struct(f"<{dimensions}QIQ"), f"the description of {name[:80]!r}")
    shape = tuple(reversed(sizes))
    # an empty dimension must not hide that the others overflow
    if math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        damaged(cursor.path, f"{name[:80]!r} claims the shape {shape}, more elements than any file holds.")
    type_name = _type_name(cursor.path, name, number)
    return _Info(type_name, shape, offset, _nbytes(cursor.path, name, type_name, shape))


def _type_name(path: Path, name: str, number: int) -> str:
    type_name = TYPE_NAMES[number] if number < len(TYPE_NAMES) else "unknown"
    if type_name in PLAIN_TYPES or type_name in BLOCK_TYPES:
        return type_name
    readable = ", ".join(dict.fromkeys((*PLAIN_TYPES, *BLOCK_TYPES)))
    damaged(path, f"{name[:80]!r} has the {type_name} type {number}; Gossamer reads {readable}.")


def _nbytes(path: Path, name: str, type_name: str, shape: tuple[int, ...]) -> int:
    if type_name in PLAIN_TYPES:
        return math.prod(shape) * PLAIN_TYPES[type_name].itemsize
    kind = BLOCK_TYPES[type_name]
    width = shape[-1] if shape else 1
    if width % kind.elements:
        damaged(path, f"{name[:80]!r} has rows of {width}; {type_name} stores blocks of {kind.elements}.")
    return math.prod(shape) // kind.elements * kind.block_bytes


def _padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _check_cover(path: Path, tensors: Mapping[str, GgufTensor], alignment: int, data_start: int, size: int) -> None:
    """Every byte of the data belongs to one tensor or to the padding behind one."""
    end = data_start
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start % alignment:
            damaged(path, f"{name[:80]!r} starts at byte {entry.start}, no multiple of the alignment {alignment}.")
        expected = _padded(end, alignment)
        if entry.start != expected:
            fault = "overlaps the tensor before it" if entry.start < end else "leaves a hole before it"
            damaged(path, f"{name[:80]!r} {fault}: it starts at byte {entry.start}, {expected} was expected.")
        end = entry.stop
    if end > size and end > data_start:
        damaged(path, f"Its tensors end at byte {end} but the file at byte {size}: it is cut off.")
    if size > _padded(end, alignment):
        damaged(path, f"{size - end} bytes past the last tensor belong to nothing.")
