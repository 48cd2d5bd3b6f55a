"""FLUX's two kinds of block. Both work in place on the tokens of a `BlockState`.

    double   text and image have weights of their own and meet in attention only
             x += gate * out(attention(norm(x)));  x += mlp_gate * mlp(norm(x))       either stream
    single   one stream of all tokens; attention and feed-forward part side by side
             x += gate * out([attention(norm(x)), gelu(mlp(norm(x)))])

norm is a LayerNorm without weights, then the modulation of `modulation.py`; mlp is linear, GELU, linear. Queries and
keys are normed a head at a time and rotated by position before they meet.
"""

from __future__ import annotations

import torch
from torch import nn

from gossamer.kernels.pointwise import TextNorm
from gossamer.kernels.pointwise.backends import Pointwise
from gossamer.models.flux.attention import DoubleAttention, SingleAttention, heads_first, tokens_first
from gossamer.models.flux.modulation import (
    AdaLN,
    DoubleVectors,
    SingleVectors,
    StreamVectors,
    single_vectors,
    stream_vectors,
)
from gossamer.models.flux.seam import BlockState, Shared
from gossamer.models.flux_spec import MLP_RATIO


class Projection(nn.Module):
    """Holds the first linear of a feed-forward part under its canonical name."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_features, out_features)


class FeedForward(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # the canonical names are net.0.proj and net.2: diffusers has a dropout of probability 0 between them
        hidden = MLP_RATIO * width
        self.net = nn.ModuleList([Projection(width, hidden), nn.Identity(), nn.Linear(hidden, width)])

    def forward(self, x: torch.Tensor, pointwise: Pointwise) -> torch.Tensor:
        """(batch, tokens, width) to the same."""
        hidden: torch.Tensor = self.net[0].proj(x)  # type: ignore[operator]
        out: torch.Tensor = self.net[2](pointwise.gelu_rows(hidden, x.dtype).values)
        return out


class DoubleBlock(nn.Module):
    """A block whose streams, text and image, have weights of their own."""

    def __init__(self, heads: int, head_size: int) -> None:
        super().__init__()
        width = heads * head_size
        self.norm1 = AdaLN(width, 6)
        self.norm1_context = AdaLN(width, 6)
        self.attn = DoubleAttention(heads, head_size)
        self.ff = FeedForward(width)
        self.ff_context = FeedForward(width)

    def vectors(self, activated: torch.Tensor) -> DoubleVectors:
        """The block's modulation from SiLU of the conditioning (batch, width)."""
        return DoubleVectors(stream_vectors(self.norm1_context, activated), stream_vectors(self.norm1, activated))

    def forward(self, state: BlockState, vectors: DoubleVectors, shared: Shared) -> None:
        """Change the state's tokens in place."""
        attended = self._attention(state, vectors, shared)
        text, image = attended[:, : state.text_tokens], attended[:, state.text_tokens :]
        pointwise = shared.operators.pointwise
        _finish(state.text, self.attn.to_add_out(text), self.ff_context, vectors.text, pointwise)
        _finish(state.image, self.attn.to_out[0](image), self.ff, vectors.image, pointwise)

    def _attention(self, state: BlockState, vectors: DoubleVectors, shared: Shared) -> torch.Tensor:
        """Both streams write into one buffer and attend to each other: (batch, tokens, width)."""
        tokens, cut, attn, operators = state.tokens, state.text_tokens, self.attn, shared.operators
        qkv = tokens.new_empty(*tokens.shape[:2], 3 * tokens.shape[2])
        text = operators.pointwise.norm_modulate(state.text, vectors.text.attention, tokens.dtype)
        operators.apply_together(attn.text_projections, text.values, qkv[:, :cut])
        image = operators.pointwise.norm_modulate(state.image, vectors.image.attention, tokens.dtype)
        operators.apply_together(attn.projections, image.values, qkv[:, cut:])
        text_norm = TextNorm(cut, attn.text_head_norm)
        operators.pointwise.qk_norm_rope_(qkv, shared.rotation, attn.head_norm, text_norm)
        return tokens_first(operators.attend(*heads_first(qkv, attn.head_size)))


def _finish(
    x: torch.Tensor, attended: torch.Tensor, mlp: FeedForward, vectors: StreamVectors, pointwise: Pointwise
) -> None:
    """Add the attention's output, then the feed-forward part, to the tokens of one stream, in place."""
    rows = pointwise.residual_gate_norm_modulate_(x, vectors.attention_gate, attended, vectors.mlp, x.dtype)
    pointwise.residual_gate_(x, vectors.mlp_gate, mlp(rows.values, pointwise))


class SingleBlock(nn.Module):
    """A block that treats all tokens alike."""

    def __init__(self, heads: int, head_size: int) -> None:
        super().__init__()
        self.width = heads * head_size
        self.norm = AdaLN(self.width, 3)
        self.attn = SingleAttention(heads, head_size)
        self.proj_mlp = nn.Linear(self.width, MLP_RATIO * self.width)
        self.proj_out = nn.Linear((MLP_RATIO + 1) * self.width, self.width)

    def vectors(self, activated: torch.Tensor) -> SingleVectors:
        """The block's modulation from SiLU of the conditioning (batch, width)."""
        return single_vectors(self.norm, activated)

    def forward(self, state: BlockState, vectors: SingleVectors, shared: Shared) -> None:
        """Change the state's tokens in place."""
        tokens, width, operators = state.tokens, self.width, shared.operators
        x = operators.pointwise.norm_modulate(tokens, vectors.norm, tokens.dtype)
        buffer = tokens.new_empty(*tokens.shape[:2], (3 + MLP_RATIO) * width)
        operators.apply_together((*self.attn.projections, self.proj_mlp), x.values, buffer)
        qkv, mlp = buffer[..., : 3 * width], buffer[..., 3 * width :]
        operators.pointwise.qk_norm_rope_(qkv, shared.rotation, self.attn.head_norm, None)
        attended = tokens_first(operators.attend(*heads_first(qkv, self.attn.head_size)))
        rows = operators.pointwise.gelu_concat(attended, mlp, tokens.dtype)
        operators.pointwise.residual_gate_(tokens, vectors.gate, self.proj_out(rows.values))
