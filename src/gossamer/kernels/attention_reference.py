"""What `attention_eight_bit` computes, in torch: the specification, block by block as the kernel goes.

q and k are rounded to int8 and their products summed exactly; P and v are rounded to e4m3 and summed in float32. The
sum that divides is that of P before rounding: it is at hand, and the errors of single P cancel in a sum of thousands.
"""

from __future__ import annotations

import math

import torch

from gossamer.kernels.attention_codes import BLOCK, HEAD, codes_in_torch, key_at_place, row_of_channel

P_SHIFT = 8  # P is at most 2^8: then e4m3 keeps three bits down to 2^-14 of the largest, and nothing overflows


def attend_in_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """(batch, heads, tokens, 128) each, in float32; blocks of keys from the last to the first."""
    codes, tokens = codes_in_torch(q, k, v), k.shape[2]
    q8, k8 = codes.q8.float(), codes.k8.float()  # sums below 2^24 are exact in float32, in any order
    top = torch.full((*q.shape[:3], 1), -math.inf, device=q.device)
    total, result = torch.zeros_like(top), torch.zeros_like(q8)
    for index in reversed(range(codes.exponents.shape[1])):
        keys = slice(index * BLOCK, min((index + 1) * BLOCK, tokens))
        exponent, k_scale = (x[:, index].reshape(*q.shape[:2], 1, 1) for x in (codes.exponents, codes.k_scales))
        scores = q8 @ k8[:, :, keys].transpose(-1, -2) * (codes.q_scales[..., None] * k_scale) + exponent
        before, top = top, torch.maximum(top, scores.amax(-1, keepdim=True))
        shrunk = torch.exp2(before - top)
        p = torch.exp2(scores + P_SHIFT - top)
        total = total * shrunk + p.sum(-1, keepdim=True) * torch.exp2(-exponent)
        rounded = p.to(torch.float8_e4m3fn).float()
        v8 = decoded(codes.v8, index).reshape(*q.shape[:2], BLOCK, -1)[:, :, : p.shape[-1]]
        result = result * shrunk + rounded @ v8
    return result / total


def decoded(v8: torch.Tensor, index: int) -> torch.Tensor:
    """A block of v8 as numbers, keys and channels in their own order: (batch * heads, 128, 128)."""
    codes = v8.float().reshape(-1, HEAD, v8.shape[1])[:, :, index * BLOCK : (index + 1) * BLOCK]
    codes = codes[:, row_of_channel(torch.arange(HEAD, device=v8.device))]
    keys = torch.empty_like(codes)
    keys[:, :, key_at_place(torch.arange(BLOCK, device=v8.device))] = codes
    return keys.transpose(1, 2)
