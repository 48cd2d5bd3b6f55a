"""int8: symmetric eight-bit integers with one scale per output row.

Storage:
    codes   (out, in)   int8, -127 to 127; -128 is never written, so the range is symmetric
    scale   (out,)      float32, largest magnitude of the row / 127; 1 for a row of zeros

Range: 255 evenly spaced values from -127 * scale to 127 * scale.
Formula: w = codes[o, i] * scale[o], in float32, then rounded once to the wanted type
"""

from __future__ import annotations

import torch

from gossamer.formats.checks import require_packable
from gossamer.formats.packed import Format, Packed
from gossamer.formats.rows import row_scale

LARGEST = 127


def pack(weight: torch.Tensor) -> Packed:
    """Codes by rounding to nearest, ties to even."""
    require_packable(weight, "int8")
    values = weight.detach().float()
    scale = row_scale(values, LARGEST)
    codes = (values / scale[:, None]).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    return Packed("int8", {"codes": codes, "scale": scale}, (weight.shape[0], weight.shape[1]))


def unpack(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """The weight (out, in) in `dtype`."""
    values = packed.tensors["codes"].to(torch.float32)
    return values.mul_(packed.tensors["scale"][:, None]).to(dtype)


def packed_bytes(out_features: int, in_features: int) -> int:
    """One byte a value and four a row."""
    return out_features * in_features + 4 * out_features


FORMATS = (Format("int8", pack, unpack, packed_bytes),)
