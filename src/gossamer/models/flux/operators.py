"""The functions that a forward is made of besides its layers, as one record, so that a backend is chosen once.

    model.operators = Operators(triton_functions(), attention_through("cudnn"))

The defaults are the specification: pure torch, on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch.nn import functional as F

from gossamer.kernels.attention import EIGHT_BIT, attend, heads_first, tokens_first
from gossamer.kernels.pointwise import HeadNorm, Rotation, TextNorm
from gossamer.kernels.pointwise.backends import TORCH, Pointwise

Attention: TypeAlias = Callable[[torch.Tensor, Rotation, HeadNorm, TextNorm | None, Pointwise], torch.Tensor]
Attend: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def attention(
    qkv: torch.Tensor,
    rotation: Rotation,
    norm: HeadNorm,
    text: TextNorm | None,
    pointwise: Pointwise,
    attend: Attend = F.scaled_dot_product_attention,
) -> torch.Tensor:
    """Norm and rotate queries and keys in place, then attend: (batch, tokens, 3 * width) to (batch, tokens, width).

    `attend` is softmax(q k^T / sqrt(head size)) v, (batch, heads, tokens, head size) each; torch chooses among its own.
    """
    pointwise.qk_norm_rope_(qkv, rotation, norm, text)
    return tokens_first(attend(*heads_first(qkv, rotation.dim)))


def attention_in_eight_bits(
    qkv: torch.Tensor, rotation: Rotation, norm: HeadNorm, text: TextNorm | None, pointwise: Pointwise
) -> torch.Tensor:
    """`attention` in kernels that norm and rotate on the way, and leave qkv as it is."""
    from gossamer.kernels.attention_normed import attend_normed  # needs Triton

    return attend_normed(qkv, rotation, norm, text)


def attention_through(backend: str) -> Attention:
    """`attention` through one backend of `kernels.attention`."""
    if backend == EIGHT_BIT:
        return attention_in_eight_bits
    return partial(attention, attend=partial(attend, backend=backend))


@dataclass(frozen=True)
class Operators:
    """`attention` may be replaced by what does the same as the function of its name, exactly or in eight bits.

    It may write queries and keys of the buffer that it is given, or not.
    """

    pointwise: Pointwise = TORCH
    attention: Attention = attention
