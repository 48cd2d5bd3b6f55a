"""The functions that a forward is made of besides its layers, as one record, so that a backend is chosen once.

    model.operators = Operators(triton_functions(), partial(kernels.attention.attend, backend="cudnn"))

The defaults are the specification: pure torch, on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gossamer.kernels.pointwise.backends import TORCH, Pointwise
from gossamer.models.flux.attention import attend
from gossamer.models.flux.together import apply_together


@dataclass(frozen=True)
class Operators:
    """`attend` and `apply_together` may be replaced by what does the same as the functions of their names."""

    pointwise: Pointwise = TORCH
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = attend
    apply_together: Callable[[Sequence[nn.Module], torch.Tensor, torch.Tensor], torch.Tensor] = apply_together
