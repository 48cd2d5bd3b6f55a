"""Tensors of an encoded weight, checked against the header before any data is read, and the errors about them."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

from gossamer.checkpoints.safetensors_file import TensorEntry
from gossamer.checkpoints.source import TensorSource
from gossamer.errors import FileDamagedError, UnknownStorageError

FLOATS = ("F32", "F16", "BF16")  # each value of these is a float32
CHUNK_VALUES = 1 << 22  # decoded at a time, so that what decoding takes beside its result stays below 100 MB


def damage(weight: str, why: str) -> FileDamagedError:
    """The error for a weight whose tensors do not belong together."""
    return FileDamagedError(
        f"The weight {weight[:80]!r} cannot be decoded.",
        why,
        "Download or copy the file again and compare its SHA-256 with the one that the source states.",
    )


def unknown(weight: str, storage: str, why: str) -> UnknownStorageError:
    """The error for a weight that is stored in a way that Gossamer does not read."""
    return UnknownStorageError(
        f"The weight {weight[:80]!r} is stored as {storage[:120]}, which Gossamer does not read.",
        why,
        "Use another file of this model, or a newer Gossamer.",
    )


def entry_of(source: TensorSource, weight: str, name: str, dtypes: Collection[str]) -> TensorEntry:
    """What the header says of one of the weight's tensors, if it is there and has one of these types."""
    entry = source.entries.get(name)
    if entry is None:
        raise damage(weight, f"The tensor {name[:80]!r} that belongs to it is missing.")
    if entry.dtype not in dtypes:
        raise damage(weight, f"{name[:80]!r} has the dtype {entry.dtype}; {' or '.join(dtypes)} was expected.")
    return entry


def matrix_of(source: TensorSource, weight: str, dtypes: Collection[str]) -> tuple[TensorEntry, int, int]:
    """The weight's own entry with its stored rows and columns."""
    entry = entry_of(source, weight, weight, dtypes)
    if len(entry.shape) != 2 or 0 in entry.shape:
        raise damage(weight, f"It has the shape {entry.shape}; a matrix was expected.")
    return entry, entry.shape[0], entry.shape[1]


def read_shaped(
    source: TensorSource, weight: str, name: str, dtypes: Collection[str], shapes: Collection[tuple[int, ...]]
) -> torch.Tensor:
    """One of the weight's tensors, if it has one of these types and shapes."""
    entry = entry_of(source, weight, name, dtypes)
    if tuple(entry.shape) not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise damage(weight, f"{name[:80]!r} has the shape {list(entry.shape)}; {wanted} was expected.")
    return source.read(name)


def read_floats(source: TensorSource, weight: str, name: str, *shapes: tuple[int, ...]) -> torch.Tensor:
    """Finite numbers (n,) in float32, whatever float type they are stored in."""
    values = read_shaped(source, weight, name, FLOATS, shapes).reshape(-1).float()
    require_finite(weight, name, values)
    return values


def read_row_scale(source: TensorSource, weight: str, name: str, rows: int) -> torch.Tensor:
    """Float32 (rows,): a scale of the whole matrix, shared by its rows, or one a row."""
    scale = read_floats(source, weight, name, (), (1,), (1, 1), (rows,), (rows, 1))
    return scale.expand(rows).contiguous()


def read_scalar(source: TensorSource, weight: str, name: str) -> torch.Tensor:
    """Float32 (): a number that the whole matrix shares."""
    return read_floats(source, weight, name, (), (1,), (1, 1)).reshape(())


def require_finite(weight: str, name: str, values: torch.Tensor) -> None:
    """Refuse NaN and infinity among scales: they would spoil whole rows or blocks."""
    if not bool(torch.isfinite(values).all()):
        raise damage(weight, f"{name[:80]!r} holds values that are not finite.")


def decode_rows(rows: int, width: int, decode: Callable[[slice], torch.Tensor]) -> torch.Tensor:
    """Float32 (rows, width), made some rows at a time: `decode` gives those of a slice."""
    decoded = torch.empty(rows, width, dtype=torch.float32)
    step = max(1, CHUNK_VALUES // width)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        decoded[part] = decode(part)
    return decoded
