"""Values of an attention in e4m3, in Triton; `attention_values` is the specification. One pass, one program a block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gossamer.kernels.attention_values import BLOCK, LARGEST, SMALLEST, Values
from gossamer.kernels.pointwise.launch import Launcher, Plan

WARPS = 8


@triton.jit(do_not_specialize=("tokens", "heads", "blocks"))
def values_kernel(
    v: tl.tensor,  # (batch, heads, tokens, HEAD), channels side by side
    codes: tl.tensor,  # (batch * heads * HEAD, blocks * BLOCK) contiguous
    exponents: tl.tensor,  # (batch * heads, blocks) contiguous
    tokens: tl.tensor,
    heads: tl.tensor,
    batch_stride: tl.tensor,
    head_stride: tl.tensor,
    token_stride: tl.tensor,
    blocks: tl.tensor,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
) -> None:
    """One block of one head: v (tokens, 128) to codes (128, BLOCK) and its exponent."""
    block, head = tl.program_id(0), tl.program_id(1)
    place, channel = tl.arange(0, BLOCK), tl.arange(0, HEAD)
    key = block * BLOCK + ((place & -16) | ((place >> 1 & 1) << 3) | ((place >> 2 & 3) << 1) | (place & 1))
    begin = v + (head // heads).to(tl.int64) * batch_stride + (head % heads).to(tl.int64) * head_stride
    pointer = begin + key.to(tl.int64)[:, None] * token_stride + channel[None, :]
    tile = tl.load(pointer, mask=(key < tokens)[:, None], other=0.0).to(tl.float32)
    largest = tl.max(tl.max(tl.abs(tile), 1), 0)
    bits = largest.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 135 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)  # 448 is 1.75 * 2^8
    exponent = tl.minimum(tl.maximum(exponent, SMALLEST), LARGEST)
    tl.store(exponents + head * blocks + block, exponent.to(tl.float32))
    tile = tile * ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    row = (channel & -32) | ((channel >> 1 & 3) << 3) | ((channel >> 3 & 3) << 1) | (channel & 1)
    start = codes + (head.to(tl.int64) * HEAD + row.to(tl.int64))[:, None] * (blocks * BLOCK) + block * BLOCK
    tl.store(start + place[None, :], tl.trans(tile.to(codes.dtype.element_ty)))


def plan_values(v: torch.Tensor) -> Plan:
    """How the kernel is launched."""
    batch, heads, tokens, head = v.shape
    blocks = -(-tokens // BLOCK)
    numbers = (tokens, heads, *v.stride()[:3], blocks, head, BLOCK, SMALLEST, LARGEST)
    return Plan((blocks, batch * heads, 1), numbers, WARPS)


values_launch = Launcher(values_kernel, plan_values)


def empty_values(v: torch.Tensor) -> Values:
    """Memory for what the kernel writes."""
    batch, heads, tokens, head = v.shape
    blocks = -(-tokens // BLOCK)
    codes = torch.empty((batch * heads * head, blocks * BLOCK), dtype=torch.float8_e4m3fn, device=v.device)
    return Values(codes, torch.empty((batch * heads, blocks), dtype=torch.float32, device=v.device))


def encode_values(v: torch.Tensor) -> Values:
    """`values_in_torch` on a GPU with e4m3: v (batch, heads, tokens, 128), any view with unit stride along channels."""
    values = empty_values(v)
    values_launch(v)(v, *values)
    return values
