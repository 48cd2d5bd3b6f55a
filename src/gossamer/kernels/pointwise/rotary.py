"""RMSNorm of queries and keys, then rotary embedding, in pure torch: the specification of the fused kernel.

    q'       = q * rsqrt(mean(q^2) + eps) * weight                       a head at a time
    q"[2i]   = q'[2i]   * cos[t, i] - q'[2i+1] * sin[t, i]               pairs are neighbours
    q"[2i+1] = q'[2i+1] * cos[t, i] + q'[2i]   * sin[t, i]

Shapes: qkv (batch, tokens, 3 * heads * dim): queries, keys, values, each head by head; a view into a wider buffer will
do. Norm weights (dim,). cos, sin (tokens, dim / 2), float32. Values stay as they are. Float32 arithmetic, one rounding.

The first `text_tokens` tokens of a double block are text and have norm weights of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from gossamer.errors import UnsupportedShapeError
from gossamer.kernels.pointwise.modulate import EPS


@dataclass(frozen=True)
class HeadNorm:
    """RMSNorm weights (dim,) of queries and of keys."""

    query: torch.Tensor
    key: torch.Tensor


@dataclass(frozen=True)
class Rotation:
    """cos and sin (tokens, dim / 2) in float32, one number for both channels of a pair."""

    cos: torch.Tensor
    sin: torch.Tensor

    @property
    def dim(self) -> int:
        """Channels of a head."""
        return 2 * self.cos.shape[1]


@dataclass(frozen=True)
class TextNorm:
    """The weights that the first `tokens` tokens use instead."""

    tokens: int
    norm: HeadNorm


def head_count(qkv: torch.Tensor, rotation: Rotation) -> int:
    """Heads in a qkv buffer, from its width and the rotation's; refuses shapes that do not fit together."""
    heads, rest = divmod(qkv.shape[-1], 3 * rotation.dim)
    if rest or qkv.shape[1] != len(rotation.cos) or rotation.sin.shape != rotation.cos.shape:
        raise UnsupportedShapeError(
            f"qkv of shape {tuple(qkv.shape)} cannot be rotated by cos of shape {tuple(rotation.cos.shape)}",
            "cos and sin must be (tokens, dim / 2), a number for each pair of channels, and qkv 3 * heads * dim wide",
            "compute cos and sin from the ids of exactly these tokens",
        )
    return heads


def rotate(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """x (batch, tokens, heads, dim) in float32, its neighbouring pairs turned."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation.cos[:, None], rotation.sin[:, None]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps)


def qk_norm_rope(
    qkv: torch.Tensor, rotation: Rotation, norm: HeadNorm, text: TextNorm | None = None, eps: float = EPS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys (batch, tokens, heads, dim), normed and rotated, in float32."""
    parts = qkv.unflatten(-1, (3, head_count(qkv, rotation), -1))
    cut = text.tokens if text is not None else 0

    def turned(part: int, weight: str) -> torch.Tensor:
        x = parts[:, :, part]
        normed = _norm(x[:, cut:], getattr(norm, weight), eps)
        if text is not None:
            normed = torch.cat((_norm(x[:, :cut], getattr(text.norm, weight), eps), normed), dim=1)
        return rotate(normed, rotation)

    return turned(0, "query"), turned(1, "key")


def qk_norm_rope_(
    qkv: torch.Tensor, rotation: Rotation, norm: HeadNorm, text: TextNorm | None = None, eps: float = EPS
) -> torch.Tensor:
    """Norm and rotate queries and keys in place; returns qkv."""
    for part, turned in enumerate(qk_norm_rope(qkv, rotation, norm, text, eps)):
        qkv.unflatten(-1, (3, -1, turned.shape[-1]))[:, :, part].copy_(turned)
    return qkv
