"""Linears that read the same input, run as one group into one buffer: y = [layer_0(x), layer_1(x), ...].

A block has its queries, keys, values (and a single block its feed-forward part) in one buffer that way. A backend that
decodes the group's weights into the rows of one scratch weight and makes one product of it belongs in here. On a CPU
that gains nothing (320 tokens, width 256, a single block's group: 2.7 ms in one product, 2.8 ms in four), so the
reference runs the layers one after the other, each as exact as it is alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def apply_together(layers: Sequence[nn.Module], x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """x (..., in) through every layer into `out` (..., sum of outputs), which may be a view; returns out."""
    widths = [int(layer.out_features) for layer in layers]  # type: ignore[arg-type]
    if out.shape[-1] != sum(widths):
        raise ValueError(f"layers of {widths} outputs do not fill a buffer of {out.shape[-1]} columns")
    stop = 0
    for layer, width in zip(layers, widths, strict=True):
        start, stop = stop, stop + width
        out[..., start:stop] = layer(x)
    return out
