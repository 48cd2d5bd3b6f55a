"""Weights with a scale for each tile or group, which comfy-kitchen and convert_to_quant write.

    format                    x.weight            scales
    float8_e4m3fn_blockwise   F8_E4M3 (out, in)   weight_scale (out / g, in / g), g = 64 unless said
    int8_blockwise            I8 (out, in)        weight_scale (out / g, in / g), g = 128 unless said
    awq_w4a16                 I8 (out, in / 2)    weight_scale and weight_zeros (in / g, out), g = 64 unless said

Formulas: blockwise  w = weight[o, i] * weight_scale[o / g, i / g]
          awq        w = (code - 8) * weight_scale[i / g, o] + weight_zeros[i / g, o], code 0 to 15; of the two
                     in a byte the earlier is in the low four bits

No storage format has such groups, so the weight is decoded to float32.
Source: comfy-kitchen's tensor/awq_w4a16.py; BlockWiseFP8Layout and BlockWiseINT8Layout of convert_to_quant.
"""

from __future__ import annotations

import torch

from gossamer.checkpoints.encodings.stored import damage, decode_rows, matrix_of, read_floats
from gossamer.checkpoints.source import TensorSource


def read_blockwise(source: TensorSource, weight: str, dtype: str, group: int) -> torch.Tensor:
    """Float32 (out, in) from square tiles of `group` rows and columns."""
    _, rows, width = matrix_of(source, weight, (dtype,))
    if rows % group or width % group:
        raise damage(weight, f"It has {rows} rows and {width} columns, no multiples of the group size {group}.")
    shape = (rows // group, width // group)
    scales = read_floats(source, weight, weight.removesuffix("weight") + "weight_scale", shape).view(shape)
    codes = source.read(weight)

    def decode(part: slice) -> torch.Tensor:
        of_row = scales[torch.arange(part.start, part.stop) // group]
        return codes[part].float().view(-1, shape[1], group).mul_(of_row[:, :, None]).view(-1, width)

    return decode_rows(rows, width, decode)


def read_awq(source: TensorSource, weight: str, group: int) -> torch.Tensor:
    """Float32 (out, in) from four-bit codes with a scale and an offset for `group` of a row."""
    _, rows, half = matrix_of(source, weight, ("I8", "U8"))
    width = 2 * half
    if width % group:
        raise damage(weight, f"Its {width} columns are no multiple of the group size {group}.")
    layer, shape = weight.removesuffix("weight"), (width // group, rows)
    scales = read_floats(source, weight, layer + "weight_scale", shape).view(shape).t()
    zeros = read_floats(source, weight, layer + "weight_zeros", shape).view(shape).t()
    codes = source.read(weight)

    def decode(part: slice) -> torch.Tensor:
        pair = codes[part].view(torch.uint8)
        both = torch.stack((pair & 15, pair >> 4), dim=-1).view(pair.shape[0], -1, group)
        weights = (both.float() - 8).mul_(scales[part, :, None])
        return weights.add_(zeros[part, :, None]).view(-1, width)

    return decode_rows(rows, width, decode)
