"""GELU, concatenation and row quantisation in Triton; `gelu.py` and `rows.py` are the specification.

One kernel for three functions: a row is a head that is taken as it is (attention output), a tail that goes through
GELU (the feed-forward part), or both. One program a token, its row in registers: the peak for its scale is known
before anything is rounded, and nothing is read twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gossamer.kernels.operators import through_operator
from gossamer.kernels.pointwise.launch import (
    NO_PIECES,
    Launcher,
    Pieces,
    Plan,
    pieces,
    require_shape,
    require_unit_stride,
    warps,
)
from gossamer.kernels.pointwise.rows import Rows, empty_rows, from_operator, largest_code, to_operator
from gossamer.kernels.pointwise.triton_tiles import (
    appended,
    larger,
    load_pieces,
    row_number,
    row_peak,
    row_scale,
    row_start,
    store_pieces,
)

VALUES_A_THREAD = 64
# 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u)), and exp(v) = 2^(v log2(e)): -2 sqrt(2/pi) log2(e), and 0.044715 times that
GELU_SLOPE = tl.constexpr(-2.302208198)
GELU_CUBE = tl.constexpr(-0.102943240)


@triton.jit
def gelu(values: tl.tuple) -> tl.tuple:
    """GELU in its tanh form, of a row; 1 / d is taken as rsqrt(d)^2, half the instructions of a division."""
    out: tl.tuple = ()
    for piece in tl.static_range(len(values)):
        x = values[piece]
        root = tl.rsqrt(1.0 + tl.exp2(x * (GELU_CUBE * (x * x) + GELU_SLOPE)))
        out = appended(out, x * root * root)
    return out


@triton.jit
def head_tail_kernel(
    head: tl.tensor,  # (batch, tokens, head width), or None
    tail: tl.tensor,  # (batch, tokens, tail width), or None
    out: tl.tensor,  # (batch, tokens, head width + tail width), contiguous
    out_scale: tl.tensor,  # (batch, tokens), contiguous, or None where `out` holds plain values
    head_batch_stride: tl.tensor,
    head_token_stride: tl.tensor,
    tail_batch_stride: tl.tensor,
    tail_token_stride: tl.tensor,
    LARGEST: tl.constexpr,  # largest code, or None
    HEAD_BLOCK: tl.constexpr,
    HEAD_COUNT: tl.constexpr,
    TAIL_BLOCK: tl.constexpr,
    TAIL_COUNT: tl.constexpr,
) -> None:
    """One token: [head, gelu(tail)] as a row of `out`."""
    row = row_number()
    peak = 0.0
    if HEAD_COUNT > 0:
        head_values = load_pieces(row_start(head, head_batch_stride, head_token_stride), HEAD_BLOCK, HEAD_COUNT)
    if TAIL_COUNT > 0:
        tail_values = gelu(load_pieces(row_start(tail, tail_batch_stride, tail_token_stride), TAIL_BLOCK, TAIL_COUNT))
    factor = 1.0
    if LARGEST is not None:
        if HEAD_COUNT > 0:
            peak = larger(peak, row_peak(head_values))
        if TAIL_COUNT > 0:
            peak = larger(peak, row_peak(tail_values))
        unit = row_scale(peak, LARGEST)
        tl.store(out_scale + row, unit)
        factor = tl.div_rn(1.0, unit)
    out_row = out + row * (HEAD_BLOCK * HEAD_COUNT + TAIL_BLOCK * TAIL_COUNT)
    if HEAD_COUNT > 0:
        store_pieces(out_row, head_values, factor, HEAD_BLOCK)
    if TAIL_COUNT > 0:
        store_pieces(out_row + HEAD_BLOCK * HEAD_COUNT, tail_values, factor, TAIL_BLOCK)


def _tiles(part: torch.Tensor | None) -> Pieces:
    return pieces(part.shape[-1]) if part is not None else NO_PIECES


def _strides(part: torch.Tensor | None) -> tuple[int, int]:
    return (part.stride(0), part.stride(1)) if part is not None else (0, 0)


def require_joinable(attention: torch.Tensor, mlp: torch.Tensor) -> None:
    """Refuse parts of different tokens."""
    require_shape((*mlp.shape[:-1], attention.shape[-1]), attention=attention)
    require_unit_stride(attention=attention, mlp=mlp)


def plan_head_tail(head: torch.Tensor | None, tail: torch.Tensor | None, dtype: torch.dtype) -> Plan:
    """How the kernel is launched; refuses what does not fit."""
    if head is not None and tail is not None:
        require_joinable(head, tail)
    parts = {name: part for name, part in (("x", head), ("mlp", tail)) if part is not None}
    require_unit_stride(**parts)
    batch, tokens = next(iter(parts.values())).shape[:2]
    head_tiles, tail_tiles = _tiles(head), _tiles(tail)
    sizes = (head_tiles.block, head_tiles.count, tail_tiles.block, tail_tiles.count)
    numbers = (*_strides(head), *_strides(tail), largest_code(dtype), *sizes)
    width = sum(part.shape[-1] for part in parts.values())
    # the wider part decides, though the narrow one is then read in halves of 16 bytes: with warps for the narrow one, a
    # thread would hold 120 values of a FLUX row
    piece = max(head_tiles.block, tail_tiles.block)
    return Plan((tokens, batch, 1), numbers, warps(width, VALUES_A_THREAD, piece))


head_tail_launch = Launcher(head_tail_kernel, plan_head_tail)


def launch_one(x: torch.Tensor, dtype: torch.dtype, *, activate: bool) -> Rows:
    """Run the kernel on one part, through GELU or as it is."""
    head, tail = (None, x) if activate else (x, None)
    launch = head_tail_launch(head, tail, options=(dtype,))
    rows = empty_rows(x.shape, dtype, x.device)
    launch(head, tail, rows.values, rows.scale)
    return rows


def launch_both(attention: torch.Tensor, mlp: torch.Tensor, dtype: torch.dtype) -> Rows:
    """Run the kernel on attention output and feed-forward part."""
    launch = head_tail_launch(attention, mlp, options=(dtype,))
    rows = empty_rows(joined_shape(attention, mlp), dtype, mlp.device)
    launch(attention, mlp, rows.values, rows.scale)
    return rows


def joined_shape(attention: torch.Tensor, mlp: torch.Tensor) -> tuple[int, ...]:
    """Shape of [attention, mlp]."""
    return (*mlp.shape[:-1], attention.shape[-1] + mlp.shape[-1])


@torch.library.custom_op("gossamer::quantize_rows", mutates_args=())
def quantize_rows_op(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Opaque to torch.compile."""
    return to_operator(launch_one(x, dtype, activate=False))


@torch.library.custom_op("gossamer::gelu_rows", mutates_args=())
def gelu_rows_op(mlp: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Opaque to torch.compile."""
    return to_operator(launch_one(mlp, dtype, activate=True))


@quantize_rows_op.register_fake
@gelu_rows_op.register_fake
def _(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return to_operator(empty_rows(x.shape, dtype, x.device))


@torch.library.custom_op("gossamer::gelu_concat", mutates_args=())
def gelu_concat_op(attention: torch.Tensor, mlp: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Opaque to torch.compile."""
    return to_operator(launch_both(attention, mlp, dtype))


@gelu_concat_op.register_fake
def _(attention: torch.Tensor, mlp: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return to_operator(empty_rows(joined_shape(attention, mlp), dtype, mlp.device))


def quantize_rows(x: torch.Tensor, dtype: torch.dtype) -> Rows:
    """`rows.quantize_rows` of x (batch, tokens, width) in one pass."""
    if not through_operator(x):
        return launch_one(x, dtype, activate=False)
    require_unit_stride(x=x)
    return from_operator(*quantize_rows_op(x, dtype))


def gelu_rows(mlp: torch.Tensor, dtype: torch.dtype) -> Rows:
    """`gelu.gelu_rows` in one pass."""
    if not through_operator(mlp):
        return launch_one(mlp, dtype, activate=True)
    require_unit_stride(mlp=mlp)
    return from_operator(*gelu_rows_op(mlp, dtype))


def gelu_concat(attention: torch.Tensor, mlp: torch.Tensor, dtype: torch.dtype) -> Rows:
    """`gelu.gelu_concat` in one pass."""
    if not through_operator(attention):
        return launch_both(attention, mlp, dtype)
    require_joinable(attention, mlp)
    return from_operator(*gelu_concat_op(attention, mlp, dtype))
