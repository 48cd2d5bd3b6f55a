"""Attention without a mask, through exactly one backend: what was chosen runs, or it raises.

    y = softmax(q @ k.T / sqrt(head_dim)) @ v        q, k, v, y (batch, heads, tokens, head_dim)

`eight_bit` is our own kernel for Hopper: queries and keys are rounded to int8, probabilities and values to e4m3. It can
norm and rotate queries and keys itself (`attention_normed`). All others are torch's and exact.

For training only: on torch 2.11 and an H200, the backward pass of cuDNN at head_dim 32, 320 tokens and bf16 fails with
an execution error. No failure of the forward pass is known; `backends` says when cuDNN is chosen.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gossamer.errors import UnknownOptionError

EIGHT_BIT = "eight_bit"
OF_TORCH = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
BACKENDS = (EIGHT_BIT, *OF_TORCH)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str) -> torch.Tensor:
    """Attention of every token to every token; (batch, heads, tokens, head_dim) each."""
    if backend == EIGHT_BIT:
        from gossamer.kernels.attention_eight_bit import attend_eight_bit  # needs Triton

        return attend_eight_bit(q, k, v)
    if backend not in OF_TORCH:
        raise UnknownOptionError(
            f"There is no attention backend called {backend!r}.",
            f"The backends are: {', '.join(BACKENDS)}.",
            "Take the one that the choice for this device names.",
        )
    with sdpa_kernel(OF_TORCH[backend]):
        return F.scaled_dot_product_attention(q, k, v)


def heads_first(qkv: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values (batch, heads, tokens, head size) of a buffer (batch, tokens, 3 * width), as views."""
    query, key, value = qkv.unflatten(-1, (3, -1, head_size)).permute(2, 0, 3, 1, 4)
    return query, key, value


def tokens_first(attended: torch.Tensor) -> torch.Tensor:
    """(batch, heads, tokens, head size) to (batch, tokens, width): a view where tokens come first in memory."""
    return attended.transpose(1, 2).flatten(2)
