"""Operands of an attention in eight bits, in Triton; `attention_codes` is the specification.

One pass over q, k and v, a program for 128 tokens of one head: of q and k together, or of v. On the way it norms and
rotates queries and keys as `pointwise.rotary` does, where it is given what that takes; nothing is rounded in between.
One load of cos and sin serves q and k.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gossamer.errors import InvalidOptionError, UnsupportedShapeError
from gossamer.kernels.attention_codes import BLOCK, HEAD, LARGEST, LEAST, LOG2_SCALE, SMALLEST, STEPS, Codes
from gossamer.kernels.attention_codes_tiles import (
    largest_of_rows,
    load_rotation,
    load_tokens,
    load_weights,
    norm_rotate,
    store_rounded,
    store_values,
)
from gossamer.kernels.pointwise.launch import Launch, Launcher, Plan, require_shape, require_unit_stride
from gossamer.kernels.pointwise.modulate import EPS
from gossamer.kernels.pointwise.triton_tiles import appended

# Two programs on a multiprocessor, each with all keys of its block in registers: 32 values a thread, and 8 of a step,
# which a load of 16 bytes gives. Half as many warps have 64 keys a thread, and nothing to do while those wait.
WARPS, REGISTERS = 16, 64
ROWS = 32  # tokens of a step


@triton.jit(do_not_specialize=("tokens", "heads", "blocks", "text_tokens"))
def codes_kernel(
    q: tl.tensor,  # (batch, heads, tokens, HEAD), channels side by side, as k and v
    k: tl.tensor,
    v: tl.tensor,
    cos: tl.tensor,  # (tokens, HEAD / 2), as sin; None, with all norm weights, where q and k are taken as they are
    sin: tl.tensor,
    query: tl.tensor,  # norm weights (HEAD,)
    key: tl.tensor,
    text_query: tl.tensor,  # those of the first `text_tokens` tokens, or None
    text_key: tl.tensor,
    q8: tl.tensor,  # (batch, heads, tokens, HEAD) contiguous, as k8
    k8: tl.tensor,
    v8: tl.tensor,  # (batch * heads * HEAD, blocks * BLOCK) contiguous
    q_scales: tl.tensor,  # (batch, heads, tokens) contiguous
    k_scales: tl.tensor,  # (batch * heads, blocks) contiguous, as exponents
    exponents: tl.tensor,
    text_tokens: tl.tensor,
    eps: tl.tensor,
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
    cos_token: tl.tensor,
    sin_token: tl.tensor,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    LEAST: tl.constexpr,
    STEPS: tl.constexpr,
    LOG2_SCALE: tl.constexpr,
) -> None:
    """One block of one head: q and k, or v, as the third number of the program says.

    q and k go ROWS tokens at a time: cos, sin and weights of all of them do not fit into the registers beside k, whose
    scale is known when its last token is. What a step reads is loaded before the step before it stores, since no load
    begins above a store. Scales of q move between threads, which wait for each other: all at once, after the loop.
    """
    block, head, which = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if which == 0:
        PARTS: tl.constexpr = BLOCK // ROWS
        row, turned, peak = tl.arange(0, ROWS), (), tl.zeros((ROWS,), tl.int32)
        scales = tl.zeros((ROWS, PARTS), tl.float32)
        start = head.to(tl.int64) * tokens + block * BLOCK
        offsets = (start + row)[:, None] * HEAD + tl.arange(0, HEAD)[None, :]
        waiting_q, waiting_k, cosines, sines = (), (), (), ()
        for part in tl.static_range(-1, PARTS):
            if part + 1 < PARTS:
                token = block * BLOCK + (part + 1) * ROWS + row
                next_q = load_tokens(q, token, head, tokens, heads, q_batch, q_head, q_token, HEAD)
                next_k = load_tokens(k, token, head, tokens, heads, k_batch, k_head, k_token, HEAD)
                waiting_q, waiting_k = appended(waiting_q, next_q), appended(waiting_k, next_k)
                if cos is not None:
                    cosines = appended(cosines, load_rotation(cos, token, tokens, cos_token, HEAD))
                    sines = appended(sines, load_rotation(sin, token, tokens, sin_token, HEAD))
            if part >= 0:
                token = block * BLOCK + part * ROWS + row
                queries: tl.tensor = waiting_q[part].to(tl.float32)
                keys: tl.tensor = waiting_k[part].to(tl.float32)
                if cos is not None:
                    weights = load_weights(query, text_query, token < text_tokens, ROWS, HEAD)
                    queries = norm_rotate(queries, weights, cosines[part], sines[part], eps, ROWS, HEAD)
                    weights = load_weights(key, text_key, token < text_tokens, ROWS, HEAD)
                    keys = norm_rotate(keys, weights, cosines[part], sines[part], eps, ROWS, HEAD)
                turned, peak = appended(turned, keys), tl.maximum(peak, largest_of_rows(keys, LEAST))
                largest = largest_of_rows(queries, LEAST).to(tl.float32, bitcast=True)
                scales = tl.where(tl.arange(0, PARTS)[None, :] == part, largest[:, None], scales)
                mask = (token < tokens)[:, None]
                store_rounded(q8, queries, largest, offsets + part * (ROWS * HEAD), mask, STEPS)
        largest_key = tl.max(peak, 0).to(tl.float32, bitcast=True)
        tl.store(k_scales + head * blocks + block, largest_key * (1 / STEPS))
        for part in tl.static_range(PARTS):
            inside = (block * BLOCK + part * ROWS + row < tokens)[:, None]
            every = tl.zeros((ROWS,), tl.float32) + largest_key
            store_rounded(k8, turned[part], every, offsets + part * (ROWS * HEAD), inside, STEPS)
        each = row[:, None] + tl.arange(0, PARTS)[None, :] * ROWS
        tl.store(q_scales + start + each, scales * (LOG2_SCALE / STEPS), mask=block * BLOCK + each < tokens)
    else:
        place = tl.arange(0, BLOCK)
        key_at = block * BLOCK + ((place & -16) | ((place >> 1 & 1) << 3) | ((place >> 2 & 3) << 1) | (place & 1))
        tile = load_tokens(v, key_at, head, tokens, heads, v_batch, v_head, v_token, HEAD)
        store_values(v8, exponents, tile.to(tl.float32), head, block, blocks, HEAD, BLOCK, SMALLEST, LARGEST)


# launch ---------------------------------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """What norms and rotates queries and keys, in the kernel's order; nothing does where all are None."""

    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    query: torch.Tensor | None = None
    key: torch.Tensor | None = None
    text_query: torch.Tensor | None = None
    text_key: torch.Tensor | None = None
    text_tokens: int = 0
    eps: float = EPS

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Those of them that lie in memory."""
        return self[:6]


AS_THEY_ARE = Turn()


def require_attendable(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Refuse shapes, types and strides that the kernels cannot take."""
    if q.ndim != 4 or not q.shape == k.shape == v.shape or q.shape[-1] != HEAD or 0 in q.shape:
        raise UnsupportedShapeError(
            f"q, k and v of shapes {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)} cannot be attended here",
            f"attention in eight bits takes (batch, heads, tokens, {HEAD}), none empty, the same of each",
            "use another attention backend",
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != torch.bfloat16:
            raise InvalidOptionError(
                f"{name} has type {x.dtype}",
                "attention in eight bits takes torch.bfloat16",
                f"convert {name}, or use another attention backend",
            )
    require_unit_stride(q=q, k=k, v=v)


def require_turn(turn: Turn, tokens: int) -> None:
    """Refuse a rotation and norm weights that do not fit this many tokens."""
    given = {name: x for name, x in turn._asdict().items() if isinstance(x, torch.Tensor)}
    require_unit_stride(**given)
    for name, x in given.items():
        require_shape((tokens, HEAD // 2) if name in ("cos", "sin") else (HEAD,), **{name: x})


def plan_codes(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    query: torch.Tensor | None,
    key: torch.Tensor | None,
    text_query: torch.Tensor | None,
    text_key: torch.Tensor | None,
    text_tokens: int,
    eps: float,
) -> Plan:
    """How the kernel is launched; refuses what does not fit."""
    require_attendable(q, k, v)
    batch, heads, tokens, head = q.shape
    require_turn(Turn(cos, sin, query, key, text_query, text_key), tokens)
    blocks = -(-tokens // BLOCK)
    of_rotation = (cos.stride(0), sin.stride(0)) if cos is not None and sin is not None else (0, 0)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *of_rotation)
    constants = (head, BLOCK, ROWS, SMALLEST, LARGEST, LEAST, STEPS, LOG2_SCALE)
    numbers = (text_tokens, eps, tokens, heads, blocks, *strides, *constants)
    return Plan((blocks, batch * heads, 2), numbers, WARPS, REGISTERS)


codes_launch = Launcher(codes_kernel, plan_codes)


def bound_codes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turn: Turn) -> Launch:
    """The launch for tensors of these layouts, whose last arguments are the codes."""
    return codes_launch(q, k, v, *turn.tensors, options=(turn.text_tokens, turn.eps))


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


def encode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turn: Turn = AS_THEY_ARE) -> Codes:
    """`codes_in_torch` on a GPU: (batch, heads, tokens, 128) each, any views with unit stride along channels.

    Of q and k as `turn` norms and rotates them, which are not written.
    """
    codes = empty_codes(q)
    bound_codes(q, k, v, turn)(q, k, v, *turn.tensors, *codes)
    return codes
