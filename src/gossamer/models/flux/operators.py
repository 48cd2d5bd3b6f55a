"""The functions that a forward is made of besides its layers, as one record, so that a backend is chosen once.

    model.operators = Operators(triton_functions(), partial(kernels.attention.attend, backend="cudnn"))

The defaults are the specification: pure torch, on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gossamer.kernels.pointwise.backends import TORCH, Pointwise
from gossamer.models.flux.attention import attend


@dataclass(frozen=True)
class Operators:
    """`attend` may be replaced by what does the same as the function of its name, exactly or in eight bits."""

    pointwise: Pointwise = TORCH
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = attend
