"""GELU, concatenation and row quantisation in Triton; `gelu.py` and `rows.py` are the specification.

One kernel for three functions: a row is a head that is taken as it is (attention output), a tail that goes through
GELU (the feed-forward part), or both. One program a token; a row of 15360 is 60 values in each thread of eight warps,
so the peak for its scale is known before anything is rounded and nothing is read twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gossamer.kernels.pointwise.launch import NO_PIECES, Pieces, pieces, require_shape, require_unit_stride, warps
from gossamer.kernels.pointwise.rows import Rows, empty_rows, largest_code, rows_from
from gossamer.kernels.pointwise.triton_tiles import (
    appended,
    larger,
    load_pieces,
    row_peak,
    row_scale,
    row_start,
    store_pieces,
)

VALUES_A_THREAD = 64
# 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u)), and exp(v) = 2^(v log2(e)): 2 sqrt(2/pi) log2(e)
GELU_SLOPE = tl.constexpr(2.302208198)
GELU_CUBE = tl.constexpr(0.044715)


@triton.jit
def gelu(values: tl.tuple) -> tl.tuple:
    """GELU in its tanh form, of a row."""
    out: tl.tuple = ()
    for piece in tl.static_range(len(values)):
        x = values[piece]
        out = appended(out, x / (1.0 + tl.exp2(-GELU_SLOPE * (x + GELU_CUBE * x * x * x))))
    return out


@triton.jit(do_not_specialize=("tokens",))
def head_tail_kernel(
    head: tl.tensor,  # (batch, tokens, head width), or None
    tail: tl.tensor,  # (batch, tokens, tail width), or None
    out: tl.tensor,  # (batch, tokens, head width + tail width), contiguous
    out_scale: tl.tensor,  # (batch, tokens), contiguous, where there are codes
    tokens: tl.tensor,
    head_batch_stride: tl.tensor,
    head_token_stride: tl.tensor,
    tail_batch_stride: tl.tensor,
    tail_token_stride: tl.tensor,
    LARGEST: tl.constexpr,  # largest code, or None where `out` holds plain values
    HEAD_BLOCK: tl.constexpr,
    HEAD_COUNT: tl.constexpr,
    TAIL_BLOCK: tl.constexpr,
    TAIL_COUNT: tl.constexpr,
) -> None:
    """One token: [head, gelu(tail)] as a row of `out`."""
    row = tl.program_id(0)
    peak = 0.0
    if HEAD_COUNT > 0:
        start = row_start(head, row, tokens, head_batch_stride, head_token_stride)
        head_values = load_pieces(start, HEAD_BLOCK, HEAD_COUNT)
    if TAIL_COUNT > 0:
        start = row_start(tail, row, tokens, tail_batch_stride, tail_token_stride)
        tail_values = gelu(load_pieces(start, TAIL_BLOCK, TAIL_COUNT))
    factor = 1.0
    if LARGEST is not None:
        if HEAD_COUNT > 0:
            peak = larger(peak, row_peak(head_values))
        if TAIL_COUNT > 0:
            peak = larger(peak, row_peak(tail_values))
        unit = row_scale(peak, LARGEST)
        tl.store(out_scale + row, unit)
        factor = tl.div_rn(1.0, unit)
    out_row = out + row.to(tl.int64) * (HEAD_BLOCK * HEAD_COUNT + TAIL_BLOCK * TAIL_COUNT)
    if HEAD_COUNT > 0:
        store_pieces(out_row, head_values, factor, HEAD_BLOCK)
    if TAIL_COUNT > 0:
        store_pieces(out_row + HEAD_BLOCK * HEAD_COUNT, tail_values, factor, TAIL_BLOCK)


def _tiles(part: torch.Tensor | None) -> Pieces:
    return pieces(part.shape[-1]) if part is not None else NO_PIECES


def _strides(part: torch.Tensor | None) -> tuple[int, int]:
    return (part.stride(0), part.stride(1)) if part is not None else (0, 0)


def launch_head_tail(
    head: torch.Tensor | None, tail: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel."""
    parts = [part for part in (head, tail) if part is not None]
    batch, tokens = parts[0].shape[:2]
    width = sum(part.shape[-1] for part in parts)
    values, scale = empty_rows(torch.Size((batch, tokens, width)), dtype, parts[0].device)
    head_tiles, tail_tiles = _tiles(head), _tiles(tail)
    with torch.cuda.device_of(parts[0]):
        head_tail_kernel[(batch * tokens,)](
            head,
            tail,
            values,
            scale,
            tokens,
            *_strides(head),
            *_strides(tail),
            LARGEST=largest_code(dtype),
            HEAD_BLOCK=head_tiles.block,
            HEAD_COUNT=head_tiles.count,
            TAIL_BLOCK=tail_tiles.block,
            TAIL_COUNT=tail_tiles.count,
            num_warps=warps(width, VALUES_A_THREAD),
        )
    return values, scale


@torch.library.custom_op("gossamer::quantize_rows", mutates_args=())
def quantize_rows_op(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Opaque to torch.compile."""
    return launch_head_tail(x, None, dtype)


@torch.library.custom_op("gossamer::gelu_rows", mutates_args=())
def gelu_rows_op(mlp: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Opaque to torch.compile."""
    return launch_head_tail(None, mlp, dtype)


@quantize_rows_op.register_fake
@gelu_rows_op.register_fake
def _(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_rows(x.shape, dtype, x.device)


@torch.library.custom_op("gossamer::gelu_concat", mutates_args=())
def gelu_concat_op(attention: torch.Tensor, mlp: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Opaque to torch.compile."""
    return launch_head_tail(attention, mlp, dtype)


@gelu_concat_op.register_fake
def _(attention: torch.Tensor, mlp: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    shape = torch.Size((*mlp.shape[:-1], attention.shape[-1] + mlp.shape[-1]))
    return empty_rows(shape, dtype, mlp.device)


def quantize_rows(x: torch.Tensor, dtype: torch.dtype) -> Rows:
    """`rows.quantize_rows` of x (batch, tokens, width) in one pass."""
    require_unit_stride(x=x)
    return rows_from(*quantize_rows_op(x, dtype))


def gelu_rows(mlp: torch.Tensor, dtype: torch.dtype) -> Rows:
    """`gelu.gelu_rows` in one pass."""
    require_unit_stride(mlp=mlp)
    return rows_from(*gelu_rows_op(mlp, dtype))


def gelu_concat(attention: torch.Tensor, mlp: torch.Tensor, dtype: torch.dtype) -> Rows:
    """`gelu.gelu_concat` in one pass."""
    require_shape((*mlp.shape[:-1], attention.shape[-1]), attention=attention)
    require_unit_stride(attention=attention, mlp=mlp)
    return rows_from(*gelu_concat_op(attention, mlp, dtype))
