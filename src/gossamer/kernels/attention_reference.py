"""What `attention_eight_bit` computes, in torch: the specification, block by block as the kernel goes.

q and k are rounded to int8 and their products summed exactly; P and v are rounded to e4m3 and summed in float32. The
sum that divides is that of P before rounding: it is at hand, and the errors of single P cancel in a sum of thousands.
"""

from __future__ import annotations

import math

import torch

from gossamer.kernels.attention_codes import BLOCK, HEAD, Codes, codes_in_torch, key_at_place, row_of_channel
from gossamer.kernels.pointwise.modulate import EPS
from gossamer.kernels.pointwise.rotary import HeadNorm, Rotation, TextNorm, qk_norm_rope

P_SHIFT = 8  # P is at most 2^8: then e4m3 keeps three bits down to 2^-14 of the largest, and nothing overflows


def attend_in_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """(batch, heads, tokens, 128) each, the result in float32."""
    return attend_codes(codes_in_torch(q, k, v))


def attend_normed_in_torch(
    qkv: torch.Tensor, rotation: Rotation, norm: HeadNorm, text: TextNorm | None = None, eps: float = EPS
) -> torch.Tensor:
    """The same of raw queries and keys in a buffer (batch, tokens, 3 * width): (batch, tokens, width)."""
    return attend_codes(normed_codes_in_torch(qkv, rotation, norm, text, eps)).transpose(1, 2).flatten(2)


def normed_codes_in_torch(
    qkv: torch.Tensor, rotation: Rotation, norm: HeadNorm, text: TextNorm | None = None, eps: float = EPS
) -> Codes:
    """Codes of queries and keys normed and rotated, which stay in float32 until they are rounded to int8."""
    q, k = qk_norm_rope(qkv, rotation, norm, text, eps)
    v = qkv.unflatten(-1, (3, -1, HEAD))[:, :, 2]
    return codes_in_torch(*(x.transpose(1, 2) for x in (q, k, v)))


def attend_codes(codes: Codes) -> torch.Tensor:
    """(batch, heads, tokens, 128) in float32; blocks of keys from the last to the first."""
    q8, k8 = codes.q8.float(), codes.k8.float()  # sums below 2^24 are exact in float32, in any order
    batch, heads, tokens, _ = q8.shape
    top = torch.full((batch, heads, tokens, 1), -math.inf, device=q8.device)
    total, result = torch.zeros_like(top), torch.zeros_like(q8)
    for index in reversed(range(codes.exponents.shape[1])):
        keys = slice(index * BLOCK, min((index + 1) * BLOCK, tokens))
        exponent, k_scale = (x[:, index].reshape(batch, heads, 1, 1) for x in (codes.exponents, codes.k_scales))
        scores = q8 @ k8[:, :, keys].transpose(-1, -2) * (codes.q_scales[..., None] * k_scale) + exponent
        before, top = top, torch.maximum(top, scores.amax(-1, keepdim=True))
        shrunk = torch.exp2(before - top)
        p = torch.exp2(scores + P_SHIFT - top)
        total = total * shrunk + p.sum(-1, keepdim=True) * torch.exp2(-exponent)
        rounded = p.to(torch.float8_e4m3fn).float()
        v8 = decoded(codes.v8, index).reshape(batch, heads, BLOCK, -1)[:, :, : p.shape[-1]]
        result = result * shrunk + rounded @ v8
    return result / total


def decoded(v8: torch.Tensor, index: int) -> torch.Tensor:
    """A block of v8 as numbers, keys and channels in their own order: (batch * heads, 128, 128)."""
    codes = v8.float().reshape(-1, HEAD, v8.shape[1])[:, :, index * BLOCK : (index + 1) * BLOCK]
    codes = codes[:, row_of_channel(torch.arange(HEAD, device=v8.device))]
    keys = torch.empty_like(codes)
    keys[:, :, key_at_place(torch.arange(BLOCK, device=v8.device))] = codes
    return keys.transpose(1, 2)
