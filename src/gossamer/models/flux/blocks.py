"""FLUX's two kinds of block. Both work in place on the tokens of a `BlockState`.

    double   text and image have weights of their own and meet in attention only
             x += gate * out(attention(norm(x)));  x += mlp_gate * mlp(norm(x))       either stream
    single   one stream of all tokens; attention and feed-forward part side by side
             x += gate * out([attention(norm(x)), gelu(mlp(norm(x)))])

norm is a LayerNorm without weights, then the modulation of `modulation.py`; mlp is linear, GELU, linear. Queries and
keys are normed a head at a time and rotated by position before they meet.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from gossamer.kernels.pointwise import Rows, TextNorm
from gossamer.kernels.pointwise.backends import Pointwise
from gossamer.layers import LinearGroup
from gossamer.models.flux.attention import DoubleAttention, SingleAttention
from gossamer.models.flux.modulation import (
    AdaLN,
    DoubleVectors,
    SingleVectors,
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
        first = Projection(width, hidden)
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(hidden, width)])
        self.up, self.down = LinearGroup((first, "proj")), LinearGroup((self.net, "2"))

    def forward(self, x: Rows, pointwise: Pointwise) -> torch.Tensor:
        """Rows (batch, tokens, width) to (batch, tokens, width)."""
        if self.up.fuses_gelu:
            _, hidden = self.up.with_gelu(x, 0)
            return self.down(self.down.rows(hidden, pointwise))
        hidden = self.up(x)
        return self.down(pointwise.gelu_rows(hidden, self.down.rows_type(hidden.dtype)))


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

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """The linears of the block as it runs them."""
        attn = self.attn
        streams = (attn.projections, attn.text_projections, attn.out, attn.text_out)
        return (*streams, self.ff.up, self.ff.down, self.ff_context.up, self.ff_context.down)

    def vectors(self, activated: torch.Tensor) -> DoubleVectors:
        """The block's modulation from SiLU of the conditioning (batch, width)."""
        return DoubleVectors(stream_vectors(self.norm1_context, activated), stream_vectors(self.norm1, activated))

    def forward(self, state: BlockState, vectors: DoubleVectors, shared: Shared) -> None:
        """Change the state's tokens in place."""
        attended = self._attention(state, vectors, shared)
        text, image = attended[:, : state.text_tokens], attended[:, state.text_tokens :]
        pointwise, attn = shared.operators.pointwise, self.attn
        _finish(state, "text", attn.text_out(attn.text_out.rows(text, pointwise)), self.ff_context, vectors, pointwise)
        _finish(state, "image", attn.out(attn.out.rows(image, pointwise)), self.ff, vectors, pointwise)

    def _attention(self, state: BlockState, vectors: DoubleVectors, shared: Shared) -> torch.Tensor:
        """Both streams write into one buffer and attend to each other: (batch, tokens, width)."""
        cut, attn, operators = state.text_tokens, self.attn, shared.operators
        qkv, pointwise = state.empty(3 * attn.width), operators.pointwise
        rows_type = attn.text_projections.rows_type(state.dtype)
        attn.text_projections(state.normed("text", vectors.text.attention, rows_type, pointwise), qkv[:, :cut])
        rows_type = attn.projections.rows_type(state.dtype)
        attn.projections(state.normed("image", vectors.image.attention, rows_type, pointwise), qkv[:, cut:])
        text = TextNorm(cut, attn.text_head_norm)
        return operators.attention(qkv, shared.rotation, attn.head_norm, text, pointwise)


def _finish(
    state: BlockState,
    part: Literal["text", "image"],
    attended: torch.Tensor,
    mlp: FeedForward,
    vectors: DoubleVectors,
    pointwise: Pointwise,
) -> None:
    """Add the attention's output, then the feed-forward part, to one stream."""
    by = vectors.text if part == "text" else vectors.image
    state.add(part, by.attention_gate, attended, pointwise)
    normed = state.normed(part, by.mlp, mlp.up.rows_type(state.dtype), pointwise)
    state.add(part, by.mlp_gate, mlp(normed, pointwise), pointwise)


class SingleBlock(nn.Module):
    """A block that treats all tokens alike."""

    def __init__(self, heads: int, head_size: int) -> None:
        super().__init__()
        self.width = heads * head_size
        self.norm = AdaLN(self.width, 3)
        self.attn = SingleAttention(heads, head_size)
        self.proj_mlp = nn.Linear(self.width, MLP_RATIO * self.width)
        self.proj_out = nn.Linear((MLP_RATIO + 1) * self.width, self.width)
        qkv = ((self.attn, name) for name in ("to_q", "to_k", "to_v"))
        self.first, self.last = LinearGroup(*qkv, (self, "proj_mlp")), LinearGroup((self, "proj_out"))

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """The linears of the block as it runs them."""
        return self.first, self.last

    def vectors(self, activated: torch.Tensor) -> SingleVectors:
        """The block's modulation from SiLU of the conditioning (batch, width)."""
        return single_vectors(self.norm, activated)

    def forward(self, state: BlockState, vectors: SingleVectors, shared: Shared) -> None:
        """Change the state's tokens in place."""
        width, operators, pointwise = self.width, shared.operators, shared.operators.pointwise
        x = state.normed("all", vectors.norm, self.first.rows_type(state.dtype), pointwise)
        fused = self.first.fuses_gelu and self.last.fuses_gelu
        if fused:
            qkv, mlp = self.first.with_gelu(x, 3 * width)
        else:
            buffer = self.first(x, state.empty((3 + MLP_RATIO) * width))
            qkv, mlp = buffer[..., : 3 * width], buffer[..., 3 * width :]
        attended = operators.attention(qkv, shared.rotation, self.attn.head_norm, None, pointwise)
        if fused:
            y = self.last.of_parts(attended, mlp)
        else:
            y = self.last(pointwise.gelu_concat(attended, mlp, self.last.rows_type(state.dtype)))
        state.add("all", vectors.gate, y, pointwise)
