"""Norm and rotation of queries and keys, and the attention in eight bits behind them, on Hopper: the operator.

    y = attention(rotated(norm(q)), rotated(norm(k)), v)        q, k, v, y (batch, tokens, heads * 128)

`attention_reference.attend_normed_in_torch` is the same in torch. Beside `pointwise.rotary` and then attention, q and k
are read once and written once, as codes; their values stay in float32 up to there, and the buffer as it was.
"""

from __future__ import annotations

import torch

from gossamer.kernels.attention import heads_first
from gossamer.kernels.attention_codes import HEAD
from gossamer.kernels.attention_codes_kernel import Turn, require_attendable, require_turn
from gossamer.kernels.attention_eight_bit import launch_attention
from gossamer.kernels.operators import through_operator
from gossamer.kernels.pointwise.launch import require_shape
from gossamer.kernels.pointwise.modulate import EPS
from gossamer.kernels.pointwise.rotary import HeadNorm, Rotation, TextNorm, head_count


def launch_attend_normed(qkv: torch.Tensor, turn: Turn) -> torch.Tensor:
    """Run both kernels: (batch, tokens, width)."""
    return launch_attention(*heads_first(qkv, HEAD), turn).flatten(2)


@torch.library.custom_op("gossamer::attend_normed", mutates_args=())
def attend_normed_op(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    text_query: torch.Tensor | None,
    text_key: torch.Tensor | None,
    text_tokens: int,
    eps: float,
) -> torch.Tensor:
    """Opaque to torch.compile."""
    return launch_attend_normed(qkv, Turn(cos, sin, query, key, text_query, text_key, text_tokens, eps))


@attend_normed_op.register_fake
def _(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    text_query: torch.Tensor | None,
    text_key: torch.Tensor | None,
    text_tokens: int,
    eps: float,
) -> torch.Tensor:
    batch, tokens, width = qkv.shape
    return qkv.new_empty(batch, tokens, width // 3)


def turn_of(rotation: Rotation, norm: HeadNorm, text: TextNorm | None, eps: float = EPS) -> Turn:
    """What norms and rotates, as the kernel takes it."""
    if text is None:
        return Turn(rotation.cos, rotation.sin, norm.query, norm.key, eps=eps)
    return Turn(rotation.cos, rotation.sin, norm.query, norm.key, text.norm.query, text.norm.key, text.tokens, eps)


def require_heads(qkv: torch.Tensor, rotation: Rotation) -> None:
    """Refuse a buffer and a rotation of heads that the kernels cannot take."""
    head_count(qkv, rotation)
    require_shape((qkv.shape[1], HEAD // 2), cos=rotation.cos)


def attend_normed(
    qkv: torch.Tensor, rotation: Rotation, norm: HeadNorm, text: TextNorm | None = None, eps: float = EPS
) -> torch.Tensor:
    """Queries, keys and values (batch, tokens, 3 * width) in bf16, heads of 128, to (batch, tokens, width)."""
    require_heads(qkv, rotation)
    turn = turn_of(rotation, norm, text, eps)
    if through_operator(qkv):
        require_attendable(*heads_first(qkv, HEAD))
        require_turn(turn, qkv.shape[1])
        result: torch.Tensor = attend_normed_op(qkv, *turn)
        return result
    return launch_attend_normed(qkv, turn)
