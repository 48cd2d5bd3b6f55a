"""What the decode kernels compute, in pure torch: the specification, and the backend where Triton is missing.

    W_eff     = unpack(packed), zero columns where `out` is wider, plus up @ (scale * down)        float32 (out, in)
    float     out = W_eff rounded once to fp32, fp16 or bf16
    fp8       out = e4m3(clamp(W_eff * (1 / row_scale), -448, 448))
    int8      out = round half to even(clamp(W_eff * (1 / row_scale), -127, 127))
    row_scale = largest |W_eff| of the row / largest code; 1 where that is zero or subnormal

The quotient is a product with a reciprocal, itself correctly rounded, because a division costs a GPU eight times as
much. Codes can then differ by one step from those of `formats.pack`, where a value lies within 2^-23 of a boundary.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from gossamer.formats import Packed, unpack
from gossamer.kernels.low_rank import StackedTerms, delta

LARGEST_CODE = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def effective_weight(packed: Packed, width: int, terms: StackedTerms | None = None) -> torch.Tensor:
    """W_eff in float32 (out, width); may be the stored tensor itself, so do not write into it."""
    weight = unpack(packed, torch.float32)
    weight = F.pad(weight, (0, width - weight.shape[1])) if width > weight.shape[1] else weight
    return weight if terms is None else weight + delta(terms)


def row_scales(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Float32 (out,): what one unit of code is worth in each row of a float32 weight."""
    largest = torch.tensor(LARGEST_CODE[dtype], device=weight.device)
    unit = weight.abs().amax(dim=1) / largest
    return torch.where(unit >= torch.finfo(torch.float32).tiny, unit, 1.0)


def round_to(weight: torch.Tensor, dtype: torch.dtype, row_scale: torch.Tensor | None = None) -> torch.Tensor:
    """A float32 weight in `dtype`, divided by its row scales where `dtype` is fp8 or int8."""
    if dtype in FLOAT_TYPES:
        return weight.to(dtype)
    if row_scale is None:
        raise ValueError(f"{dtype} needs a row scale")
    largest = LARGEST_CODE[dtype]
    codes = (weight * row_scale.reciprocal()[:, None]).clamp_(-largest, largest)
    return codes.round_().to(dtype) if dtype == torch.int8 else codes.to(dtype)


def decode_in_torch(
    packed: Packed,
    out: torch.Tensor,
    terms: StackedTerms | None = None,
    row_scale: torch.Tensor | None = None,
) -> None:
    """W_eff into `out`; for fp8 and int8 `row_scale` has to hold the scales already."""
    out.copy_(round_to(effective_weight(packed, out.shape[1], terms), out.dtype, row_scale))


def measure_row_scale_in_torch(
    packed: Packed, row_scale: torch.Tensor, dtype: torch.dtype, width: int, terms: StackedTerms | None = None
) -> None:
    """The row scales of W_eff for codes of `dtype` into `row_scale` (out,)."""
    row_scale.copy_(row_scales(effective_weight(packed, width, terms), dtype))
