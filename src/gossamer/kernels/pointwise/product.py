"""Back from an int8 product to activations, in pure torch: the specification of the fused kernel.

    out[m, n] = product[m, n] * row_scale[m] * column_scale[n] + bias[n]

Shapes: product (rows, columns) int32; row_scale (rows,), column_scale (columns,) float32; bias (columns,).
Float32 arithmetic, one rounding to the type of the activations.
"""

from __future__ import annotations

import torch


def rescale_product(
    product: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The product (rows, columns) in `dtype`, its two scales and the bias put back."""
    out = product.float() * row_scale[:, None] * column_scale
    return (out if bias is None else out + bias.float()).to(dtype)
