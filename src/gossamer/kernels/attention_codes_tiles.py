"""Steps of `attention_codes_kernel` on tiles (tokens, channels) of float32 that stay in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from gossamer.kernels.pointwise.triton_rotary import split_pairs

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
    """Tokens of one head (rows, HEAD) as they are stored, zeros behind the last; `head` counts through the batch."""
    begin = x + (head // heads).to(tl.int64) * batch_stride + (head % heads).to(tl.int64) * head_stride
    pointer = begin + token.to(tl.int64)[:, None] * token_stride + tl.arange(0, HEAD)[None, :]
    return tl.load(pointer, mask=(token < tokens)[:, None], other=0.0)


@triton.jit
def load_rotation(
    x: tl.tensor, token: tl.tensor, tokens: tl.tensor, stride: tl.tensor, HEAD: tl.constexpr
) -> tl.tensor:
    """cos or sin of every token's pairs (tokens, HEAD / 2), in the layout that `split_pairs` leaves."""
    pointer = x + token.to(tl.int64)[:, None] * stride + tl.arange(0, HEAD // 2)[None, :]
    return tl.load(pointer, mask=(token < tokens)[:, None], other=0.0).to(tl.float32)


@triton.jit
def load_weights(
    weight: tl.tensor, text_weight: tl.tensor, is_text: tl.tensor, ROWS: tl.constexpr, HEAD: tl.constexpr
) -> tl.tuple:
    """Norm weights of every token's even and odd channels, each (ROWS, HEAD / 2), from the cache."""
    offsets = tl.broadcast_to(tl.arange(0, HEAD)[None, :], (ROWS, HEAD))
    if text_weight is not None:
        weight = tl.where(is_text, text_weight, weight)[:, None]
    return split_pairs(tl.load(weight + offsets).to(tl.float32), ROWS, HEAD)


@triton.jit
def norm_rotate(
    tile: tl.tensor,
    weight: tl.tuple,
    cos: tl.tensor,
    sin: tl.tensor,
    eps: tl.tensor,
    ROWS: tl.constexpr,
    HEAD: tl.constexpr,
) -> tl.tensor:
    """Norm and rotate a tile (ROWS, HEAD); weight is (even, odd)."""
    factor = tl.rsqrt(tl.sum(tile * tile, 1) / HEAD + eps)[:, None]
    even, odd = split_pairs(tile, ROWS, HEAD)
    even = even * factor * weight[0]
    odd = odd * factor * weight[1]
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), (ROWS, HEAD))
