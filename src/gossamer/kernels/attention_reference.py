"""What `attention_fp8` computes, in torch: the specification, block by block as the kernel goes.

q k^T is exact products of what is stored, summed in float32; P and v are rounded to e4m3 and summed in float32. The
sum that divides is that of P before rounding: it is at hand, and the errors of single P cancel in a sum of thousands.
"""

from __future__ import annotations

import math

import torch

from gossamer.kernels.attention_values import BLOCK, Values, key_at_place, row_of_channel, values_in_torch

P_SHIFT = 8  # P is at most 2^8: then e4m3 keeps three bits down to 2^-14 of the largest, and nothing overflows


def attend_in_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """(batch, heads, tokens, 128) each, in float32; blocks of keys from the last to the first."""
    values = values_in_torch(v)
    scale = math.log2(math.e) / math.sqrt(q.shape[-1])
    q, k, tokens = q.float(), k.float(), k.shape[2]
    top = torch.full((*q.shape[:3], 1), -math.inf, device=q.device)
    total, result = torch.zeros_like(top), torch.zeros_like(q)
    for index in reversed(range(values.exponents.shape[1])):
        keys = slice(index * BLOCK, min((index + 1) * BLOCK, tokens))
        exponent = values.exponents[:, index].reshape(*q.shape[:2], 1, 1)
        scores = q @ k[:, :, keys].transpose(-1, -2) * scale + exponent
        before, top = top, torch.maximum(top, scores.amax(-1, keepdim=True))
        shrunk = torch.exp2(before - top)
        p = torch.exp2(scores + P_SHIFT - top)
        total = total * shrunk + p.sum(-1, keepdim=True) * torch.exp2(-exponent)
        rounded = p.to(torch.float8_e4m3fn).float()
        v8 = decoded(values, index).reshape(*q.shape[:2], BLOCK, -1)[:, :, : p.shape[-1]]
        result = result * shrunk + rounded @ v8
    return result / total


def decoded(values: Values, index: int) -> torch.Tensor:
    """The codes of a block as numbers, keys and channels in their own order: (batch * heads, 128, 128)."""
    heads = values.exponents.shape[0]
    codes = values.codes.float().reshape(heads, -1, values.codes.shape[1])
    codes = codes[:, :, index * BLOCK : (index + 1) * BLOCK]
    device = codes.device
    codes = codes[:, row_of_channel(torch.arange(codes.shape[1], device=device))]
    keys = torch.empty_like(codes)
    keys[:, :, key_at_place(torch.arange(BLOCK, device=device))] = codes
    return keys.transpose(1, 2)
