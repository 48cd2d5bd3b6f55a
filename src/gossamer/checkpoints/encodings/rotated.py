"""Weights that comfy-kitchen rotated before it rounded them to integers: ConvRot, in eight and in four bits.

A rotation spreads a group of a row's values over all of them, so none stands out. The weight is rotated back here; what
that gives lies on no grid, so no storage format holds it and it is decoded to float32. Integers rotate exactly, so each
value is rounded once, when the scale is multiplied in (and once more where there is a correction).

    format           x.weight             scales
    int8_tensorwise  I8 (out, in)         weight_scale (), (out,) or (out, 1)
    convrot_w4a4     I8 (out, in / 2)     weight_scale (out,) or (out, 1)
    asym_w4a8_int8   I8 (out, in / 2)     weight_s_rel (out, in / g) F8_E4M3 or float, weight_s_channel (out,),
                                          weight_codebook (16,) or none, weight_correction (in / g, out) or none

Four-bit codes stand in pairs, the earlier in the low four bits: -8 to 7 in convrot_w4a4, 0 to 15 in asym_w4a8_int8.

Formulas: w4a4  W = R(code) * scale[o]
          w4a8  n = round((codebook[code] or code - 8) * s_rel[o, i / g]), kept within -127 to 127
                W = R(n) * s_channel[o] + R(correction[i / g, o])

Source: comfy-kitchen's tensor/int8.py, tensor/convrot_w4a4.py and tensor/w4a8_int8.py.
"""

from __future__ import annotations

import torch

from gossamer.checkpoints.encodings.hadamard import is_rotation_size, rotate_unscaled, rotation_factor
from gossamer.checkpoints.encodings.stored import (
    FLOATS,
    damage,
    decode_rows,
    matrix_of,
    read_floats,
    read_row_scale,
    read_shaped,
    require_finite,
)
from gossamer.checkpoints.source import TensorSource


def read_int8(source: TensorSource, weight: str, size: int) -> torch.Tensor:
    """Float32 (out, in) from rotated int8; `size` is that of the rotation."""
    _, rows, width = matrix_of(source, weight, ("I8",))
    _require_rotation(weight, width, size)
    scale = read_row_scale(source, weight, _side(weight, "weight_scale"), rows)[:, None] * rotation_factor(size)
    codes = source.read(weight)
    return decode_rows(rows, width, lambda part: rotate_unscaled(codes[part].float(), size).mul_(scale[part]))


def read_w4a4(source: TensorSource, weight: str, size: int) -> torch.Tensor:
    """Float32 (out, in) from rotated four-bit integers with a scale a row."""
    _, rows, half = matrix_of(source, weight, ("I8",))
    _require_rotation(weight, 2 * half, size)
    scale = read_row_scale(source, weight, _side(weight, "weight_scale"), rows)[:, None] * rotation_factor(size)
    codes, values = source.read(weight), torch.tensor([*range(8), *range(-8, 0)], dtype=torch.float32)
    return decode_rows(
        rows, 2 * half, lambda part: rotate_unscaled(_look_up(codes[part], values), size).mul_(scale[part])
    )


def read_w4a8(source: TensorSource, weight: str, size: int, group: int) -> torch.Tensor:
    """Float32 (out, in) from rotated integers that are kept as four bits with a scale for `group` of them."""
    _, rows, half = matrix_of(source, weight, ("I8",))
    width = 2 * half
    _require_rotation(weight, width, size)
    if width % group:
        raise damage(weight, f"Its {width} columns are no multiple of the group size {group}.")
    values = _codebook(source, weight)
    relative = _relative_scales(source, weight, rows, width // group)
    channel = read_floats(source, weight, _side(weight, "weight_s_channel"), (rows,), (rows, 1))[:, None]
    correction = _correction(source, weight, rows, width // group)
    codes, factor = source.read(weight), rotation_factor(size)

    def decode(part: slice) -> torch.Tensor:
        scaled = _look_up(codes[part], values).view(-1, width // group, group).mul_(relative[part, :, None])
        integers = scaled.round_().clamp_(-127, 127).view(-1, width)
        weights = rotate_unscaled(integers, size).mul_(channel[part] * factor)
        if correction is None:
            return weights
        shift = correction[part].repeat_interleave(group, dim=1)
        return weights.add_(rotate_unscaled(shift, size), alpha=factor)

    return decode_rows(rows, width, decode)


def _side(weight: str, role: str) -> str:
    return weight.removesuffix("weight") + role


def _require_rotation(weight: str, width: int, size: int) -> None:
    if not is_rotation_size(size) or width % size:
        raise damage(weight, f"Groups of {size} cannot be rotated: a power of four that divides {width} is needed.")


def _look_up(codes: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Float32 (rows, 2 * bytes): the values of a byte's two codes, that of the low four bits first."""
    codes = codes.view(torch.uint8)
    both = torch.stack((codes & 15, codes >> 4), dim=-1).view(codes.shape[0], -1)
    return values.index_select(0, both.view(-1).int()).view(both.shape)


def _codebook(source: TensorSource, weight: str) -> torch.Tensor:
    name = _side(weight, "weight_codebook")
    if name not in source.entries:
        return torch.arange(-8.0, 8.0)
    return read_floats(source, weight, name, (16,))


def _relative_scales(source: TensorSource, weight: str, rows: int, groups: int) -> torch.Tensor:
    name = _side(weight, "weight_s_rel")
    stored = read_shaped(source, weight, name, ("F8_E4M3", "U8", *FLOATS), ((rows, groups),))
    scales = (stored.view(torch.float8_e4m3fn) if stored.dtype == torch.uint8 else stored).float()
    require_finite(weight, name, scales)
    return scales


def _correction(source: TensorSource, weight: str, rows: int, groups: int) -> torch.Tensor | None:
    name = _side(weight, "weight_correction")
    if name not in source.entries:
        return None
    return read_floats(source, weight, name, (groups, rows)).view(groups, rows).t()
