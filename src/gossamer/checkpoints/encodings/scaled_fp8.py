"""Weights with one scale for the whole matrix or one a row, as ComfyUI and Black Forest Labs write them.

    tensor                         dtype                       shape
    x.weight                       F8_E4M3, F8_E5M2 or I8      (out, in)
    x.scale_weight or .weight_scale  F32, F16 or BF16          (), (1,), (out,) or (out, 1)
    x.scale_input or .input_scale  float                       a scale of activations, which Gossamer does not need
    scaled_fp8                     one a file or component     only says that the others are there

Formula: w = weight[o, i] * scale[o], in float32. Formats fp8, fp8_e5m2 and int8 hold exactly that.

Files leave some layers at full precision and still write a scale of 1 beside them; such a weight comes back as it is.
Biases in fp8 have no scale: they are plain tensors. Scales of activations are measured at run time instead, row by row.

Source: convert_old_quants in ComfyUI's comfy/utils.py for `scale_weight`; diffusers' quantizers/bfl for `weight_scale`.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from gossamer.checkpoints.encodings.encoding import Encoding, beside
from gossamer.checkpoints.encodings.stored import FLOATS, damage, entry_of, matrix_of, read_row_scale, unknown
from gossamer.checkpoints.source import TensorSource
from gossamer.formats import Packed

STORAGE = {"F8_E4M3": "fp8", "F8_E5M2": "fp8_e5m2", "I8": "int8"}
SCALES = ("scale_weight", "weight_scale")
MARKER = "scaled_fp8"


def markers(names: Collection[str]) -> tuple[str, ...]:
    """Tensors that only say that a file, or a component of it, is stored this way."""
    return tuple(name for name in names if name.rpartition(".")[2] == MARKER)


def find(source: TensorSource, names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Weights with a scale beside them."""
    weights = (name for name in names if name.endswith(".weight"))
    sides = (*SCALES, "scale_input", "input_scale")
    found = {weight: beside(weight, sides, names) for weight in weights}
    return {weight: parts for weight, parts in found.items() if any(part.endswith(SCALES) for part in parts[1:])}


def read(source: TensorSource, weight: str) -> Packed | torch.Tensor:
    """The stored codes with their scale; a weight of full precision with its scale multiplied in."""
    scales = [name for name in beside(weight, SCALES, source.entries) if name != weight]
    if len(scales) != 1:
        raise damage(weight, f"{len(scales)} scales stand beside it; one was expected.")
    entry = entry_of(source, weight, weight, (*STORAGE, *FLOATS, "U8"))
    if entry.dtype in FLOATS:
        return _read_unscaled(source, weight, scales[0])
    if entry.dtype == "U8":
        raise unknown(weight, "bytes with a scale but no description", "Nothing says what the bytes stand for.")
    return read_scaled(source, weight, scales[0])


def read_scaled(source: TensorSource, weight: str, scale_name: str) -> Packed:
    """A matrix of fp8 or int8 codes, and a scale by row."""
    entry, rows, width = matrix_of(source, weight, tuple(STORAGE))
    scale = read_row_scale(source, weight, scale_name, rows)
    return Packed(STORAGE[entry.dtype], {"codes": source.read(weight), "scale": scale}, (rows, width))


def _read_unscaled(source: TensorSource, weight: str, scale_name: str) -> torch.Tensor:
    values = source.read(weight)
    scale = read_row_scale(source, weight, scale_name, values.shape[0] if values.dim() else 1)
    if bool((scale == 1).all()):
        return values
    return (values.float() * scale.view(-1, *[1] * (values.dim() - 1))).reshape(values.shape)


ENCODING = Encoding("scaled fp8", find, read)
