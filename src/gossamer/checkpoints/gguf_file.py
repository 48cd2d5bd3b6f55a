"""GGUF files: tensors straight from the mapped file, once the header was checked.

    read_header(path)            the checked header; no tensor data is read
    open_file(path)              the header and the mapped file, for many reads
    read_tensor(file, name)      one tensor
    iterate_tensors(file)        every tensor, in the order of the file
    release(file, name)          forget the pages behind a tensor that was copied elsewhere

A linear weight in a block type comes as `Packed` with its stored bytes; F32, F16, BF16, F64 and integers come as plain
tensors. Both are views of the mapped file: nothing is copied before `.to(device)`, and writing into one never
changes the file. A tensor in a block type that is no matrix, so no linear layer can use it, is decoded to float32.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch

from gossamer.checkpoints import mapped_file
from gossamer.checkpoints.gguf_cursor import damaged
from gossamer.checkpoints.gguf_header import PLAIN_TYPES, GgufHeader, GgufTensor, parse_header
from gossamer.checkpoints.safetensors_file import require_file
from gossamer.errors import UnknownOptionError
from gossamer.formats import Packed
from gossamer.formats.gguf import BLOCK_TYPES, unpack


@dataclass(frozen=True)
class GgufFile:
    """A checked header and the bytes of the whole file, mapped: `data`, uint8, shows `mapping`."""

    path: Path
    header: GgufHeader
    mapping: mmap.mmap
    data: torch.Tensor


def read_header(path: Path | str) -> GgufHeader:
    """Read and check the header; no tensor data is read."""
    path = Path(path)
    mapping = _map(path)
    try:
        return parse_header(path, mapping)
    finally:
        mapping.close()


def open_file(path: Path | str) -> GgufFile:
    """The checked header with the mapped file."""
    path = Path(path)
    mapping = _map(path)
    return GgufFile(path, parse_header(path, mapping), mapping, mapped_file.bytes_of(mapping))


def read_tensor(file: GgufFile | Path | str, name: str) -> Packed | torch.Tensor:
    """One tensor: `Packed` for a matrix in a block type, else a plain tensor."""
    opened = file if isinstance(file, GgufFile) else open_file(file)
    return _tensor(opened, _entry(opened, name))


def iterate_tensors(file: GgufFile | Path | str) -> Iterator[tuple[str, Packed | torch.Tensor]]:
    """Every tensor with its name, in the order of the file; nothing that was yielded is held."""
    opened = file if isinstance(file, GgufFile) else open_file(file)
    for name, entry in sorted(opened.header.tensors.items(), key=lambda item: item[1].start):
        yield name, _tensor(opened, entry)


def release(file: GgufFile, name: str) -> None:
    """Take the pages behind a tensor out of this process; looking at the tensor again reads the file again.

    What was written into the tensor since is lost. Where the system cannot do this, nothing happens.
    """
    entry = _entry(file, name)
    mapped_file.release(file.mapping, entry.start, entry.stop)


def _entry(file: GgufFile, name: str) -> GgufTensor:
    if name not in file.header.tensors:
        closest = get_close_matches(name, file.header.tensors, n=1)
        raise UnknownOptionError(
            f"{str(file.path)!r} holds no tensor {name!r}.",
            f"It holds {len(file.header.tensors)} tensors under other names.",
            f"Did you mean {closest[0]!r}?" if closest else "List its tensors with `gossamer inspect`.",
        )
    return file.header.tensors[name]


def _tensor(file: GgufFile, entry: GgufTensor) -> Packed | torch.Tensor:
    # an empty tensor may stand behind the end of the file, where there is no aligned byte to look at
    data = file.data[entry.start : entry.stop] if entry.stop > entry.start else torch.empty(0, dtype=torch.uint8)
    if entry.type_name in PLAIN_TYPES:
        return data.view(PLAIN_TYPES[entry.type_name]).view(entry.shape)
    if len(entry.shape) == 2:
        rows, width = entry.shape
        blocks = data.view(rows, BLOCK_TYPES[entry.type_name].row_bytes(width))
        return Packed(entry.type_name, {"blocks": blocks}, (rows, width))
    return unpack(data, entry.type_name, entry.shape)


def _map(path: Path) -> mmap.mmap:
    if require_file(path) == 0:
        damaged(path, "It has 0 bytes; the shortest header takes 24.")
    return mapped_file.map_file(path)
