"""NVFP4: four-bit floats in blocks of 16, with a scale a block and one for the matrix.

    tensor            dtype                 shape
    x.weight          U8                    (out, in / 2), two E2M1 codes a byte
    x.weight_scale    F8_E4M3               (out, in / 16)
    x.weight_scale_2  F32                   ()
    x.input_scale     F32                   (), a scale of activations, which Gossamer does not need

Formula: w = e2m1[code] * (weight_scale[o, i / 16] * weight_scale_2), in float32
Range: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives

There are two orders. Without a description the file follows NVIDIA's ModelOpt, as diffusers' `BFLQuantizationConfig`
reads and writes it: the earlier value in the low four bits, scales in rows. With a `comfy_quant` description or
`_quantization_metadata`, as the files that Black Forest Labs publishes have one, it follows comfy-kitchen: the earlier
value in the high four bits, scales in tiles. Shapes do not tell the two apart.

No storage format has such blocks (GGUF's NVFP4 has no scale for the matrix), so the weight is decoded, to the bit as
diffusers and comfy-kitchen decode it in float32.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from gossamer.checkpoints.encodings.encoding import Encoding, beside
from gossamer.checkpoints.encodings.stored import (
    damage,
    decode_rows,
    matrix_of,
    read_floats,
    read_scalar,
    read_shaped,
    require_finite,
)
from gossamer.checkpoints.encodings.tiled_scales import read_tiles
from gossamer.checkpoints.source import TensorSource

BLOCK = 16
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
SIDES = ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")


def find(source: TensorSource, names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Weights with two scales beside them."""
    layers = (name.removesuffix("weight_scale_2") for name in names if name.endswith(".weight_scale_2"))
    return {layer + "weight": beside(layer + "weight", SIDES, names) for layer in layers if layer + "weight" in names}


def read(source: TensorSource, weight: str) -> torch.Tensor:
    """Float32 (out, in) from a file in the order of ModelOpt."""
    layer = weight.removesuffix("weight")
    shape = _blocks(source, weight)
    scales = read_shaped(source, weight, layer + "weight_scale", ("F8_E4M3",), (shape,)).float()
    decoded = _decode(source, weight, scales, high_first=False)
    return scale_columns(source, weight, decoded)


def read_tiled(source: TensorSource, weight: str) -> torch.Tensor:
    """Float32 (out, in) from a file in the order of comfy-kitchen."""
    name = weight.removesuffix("weight") + "weight_scale"
    stored = read_tiles(source, weight, name, ("F8_E4M3", "U8"), *_blocks(source, weight))
    return _decode(source, weight, stored.view(torch.float8_e4m3fn).float(), high_first=True)


def scale_columns(source: TensorSource, weight: str, decoded: torch.Tensor) -> torch.Tensor:
    """Multiply in `pre_quant_scale`, if there is one: it scales the layer's input, which is as good as its columns."""
    name = weight.removesuffix("weight") + "pre_quant_scale"
    if name not in source.entries:
        return decoded
    width = decoded.shape[1]
    return decoded.mul_(read_floats(source, weight, name, (width,), (1, width)))


def _blocks(source: TensorSource, weight: str) -> tuple[int, int]:
    """Rows, and blocks in a row."""
    _, rows, half = matrix_of(source, weight, ("U8",))
    if 2 * half % BLOCK:
        raise damage(weight, f"It has {2 * half} columns, no multiple of the {BLOCK} that a block holds.")
    return rows, 2 * half // BLOCK


def _decode(source: TensorSource, weight: str, scales: torch.Tensor, *, high_first: bool) -> torch.Tensor:
    """Scales (rows, blocks), not yet with the matrix's scale."""
    layer = weight.removesuffix("weight")
    require_finite(weight, layer + "weight_scale", scales)
    scales = scales * read_scalar(source, weight, layer + "weight_scale_2")
    codes, pairs = source.read(weight), _value_pairs(high_first)
    rows, width = codes.shape[0], 2 * codes.shape[1]

    def decode(part: slice) -> torch.Tensor:
        values = pairs.index_select(0, codes[part].reshape(-1).int()).view(torch.float32)
        return values.view(-1, width // BLOCK, BLOCK).mul_(scales[part, :, None]).view(-1, width)

    return decode_rows(rows, width, decode)


def _value_pairs(high_first: bool) -> torch.Tensor:
    """The two float32 values of every byte as one 8-byte element (256,): one look-up then decodes two weights."""
    values, byte = torch.tensor(E2M1), torch.arange(256)
    high, low = values[byte >> 4], values[byte & 15]
    return torch.stack((high, low) if high_first else (low, high), dim=1).view(torch.int64).squeeze(1)


ENCODING = Encoding("nvfp4", find, read)
