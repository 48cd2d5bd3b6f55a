"""Attention of FLUX's blocks: the linears and norm scales under their canonical names.

Queries, keys and values of all tokens stand in one buffer (batch, tokens, 3 * width), text tokens first, so that the
two streams of a double block need no concatenation.
"""

from __future__ import annotations

from torch import nn

from gossamer.kernels.pointwise import HeadNorm
from gossamer.layers import LinearGroup


class SingleAttention(nn.Module):
    """Projections and norm scales of a single block; its output goes into the block's own last linear."""

    def __init__(self, heads: int, head_size: int) -> None:
        super().__init__()
        width = heads * head_size
        self.width = width
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
