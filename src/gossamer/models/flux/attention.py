"""Attention of FLUX's blocks: the linears and norm scales under their canonical names, and the product itself.

Queries, keys and values of all tokens stand in one buffer (batch, tokens, 3 * width), text tokens first, so that the
two streams of a double block need no concatenation.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from gossamer.kernels.pointwise import HeadNorm
from gossamer.layers import LinearGroup


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(head size)) v; (batch, heads, tokens, head size) each. torch chooses among its backends."""
    return F.scaled_dot_product_attention(query, key, value)


def heads_first(qkv: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values (batch, heads, tokens, head size) of a buffer (batch, tokens, 3 * width), as views.

    The buffer is a tensor of its own, or its first columns, and a head is 256 bytes in FLUX.1: all that a view begins
    with and steps by is a multiple of 16 bytes, as Hopper's copy engine needs it.
    """
    query, key, value = qkv.unflatten(-1, (3, -1, head_size)).permute(2, 0, 3, 1, 4)
    return query, key, value


def tokens_first(attended: torch.Tensor) -> torch.Tensor:
    """(batch, heads, tokens, head size) to (batch, tokens, width): a view where tokens come first in memory."""
    return attended.transpose(1, 2).flatten(2)


class SingleAttention(nn.Module):
    """Projections and norm scales of a single block; its output goes into the block's own last linear."""

    def __init__(self, heads: int, head_size: int) -> None:
        super().__init__()
        width = heads * head_size
        self.width, self.head_size = width, head_size
        self.norm_q = nn.RMSNorm(head_size)
        self.norm_k = nn.RMSNorm(head_size)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)

    @property
    def head_norm(self) -> HeadNorm:
        """Norm scales of queries and keys."""
        return HeadNorm(self.norm_q.weight, self.norm_k.weight)


class DoubleAttention(SingleAttention):
    """Those of a double block: the image's, the same again for the text under its own names, and one output each."""

    def __init__(self, heads: int, head_size: int) -> None:
        super().__init__(heads, head_size)
        width = heads * head_size
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_added_q = nn.RMSNorm(head_size)
        self.norm_added_k = nn.RMSNorm(head_size)
        self.add_q_proj = nn.Linear(width, width)
        self.add_k_proj = nn.Linear(width, width)
        self.add_v_proj = nn.Linear(width, width)
        self.to_add_out = nn.Linear(width, width)
        self.projections = LinearGroup((self, "to_q"), (self, "to_k"), (self, "to_v"))
        self.text_projections = LinearGroup((self, "add_q_proj"), (self, "add_k_proj"), (self, "add_v_proj"))
        self.out = LinearGroup((self.to_out, "0"))
        self.text_out = LinearGroup((self, "to_add_out"))

    @property
    def text_head_norm(self) -> HeadNorm:
        """Norm scales of the text's queries and keys."""
        return HeadNorm(self.norm_added_q.weight, self.norm_added_k.weight)
