"""MXFP8 as comfy-kitchen writes it: eight-bit floats in blocks of 32 with a power of two a block.

    tensor          dtype            shape
    x.weight        F8_E4M3          (out, in)
    x.weight_scale  F8_E8M0 or U8    (out, in / 32) in tiles, see tiled_scales.py

Formula: w = weight[o, i] * 2^(weight_scale[o, i / 32] - 127), exact in float32; 255 stands for NaN and is refused

No storage format has such blocks, so the weight is decoded.
Source: "OCP Microscaling Formats (MX) Specification" 1.0, and TensorCoreMXFP8Layout of comfy-kitchen for the order.
"""

from __future__ import annotations

import torch

from gossamer.checkpoints.encodings.stored import damage, decode_rows, matrix_of
from gossamer.checkpoints.encodings.tiled_scales import read_tiles
from gossamer.checkpoints.source import TensorSource

BLOCK = 32


def read_tiled(source: TensorSource, weight: str) -> torch.Tensor:
    """Float32 (out, in)."""
    _, rows, width = matrix_of(source, weight, ("F8_E4M3",))
    if width % BLOCK:
        raise damage(weight, f"It has {width} columns, no multiple of the {BLOCK} that a block holds.")
    name = weight.removesuffix("weight") + "weight_scale"
    exponents = read_tiles(source, weight, name, ("F8_E8M0", "U8"), rows, width // BLOCK)
    if bool((exponents == 255).any()):
        raise damage(weight, f"{name[:80]!r} holds values that are not finite.")
    codes, scales = source.read(weight), _powers(exponents)

    def decode(part: slice) -> torch.Tensor:
        return codes[part].float().view(-1, width // BLOCK, BLOCK).mul_(scales[part, :, None]).view(-1, width)

    return decode_rows(rows, width, decode)


def _powers(exponents: torch.Tensor) -> torch.Tensor:
    """2^(e - 127) by its float32 bits; e = 0 is subnormal."""
    wide = exponents.int()
    return torch.where(wide == 0, 0x00400000, wide << 23).view(torch.float32)
