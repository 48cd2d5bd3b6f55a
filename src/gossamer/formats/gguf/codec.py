"""Decoding and packing whole tensors, a few blocks at a time so that intermediate results stay small."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from gossamer.errors import InvalidOptionError, UnsupportedShapeError
from gossamer.formats.checks import require_packable
from gossamer.formats.gguf.block_types import BLOCK_TYPES, BlockType, Codec, block_type
from gossamer.formats.packed import Packed

# A CPU chunk of 2 MiB in float32 stays in its caches with the temporaries: Q4_K to bfloat16 is 4 times as fast as with
# a whole FLUX layer at once. A GPU wants few launches, but a search for scales holds ten chunks of memory.
_CPU_CHUNK_ELEMENTS = 1 << 19
_GPU_CHUNK_ELEMENTS = 1 << 22

_LARGEST = torch.finfo(torch.float16).max


def _chunks(blocks: int, kind: BlockType, device: torch.device) -> Iterator[slice]:
    elements = _CPU_CHUNK_ELEMENTS if device.type == "cpu" else _GPU_CHUNK_ELEMENTS
    step = max(1, elements // kind.elements)
    return (slice(start, start + step) for start in range(0, blocks, step))


def _checked_blocks(data: torch.Tensor, kind: BlockType, shape: Sequence[int]) -> torch.Tensor:
    """`data` as (n, block bytes), once its type and length are right."""
    if data.dtype != torch.uint8:
        raise InvalidOptionError(
            f"{kind.name} data has dtype {data.dtype}.",
            "Stored blocks are bytes.",
            "Pass a uint8 tensor; `data.view(torch.uint8)` shows the same bytes.",
        )
    if not shape or min(shape) < 0:
        raise UnsupportedShapeError(
            f"{kind.name} data cannot have the shape {tuple(shape)}.",
            "A weight has at least one dimension, and none is negative.",
            "Pass the logical shape, for example (out, in).",
        )
    expected = torch.Size(shape[:-1]).numel() * kind.row_bytes(shape[-1])
    if data.numel() != expected:
        raise UnsupportedShapeError(
            f"{data.numel()} bytes of {kind.name} data cannot have the shape {tuple(shape)}.",
            f"That shape takes exactly {expected} bytes ({kind.block_bytes} for every {kind.elements} weights).",
            "Check the shape; if it comes from a file, the file is cut short or damaged: fetch it again.",
        )
    return data.reshape(-1, kind.block_bytes)


def decode(data: torch.Tensor, type_name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Bytes to weights of `shape`: decoded in float32, then rounded once to `dtype`."""
    kind = block_type(type_name)
    blocks = _checked_blocks(data, kind, shape)
    weight = torch.empty(len(blocks), kind.elements, dtype=dtype, device=data.device)
    for part in _chunks(len(blocks), kind, data.device):
        weight[part] = kind.decode(blocks[part])
    return weight.view(tuple(shape))


def unpack(data: torch.Tensor, type_name: str, shape: Sequence[int]) -> torch.Tensor:
    """Bytes of any GGUF type to float32 weights of the logical `shape`, bit for bit as the `gguf` package decodes them.

    `data` is uint8 of any shape whose bytes are the rows in order; it may be on any device.
    """
    return decode(data, type_name, shape, torch.float32)


def _encoder(kind: BlockType) -> Codec:
    if kind.encode is None:
        packable = ", ".join(name for name, other in BLOCK_TYPES.items() if other.encode)
        raise InvalidOptionError(
            f"Weights cannot be packed as {kind.name}.",
            "Gossamer only reads this type, from files that hold it already.",
            f"Choose one of {packable}.",
        )
    return kind.encode


def _require_range(weight: torch.Tensor, kind: BlockType) -> None:
    low, high = weight.aminmax()
    largest = max(-float(low), float(high))
    if largest > _LARGEST:
        raise InvalidOptionError(
            f"A weight with values up to {largest:g} cannot be stored as {kind.name}.",
            f"Its scales are float16, whose largest value is {_LARGEST:.0f}.",
            "Keep this layer in bf16 or fp32.",
        )


def pack(weight: torch.Tensor, type_name: str) -> Packed:
    """A float weight (out, in) as the bytes of a GGUF type: one tensor, `blocks` (out, row bytes)."""
    kind = block_type(type_name)
    encode = _encoder(kind)
    weight = weight.detach()
    require_packable(weight, kind.name)
    _require_range(weight, kind)
    out_features, in_features = weight.shape
    row_bytes = kind.row_bytes(in_features)
    rows = weight.reshape(-1, kind.elements)
    blocks = torch.empty(len(rows), kind.block_bytes, dtype=torch.uint8, device=weight.device)
    for part in _chunks(len(rows), kind, weight.device):
        blocks[part] = encode(rows[part].float())
    return Packed(kind.name, {"blocks": blocks.view(out_features, row_bytes)}, (out_features, in_features))
