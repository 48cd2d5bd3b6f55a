"""Operands of an attention in eight bits, in Triton; `attention_codes` is the specification. One pass, a program for
128 tokens of one head of q, k or v."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gossamer.kernels.attention_codes import BLOCK, LARGEST, LEAST, LOG2_SCALE, SMALLEST, STEPS, Codes
from gossamer.kernels.pointwise.launch import Launcher, Plan

WARPS = 8
# 1.5 * 2^23: added to a float32 below 2^22, it leaves the rounded number in the last bits
ROUND = tl.constexpr(12582912.0)


@triton.jit
def largest_of_rows(tile: tl.tensor, LEAST: tl.constexpr) -> tl.tensor:
    """Bits of the largest magnitudes of a tile (tokens, HEAD), at least LEAST: ordered as the numbers are, NaN last."""
    bits = tl.max(tile.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    return tl.maximum(bits, tl.full((), LEAST, tl.float32).to(tl.int32, bitcast=True))


@triton.jit
def store_rounded(
    codes: tl.tensor, tile: tl.tensor, largest: tl.tensor, offsets: tl.tensor, mask: tl.tensor, STEPS: tl.constexpr
) -> None:
    """Write a tile in steps of a 127th of `largest` (tokens,)."""
    inverse = tl.div_rn(tl.zeros_like(largest) + STEPS, largest)
    rounded = tl.fma(tile, tl.broadcast_to(inverse[:, None], tile.shape), tl.zeros_like(tile) + ROUND)
    tl.store(codes + offsets, rounded.to(tl.int32, bitcast=True).to(tl.int8), mask=mask)


@triton.jit
def store_values(
    codes: tl.tensor,
    exponents: tl.tensor,
    tile: tl.tensor,
    head: tl.tensor,
    block: tl.tensor,
    blocks: tl.tensor,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
) -> None:
    """Write v (BLOCK, HEAD), its keys in their order already, transposed and with one exponent."""
    place, channel = tl.arange(0, BLOCK), tl.arange(0, HEAD)
    largest = tl.max(tl.max(tl.abs(tile), 1), 0)
    bits = largest.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 135 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)  # 448 is 1.75 * 2^8
    exponent = tl.minimum(tl.maximum(exponent, SMALLEST), LARGEST)
    tl.store(exponents + head * blocks + block, exponent.to(tl.float32))
    tile = tile * ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    row = (channel & -32) | ((channel >> 1 & 3) << 3) | ((channel >> 3 & 3) << 1) | (channel & 1)
    start = codes + (head.to(tl.int64) * HEAD + row.to(tl.int64))[:, None] * (blocks * BLOCK) + block * BLOCK
    tl.store(start + place[None, :], tl.trans(tile.to(codes.dtype.element_ty)))


@triton.jit
def load_tokens(
    x: tl.tensor,
    token: tl.tensor,
    head: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    batch_stride: tl.tensor,
    head_stride: tl.tensor,
    token_stride: tl.tensor,
    HEAD: tl.constexpr,
) -> tl.tensor:
    """Tokens of one head in float32, zeros behind the last; `head` counts through the batch."""
    begin = x + (head // heads).to(tl.int64) * batch_stride + (head % heads).to(tl.int64) * head_stride
    pointer = begin + token.to(tl.int64)[:, None] * token_stride + tl.arange(0, HEAD)[None, :]
    return tl.load(pointer, mask=(token < tokens)[:, None], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=("tokens", "heads", "blocks"))
def codes_kernel(
    q: tl.tensor,  # (batch, heads, tokens, HEAD), channels side by side, as k and v
    k: tl.tensor,
    v: tl.tensor,
    q8: tl.tensor,  # (batch, heads, tokens, HEAD) contiguous, as k8
    k8: tl.tensor,
    v8: tl.tensor,  # (batch * heads * HEAD, blocks * BLOCK) contiguous
    q_scales: tl.tensor,  # (batch, heads, tokens) contiguous
    k_scales: tl.tensor,  # (batch * heads, blocks) contiguous, as exponents
    exponents: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    blocks: tl.tensor,
    q_batch: tl.tensor,  # strides
    q_head: tl.tensor,
    q_token: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_token: tl.tensor,
    v_batch: tl.tensor,
    v_head: tl.tensor,
    v_token: tl.tensor,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    LEAST: tl.constexpr,
    STEPS: tl.constexpr,
    LOG2_SCALE: tl.constexpr,
) -> None:
    """One block of one head of q, k or v: the third number of the program says of which."""
    block, head, which = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = tl.arange(0, BLOCK)
    token = block * BLOCK + place
    offsets = (head.to(tl.int64) * tokens + token.to(tl.int64))[:, None] * HEAD + tl.arange(0, HEAD)[None, :]
    mask = (token < tokens)[:, None]
    if which == 0:
        tile = load_tokens(q, token, head, tokens, heads, q_batch, q_head, q_token, HEAD)
        largest = largest_of_rows(tile, LEAST).to(tl.float32, bitcast=True)
        tl.store(q_scales + head.to(tl.int64) * tokens + token, largest * (LOG2_SCALE / STEPS), mask=token < tokens)
        store_rounded(q8, tile, largest, offsets, mask, STEPS)
    elif which == 1:
        tile = load_tokens(k, token, head, tokens, heads, k_batch, k_head, k_token, HEAD)
        largest = tl.max(largest_of_rows(tile, LEAST), 0).to(tl.float32, bitcast=True)
        tl.store(k_scales + head * blocks + block, largest * (1 / STEPS))
        store_rounded(k8, tile, tl.zeros((BLOCK,), tl.float32) + largest, offsets, mask, STEPS)
    else:
        key = block * BLOCK + ((place & -16) | ((place >> 1 & 1) << 3) | ((place >> 2 & 3) << 1) | (place & 1))
        tile = load_tokens(v, key, head, tokens, heads, v_batch, v_head, v_token, HEAD)
        store_values(v8, exponents, tile, head, block, blocks, HEAD, BLOCK, SMALLEST, LARGEST)


def plan_codes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Plan:
    """How the kernel is launched."""
    batch, heads, tokens, head = v.shape
    blocks = -(-tokens // BLOCK)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    numbers = (tokens, heads, blocks, *strides, head, BLOCK, SMALLEST, LARGEST, LEAST, STEPS, LOG2_SCALE)
    return Plan((blocks, batch * heads, 3), numbers, WARPS)


codes_launch = Launcher(codes_kernel, plan_codes)


def empty_codes(q: torch.Tensor) -> Codes:
    """Memory for what the kernel writes, of q (batch, heads, tokens, 128)."""
    batch, heads, tokens, head = q.shape
    blocks = -(-tokens // BLOCK)

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    return Codes(
        empty(batch, heads, tokens, head, dtype=torch.int8),
        empty(batch, heads, tokens, head, dtype=torch.int8),
        empty(batch * heads * head, blocks * BLOCK, dtype=torch.float8_e4m3fn),
        empty(batch, heads, tokens, dtype=torch.float32),
        empty(batch * heads, blocks, dtype=torch.float32),
        empty(batch * heads, blocks, dtype=torch.float32),
    )


def encode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Codes:
    """`codes_in_torch` on a GPU: (batch, heads, tokens, 128) each, any views with unit stride along channels."""
    codes = empty_codes(q)
    codes_launch(q, k, v)(q, k, v, *codes)
    return codes
