"""GELU of the feed-forward part, alone or behind the attention output, in pure torch: the specification of the kernel.

    gelu(x) = 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
    out     = gelu(mlp)                   a double block's feed-forward
    out     = [attention, gelu(mlp)]      a single block: one row, one scale

Shapes: attention (batch, tokens, width), mlp (batch, tokens, mlp_width). Float32 arithmetic, one rounding.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from gossamer.kernels.pointwise.rows import Rows, quantize_rows


def gelu_rows(mlp: torch.Tensor, dtype: torch.dtype) -> Rows:
    """gelu(mlp) as rows of `dtype`."""
    return quantize_rows(F.gelu(mlp.float(), approximate="tanh"), dtype)


def gelu_concat(attention: torch.Tensor, mlp: torch.Tensor, dtype: torch.dtype) -> Rows:
    """[attention, gelu(mlp)] as rows of `dtype`: what a single block's last linear reads."""
    joined = torch.empty(*mlp.shape[:-1], attention.shape[-1] + mlp.shape[-1], dtype=torch.float32, device=mlp.device)
    joined[..., : attention.shape[-1]] = attention
    joined[..., attention.shape[-1] :] = F.gelu(mlp.float(), approximate="tanh")
    return quantize_rows(joined, dtype)
