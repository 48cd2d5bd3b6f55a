"""Residual, gate, LayerNorm and modulation of a FLUX block, in pure torch: the specification of the fused kernel.

    x'  = x + gate * y                                   rounded to the type of x, saturating in float16
    out = LayerNorm(x') * (1 + scale) + shift            no affine weights; float32, rounded once to the row type

Shapes: x, y (batch, tokens, width); gate, scale, shift (batch, width).

The norm reads x' after its rounding, so the fused function is exactly the two others one after the other, and a block
may be cut there without changing a pixel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from gossamer.kernels.pointwise.rows import Rows, quantize_rows

EPS = 1e-6  # of every LayerNorm and RMSNorm of FLUX
FLOAT16_LARGEST = 65504.0


@dataclass(frozen=True)
class Modulation:
    """What one adaLN linear gives to one norm: scale and shift, each (batch, width)."""

    scale: torch.Tensor
    shift: torch.Tensor


def norm_modulate(x: torch.Tensor, by: Modulation, dtype: torch.dtype, eps: float = EPS) -> Rows:
    """LayerNorm(x) * (1 + scale) + shift as rows of `dtype`."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return quantize_rows(normed * (1 + by.scale.float()[:, None]) + by.shift.float()[:, None], dtype)


def residual_gate_(x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x += gate * y, in place; returns x."""
    total = x.float() + gate.float()[:, None] * y.float()
    if x.dtype == torch.float16:
        total = total.clamp(-FLOAT16_LARGEST, FLOAT16_LARGEST)
    return x.copy_(total)


def residual_gate_norm_modulate_(
    x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor, by: Modulation, dtype: torch.dtype, eps: float = EPS
) -> Rows:
    """x += gate * y in place, then LayerNorm and modulation of the new x as rows of `dtype`."""
    return norm_modulate(residual_gate_(x, gate, y), by, dtype, eps)
