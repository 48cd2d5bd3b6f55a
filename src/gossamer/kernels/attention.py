"""Attention without a mask, through exactly one backend of torch: what was chosen runs, or torch raises.

    y = softmax(q @ k.T / sqrt(head_dim)) @ v        q, k, v, y (batch, heads, tokens, head_dim)

For training only: on torch 2.11 and an H200, the backward pass of cuDNN at head_dim 32, 320 tokens and bf16 fails with
an execution error. No failure of the forward pass is known; `backends` says when cuDNN is chosen.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gossamer.errors import UnknownOptionError

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str) -> torch.Tensor:
    """Attention of every token to every token; (batch, heads, tokens, head_dim) each."""
    if backend not in BACKENDS:
        raise UnknownOptionError(
            f"There is no attention backend called {backend!r}.",
            f"The backends are: {', '.join(BACKENDS)}.",
            "Take the one that the choice for this device names.",
        )
    with sdpa_kernel(BACKENDS[backend]):
        return F.scaled_dot_product_attention(q, k, v)
