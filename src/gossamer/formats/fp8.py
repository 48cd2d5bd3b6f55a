"""fp8 and fp8_e5m2: eight-bit floats with one scale per output row.

Storage:
    codes   (out, in)   float8_e4m3fn (fp8) or float8_e5m2 (fp8_e5m2)
    scale   (out,)      float32, largest magnitude of the row / largest finite code; 1 for a row of zeros

Range: e4m3fn 1 sign, 4 exponent, 3 fraction bits, largest 448; e5m2 1, 5, 2 bits, largest 57344.
Formula: w = codes[o, i] * scale[o], in float32, then rounded once to the wanted type

The scale puts a row's largest value on the largest code. Without it weights of standard deviation 0.02 fall among the
subnormal codes of e4m3, where the step is a constant 2^-9.
"""

from __future__ import annotations

from functools import partial

import torch

from gossamer.formats.checks import require_packable
from gossamer.formats.packed import Format, Packed
from gossamer.formats.rows import row_scale

DTYPES = {"fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def _pack(weight: torch.Tensor, *, storage: str) -> Packed:
    require_packable(weight, storage)
    largest = torch.finfo(DTYPES[storage]).max
    values = weight.detach().float()
    scale = row_scale(values, largest)
    # a subnormal scale is coarse, and the cast turns what lies beyond the largest code into NaN or infinity
    codes = (values / scale[:, None]).clamp_(-largest, largest).to(DTYPES[storage])
    return Packed(storage, {"codes": codes, "scale": scale}, (weight.shape[0], weight.shape[1]))


def unpack(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """The weight (out, in) in `dtype`."""
    values = packed.tensors["codes"].to(torch.float32)
    return values.mul_(packed.tensors["scale"][:, None]).to(dtype)


def packed_bytes(out_features: int, in_features: int) -> int:
    """One byte a value and four a row."""
    return out_features * in_features + 4 * out_features


FORMATS = tuple(Format(name, partial(_pack, storage=name), unpack, packed_bytes) for name in DTYPES)
