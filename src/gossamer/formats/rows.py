"""The scale of one output row, as the fp8 and int8 formats use it."""

from __future__ import annotations

import torch


def row_scale(values: torch.Tensor, largest: float) -> torch.Tensor:
    """Float32 (out,): what one unit of code is worth, so that a row's largest magnitude lands on `largest`.

    A row of zeros, or one so small that the quotient underflows, gets scale 1: its codes are then zero.
    """
    scale = values.abs().amax(dim=1) / largest
    return torch.where(scale > 0, scale, torch.ones_like(scale))
