"""Weights that are one tensor and no plain number type: blocks of GGUF files, and fp8 without scales.

    tensor      dtype                becomes
    x.weight    a GGUF block type    that format, the bytes as they are
    x.weight    F8_E4M3, F8_E5M2     fp8 or fp8_e5m2 with a scale of 1 for every row, which is exact

These are asked last, for what no encoding of several tensors claims. Only matrices are claimed: no linear layer can use
anything else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from gossamer.checkpoints.encodings.encoding import Encoding
from gossamer.checkpoints.source import TensorSource
from gossamer.formats import Packed
from gossamer.formats.gguf import BLOCK_TYPES

FP8: Mapping[str, str] = {"F8_E4M3": "fp8", "F8_E5M2": "fp8_e5m2"}
BLOCKS = tuple(name for name, kind in BLOCK_TYPES.items() if kind.elements > 1)


def _find_matrices(source: TensorSource, names: Collection[str], dtypes: Collection[str]) -> dict[str, tuple[str, ...]]:
    entries = source.entries
    return {name: (name,) for name in names if entries[name].dtype in dtypes and len(entries[name].shape) == 2}


def _find_blocks(source: TensorSource, names: Collection[str]) -> Mapping[str, tuple[str, ...]]:
    return _find_matrices(source, names, BLOCKS)


def _read_blocks(source: TensorSource, weight: str) -> Packed:
    entry = source.entries[weight]
    return Packed(entry.dtype, {"blocks": source.read(weight)}, (entry.shape[0], entry.shape[1]))


def _find_fp8(source: TensorSource, names: Collection[str]) -> Mapping[str, tuple[str, ...]]:
    return _find_matrices(source, names, tuple(FP8))


def _read_fp8(source: TensorSource, weight: str) -> Packed:
    codes = source.read(weight)
    scale = torch.ones(codes.shape[0], dtype=torch.float32)
    return Packed(FP8[source.entries[weight].dtype], {"codes": codes, "scale": scale}, (codes.shape[0], codes.shape[1]))


GGUF_BLOCKS = Encoding("GGUF blocks", _find_blocks, _read_blocks)
UNSCALED_FP8 = Encoding("fp8 without scales", _find_fp8, _read_fp8)
SINGLE_TENSOR = (GGUF_BLOCKS, UNSCALED_FP8)
