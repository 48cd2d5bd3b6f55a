"""Weights that a checkpoint stores as several tensors: found by name, read into the same numbers. One file an encoding.

    encoded = find_encoded(source, names)     weight -> EncodedWeight(encoding, tensors)
    read_encoded(source, encoded[weight])     Packed, or float32 where no storage format holds the same numbers
    markers(names)                            tensors that only say how others are stored

Encodings are asked in the order of ENCODINGS, each about the names that are left; so no tensor belongs to two weights,
and a name that is in no `tensors` and no marker is a plain tensor, or one that nothing uses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from gossamer.checkpoints.encodings import bitsandbytes_4bit, bitsandbytes_8bit, comfy_quant, nvfp4, scaled_fp8
from gossamer.checkpoints.encodings.encoding import Encoding
from gossamer.checkpoints.encodings.scaled_fp8 import markers
from gossamer.checkpoints.source import TensorSource
from gossamer.formats import Packed

# one that is described explicitly stands before one that shares its names without a description
ENCODINGS: tuple[Encoding, ...] = (
    comfy_quant.ENCODING,
    bitsandbytes_4bit.ENCODING,
    bitsandbytes_8bit.ENCODING,
    nvfp4.ENCODING,
    scaled_fp8.ENCODING,
)


@dataclass(frozen=True)
class EncodedWeight:
    """A weight, how it is stored, and every tensor that belongs to it, itself first."""

    name: str
    encoding: Encoding
    tensors: tuple[str, ...]


def find_encoded(source: TensorSource, names: Iterable[str]) -> dict[str, EncodedWeight]:
    """Every weight among `names` that is stored as several tensors."""
    left = dict.fromkeys(names)
    encoded: dict[str, EncodedWeight] = {}
    for encoding in ENCODINGS:
        for weight, tensors in encoding.find(source, left.keys()).items():
            encoded[weight] = EncodedWeight(weight, encoding, tensors)
            for name in tensors:
                del left[name]
    return encoded


def read_encoded(source: TensorSource, weight: EncodedWeight) -> Packed | torch.Tensor:
    """The weight in its logical shape (out, in)."""
    return weight.encoding.read(source, weight.name)


__all__ = ["ENCODINGS", "EncodedWeight", "Encoding", "find_encoded", "markers", "read_encoded"]
