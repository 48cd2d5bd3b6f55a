"""RMSNorm of queries and keys and rotary embedding in Triton, in place; `rotary.py` is the specification.

One program a token. Every head of the token's queries and keys is loaded, in contiguous 16-byte pieces, before the
first is written: loads after a store to the same buffer could not be moved in front of it. The pairs are split and
joined in registers, since neighbours lie in one thread.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from gossamer.kernels.operators import through_operator
from gossamer.kernels.pointwise.launch import (
    LOAD_VALUES,
    Launcher,
    Plan,
    head_tiles,
    require_shape,
    require_unit_stride,
    warps,
)
from gossamer.kernels.pointwise.modulate import EPS
from gossamer.kernels.pointwise.rotary import HeadNorm, Rotation, TextNorm, head_count
from gossamer.kernels.pointwise.triton_tiles import add, appended, row_start


@triton.jit
def head_offsets(HEADS: tl.constexpr, DIM: tl.constexpr) -> tl.tensor:
    """Offsets (HEADS, DIM) of neighbouring heads."""
    return tl.arange(0, HEADS)[:, None] * DIM + tl.arange(0, DIM)[None, :]


@triton.jit
def load_heads(start: tl.tensor, HEADS: tl.constexpr, DIM: tl.constexpr, COUNT: tl.constexpr) -> tl.tuple:
    """All heads of a token as COUNT tiles (HEADS, DIM) of float32."""
    found: tl.tuple = ()
    for tile in tl.static_range(COUNT):
        found = appended(found, tl.load(start + tile * (HEADS * DIM) + head_offsets(HEADS, DIM)).to(tl.float32))
    return found


@triton.jit
def split_pairs(tile: tl.tensor, HEADS: tl.constexpr, DIM: tl.constexpr) -> tl.tuple:
    """Even and odd values, each (HEADS, DIM / 2), of a tile (HEADS, DIM)."""
    even, odd = tl.split(tl.reshape(tile, (HEADS, DIM // 2, 2)))
    return even, odd


@triton.jit
def load_pairs(start: tl.tensor, HEADS: tl.constexpr, DIM: tl.constexpr) -> tl.tuple:
    """Even and odd values of a vector (DIM,), for each of HEADS heads.

    Loaded once a head, from the cache, in the layout of the heads: moving one copy between threads takes barriers.
    """
    offsets = tl.broadcast_to(tl.arange(0, DIM)[None, :], (HEADS, DIM))
    return split_pairs(tl.load(start + offsets).to(tl.float32), HEADS, DIM)


@triton.jit
def load_rotation(start: tl.tensor, HEADS: tl.constexpr, DIM: tl.constexpr) -> tl.tensor:
    """cos or sin of a token's pairs, for each of HEADS heads: (HEADS, DIM / 2).

    4 a thread, as many as `split_pairs` leaves it of 16-bit values; of others, pairs move between threads.
    """
    offsets = tl.broadcast_to(tl.arange(0, DIM // 2)[None, :], (HEADS, DIM // 2))
    return tl.load(start + offsets).to(tl.float32)


@triton.jit
def norm_rotate_store(
    start: tl.tensor,
    tiles: tl.tuple,
    weight: tl.tuple,
    cos: tl.tensor,
    sin: tl.tensor,
    eps: tl.tensor,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
) -> None:
    """Norm, rotate and write one token's queries or keys; weight is (even, odd)."""
    for tile in tl.static_range(len(tiles)):
        x = tiles[tile]
        squares = tl.reduce(x * x, 1, add)
        factor = tl.rsqrt(squares / DIM + eps)[:, None]
        even, odd = split_pairs(x, HEADS, DIM)
        even = even * factor * weight[0]
        odd = odd * factor * weight[1]
        turned = tl.join(even * cos - odd * sin, odd * cos + even * sin)
        out = tl.reshape(turned, (HEADS, DIM)).to(start.dtype.element_ty)
        tl.store(start + tile * (HEADS * DIM) + head_offsets(HEADS, DIM), out)


@triton.jit(do_not_specialize=("text_tokens",))
def qk_norm_rope_kernel(
    qkv: tl.tensor,  # (batch, tokens, at least 2 * heads * DIM), written in place
    cos: tl.tensor,  # (tokens, DIM / 2)
    sin: tl.tensor,  # (tokens, DIM / 2)
    query: tl.tensor,  # norm weights (DIM,)
    key: tl.tensor,
    text_query: tl.tensor,  # those of the first `text_tokens` tokens, or None
    text_key: tl.tensor,
    eps: tl.tensor,
    text_tokens: tl.tensor,
    batch_stride: tl.tensor,
    token_stride: tl.tensor,
    cos_stride: tl.tensor,
    sin_stride: tl.tensor,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    COUNT: tl.constexpr,
) -> None:
    """One token: norm and rotate all heads of its queries and keys."""
    token = tl.program_id(0)
    queries = row_start(qkv, batch_stride, token_stride)
    keys = queries + HEADS * DIM * COUNT
    query_tiles = load_heads(queries, HEADS, DIM, COUNT)
    key_tiles = load_heads(keys, HEADS, DIM, COUNT)
    if text_query is not None:
        is_text = token < text_tokens
        query = tl.where(is_text, text_query, query)
        key = tl.where(is_text, text_key, key)
    query_weight = load_pairs(query, HEADS, DIM)
    key_weight = load_pairs(key, HEADS, DIM)
    cosines = load_rotation(cos + token.to(tl.int64) * cos_stride, HEADS, DIM)
    sines = load_rotation(sin + token.to(tl.int64) * sin_stride, HEADS, DIM)
    tl.debug_barrier()  # else the compiler moves loads between the stores, where each waits for memory alone
    norm_rotate_store(queries, query_tiles, query_weight, cosines, sines, eps, HEADS, DIM)
    norm_rotate_store(keys, key_tiles, key_weight, cosines, sines, eps, HEADS, DIM)


def require_weights(norm: HeadNorm, dim: int) -> None:
    """Refuse norm weights that do not fit a head."""
    require_shape((dim,), query=norm.query, key=norm.key)
    require_unit_stride(query=norm.query, key=norm.key)


def require_rotatable(qkv: torch.Tensor, rotation: Rotation, norm: HeadNorm, text: HeadNorm | None) -> int:
    """Refuse what does not fit; the number of heads."""
    heads = head_count(qkv, rotation)
    require_unit_stride(qkv=qkv, cos=rotation.cos, sin=rotation.sin)
    for one in (norm, text):
        if one is not None:
            require_weights(one, rotation.dim)
    return heads


def plan_qk_norm_rope(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    text_query: torch.Tensor | None,
    text_key: torch.Tensor | None,
    text_tokens: int,
    eps: float,
) -> Plan:
    """How the kernel is launched; refuses what does not fit."""
    text = HeadNorm(text_query, text_key) if text_query is not None and text_key is not None else None
    rotation = Rotation(cos, sin)
    heads, dim = require_rotatable(qkv, rotation, HeadNorm(query, key), text), rotation.dim
    tiles = head_tiles(heads, dim)
    strides = (qkv.stride(0), qkv.stride(1), cos.stride(0), sin.stride(0))
    numbers = (eps, text_tokens, *strides, tiles.heads, dim, tiles.count)
    return Plan((qkv.shape[1], qkv.shape[0], 1), numbers, warps(tiles.heads * dim, LOAD_VALUES, tiles.heads * dim))


qk_norm_rope_launch = Launcher(qk_norm_rope_kernel, plan_qk_norm_rope)


@torch.library.custom_op("gossamer::qk_norm_rope_", mutates_args=("qkv",))
def qk_norm_rope_op(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    text_query: torch.Tensor | None,
    text_key: torch.Tensor | None,
    text_tokens: int,
    eps: float,
) -> None:
    """Opaque to torch.compile."""
    launch_qk_norm_rope(qkv, cos, sin, query, key, text_query, text_key, text_tokens, eps)


def launch_qk_norm_rope(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    text_query: torch.Tensor | None,
    text_key: torch.Tensor | None,
    text_tokens: int,
    eps: float,
) -> None:
    """Run the kernel."""
    tensors = (qkv, cos, sin, query, key, text_query, text_key)
    qk_norm_rope_launch(*tensors, options=(text_tokens, eps))(*tensors)


@qk_norm_rope_op.register_fake
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
) -> None:
    return None


def qk_norm_rope_(
    qkv: torch.Tensor, rotation: Rotation, norm: HeadNorm, text: TextNorm | None = None, eps: float = EPS
) -> torch.Tensor:
    """`rotary.qk_norm_rope_` in one pass."""
    run: Callable[..., None] = launch_qk_norm_rope
    if through_operator(qkv):
        require_rotatable(qkv, rotation, norm, text.norm if text is not None else None)
        run = qk_norm_rope_op
    own = (text.norm.query, text.norm.key, text.tokens) if text is not None else (None, None, 0)
    run(qkv, rotation.cos, rotation.sin, norm.query, norm.key, *own, eps)
    return qkv
