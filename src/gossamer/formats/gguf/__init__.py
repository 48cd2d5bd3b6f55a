"""GGUF storage: every block type of the `gguf` package, decoded bit for bit; the usual ones packed too.

    unpack(data, type_name, shape)   bytes of a file -> float32
    pack(weight, type_name)          float weight (out, in) -> Packed with one tensor, blocks (out, row bytes) uint8
    FORMATS                          the block types as storage formats, under their GGUF names
    BLOCK_TYPES                      block sizes and codecs by name

F32, F16 and BF16 can be unpacked but are no formats here: weights of these types are plain tensors.
"""

from __future__ import annotations

from functools import partial

import torch

from gossamer.formats.gguf.block_types import BLOCK_TYPES, BlockType, block_type
from gossamer.formats.gguf.codec import decode, pack, unpack
from gossamer.formats.packed import Format, Packed

__all__ = ["BLOCK_TYPES", "FORMATS", "BlockType", "block_type", "pack", "unpack"]


def _unpack_packed(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    return decode(packed.tensors["blocks"], packed.format, packed.shape, dtype)


def _packed_bytes(kind: BlockType, out_features: int, in_features: int) -> int:
    return out_features * kind.row_bytes(in_features)


def _format(kind: BlockType) -> Format:
    return Format(
        name=kind.name,
        pack=partial(pack, type_name=kind.name),
        unpack=_unpack_packed,
        packed_bytes=partial(_packed_bytes, kind),
        width_multiple=kind.elements,
        packs=kind.encode is not None,
    )


FORMATS: tuple[Format, ...] = tuple(_format(kind) for kind in BLOCK_TYPES.values() if kind.elements > 1)
