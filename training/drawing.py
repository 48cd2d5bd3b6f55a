"""What every step that draws pictures shares: the renderer's compiler, and bytes."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from gossamer.demo.march import Compile, identity


def compiler(wanted: bool) -> Compile:
    """What the renderer wraps its functions in: each is compiled once for each shape that it meets, or not at all."""
    return functools.cache(functools.partial(torch.compile, dynamic=False)) if wanted else identity


def to_bytes(pictures: Tensor) -> Tensor:
    """Pictures in [0, 1] to uint8."""
    return (pictures.clamp(0, 1) * 255).round().to(torch.uint8)
