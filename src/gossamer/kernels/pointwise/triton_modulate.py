"""Residual, gate, LayerNorm, modulation and row quantisation in Triton; `modulate.py` is the specification.

One program a token: x and y are read once, x' is written back and the norm's output written, with the row in registers
between. Of x, y, x' and the output nothing is touched twice; gate, scale and shift are shared by all tokens and stay
in the caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gossamer.kernels.pointwise.launch import pieces, require_shape, require_unit_stride, warps
from gossamer.kernels.pointwise.modulate import EPS, Modulation
from gossamer.kernels.pointwise.modulate import FLOAT16_LARGEST as LARGEST_HALF
from gossamer.kernels.pointwise.rows import Rows, empty_rows, largest_code, rows_from
from gossamer.kernels.pointwise.triton_tiles import (
    appended,
    load_pieces,
    row_peak,
    row_scale,
    row_start,
    row_sum,
    store_pieces,
)

FLOAT16_LARGEST = tl.constexpr(LARGEST_HALF)
VALUES_A_THREAD = 32


@triton.jit
def gated_sum(x: tl.tuple, gate: tl.tuple, y: tl.tuple, dtype: tl.constexpr) -> tl.tuple:
    """x + gate * y, rounded to `dtype` and back to float32."""
    total: tl.tuple = ()
    for piece in tl.static_range(len(x)):
        value = x[piece] + gate[piece] * y[piece]
        if dtype == tl.float16:
            value = tl.clamp(value, -FLOAT16_LARGEST, FLOAT16_LARGEST, propagate_nan=tl.PropagateNan.ALL)
        total = appended(total, value.to(dtype).to(tl.float32))
    return total


@triton.jit
def normed(x: tl.tuple, width: tl.constexpr, eps: tl.tensor) -> tl.tuple:
    """LayerNorm of a row, without affine weights."""
    mean = row_sum(x) / width
    centred: tl.tuple = ()
    squares: tl.tuple = ()
    for piece in tl.static_range(len(x)):
        value = x[piece] - mean
        centred = appended(centred, value)
        squares = appended(squares, value * value)
    factor = 1.0 / tl.sqrt_rn(row_sum(squares) / width + eps)
    out: tl.tuple = ()
    for piece in tl.static_range(len(x)):
        out = appended(out, centred[piece] * factor)
    return out


@triton.jit
def modulated(x: tl.tuple, scale: tl.tuple, shift: tl.tuple) -> tl.tuple:
    """x * (1 + scale) + shift."""
    out: tl.tuple = ()
    for piece in tl.static_range(len(x)):
        out = appended(out, x[piece] * (1.0 + scale[piece]) + shift[piece])
    return out


@triton.jit(do_not_specialize=("tokens",))
def residual_gate_kernel(
    x: tl.tensor,  # (batch, tokens, width), written in place
    gate: tl.tensor,  # (batch, width)
    y: tl.tensor,  # (batch, tokens, width)
    tokens: tl.tensor,
    x_batch_stride: tl.tensor,
    x_token_stride: tl.tensor,
    y_batch_stride: tl.tensor,
    y_token_stride: tl.tensor,
    gate_stride: tl.tensor,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
) -> None:
    """One token: x += gate * y."""
    row = tl.program_id(0)
    x_row = row_start(x, row, tokens, x_batch_stride, x_token_stride)
    y_row = row_start(y, row, tokens, y_batch_stride, y_token_stride)
    gate_row = gate + (row // tokens).to(tl.int64) * gate_stride
    old = load_pieces(x_row, BLOCK, COUNT)
    added = load_pieces(y_row, BLOCK, COUNT)
    new = gated_sum(old, load_pieces(gate_row, BLOCK, COUNT), added, x.dtype.element_ty)
    store_pieces(x_row, new, 1.0, BLOCK)


@triton.jit(do_not_specialize=("tokens",))
def norm_modulate_kernel(
    x: tl.tensor,  # (batch, tokens, width), written in place when there is a y
    gate: tl.tensor,  # (batch, width), or None
    y: tl.tensor,  # (batch, tokens, width), or None
    scale: tl.tensor,  # (batch, width)
    shift: tl.tensor,  # (batch, width)
    out: tl.tensor,  # (batch, tokens, width), contiguous
    out_scale: tl.tensor,  # (batch, tokens), contiguous, where there are codes
    eps: tl.tensor,
    tokens: tl.tensor,
    x_batch_stride: tl.tensor,
    x_token_stride: tl.tensor,
    y_batch_stride: tl.tensor,
    y_token_stride: tl.tensor,
    gate_stride: tl.tensor,
    scale_stride: tl.tensor,
    shift_stride: tl.tensor,
    LARGEST: tl.constexpr,  # largest code, or None where `out` holds plain values
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
) -> None:
    """One token: x += gate * y where there is a y, then its norm, modulated, as a row of `out`."""
    row = tl.program_id(0)
    batch = (row // tokens).to(tl.int64)
    x_row = row_start(x, row, tokens, x_batch_stride, x_token_stride)
    values = load_pieces(x_row, BLOCK, COUNT)
    if y is not None:
        added = load_pieces(row_start(y, row, tokens, y_batch_stride, y_token_stride), BLOCK, COUNT)
        values = gated_sum(values, load_pieces(gate + batch * gate_stride, BLOCK, COUNT), added, x.dtype.element_ty)
        store_pieces(x_row, values, 1.0, BLOCK)
    scales = load_pieces(scale + batch * scale_stride, BLOCK, COUNT)
    shifts = load_pieces(shift + batch * shift_stride, BLOCK, COUNT)
    values = modulated(normed(values, BLOCK * COUNT, eps), scales, shifts)
    factor = 1.0
    if LARGEST is not None:
        unit = row_scale(row_peak(values), LARGEST)
        tl.store(out_scale + row, unit)
        factor = tl.div_rn(1.0, unit)
    store_pieces(out + row.to(tl.int64) * (BLOCK * COUNT), values, factor, BLOCK)


def launch_norm_modulate(
    x: torch.Tensor,
    added: tuple[torch.Tensor, torch.Tensor] | None,
    by: Modulation,
    dtype: torch.dtype,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel; `added` is (gate, y)."""
    batch, tokens, width = x.shape
    gate, y = added if added is not None else (None, None)
    values, row_scales = empty_rows(x.shape, dtype, x.device)
    tiles = pieces(width)
    with torch.cuda.device_of(x):
        norm_modulate_kernel[(batch * tokens,)](
            x,
            gate,
            y,
            by.scale,
            by.shift,
            values,
            row_scales,
            eps,
            tokens,
            x.stride(0),
            x.stride(1),
            y.stride(0) if y is not None else 0,
            y.stride(1) if y is not None else 0,
            gate.stride(0) if gate is not None else 0,
            by.scale.stride(0),
            by.shift.stride(0),
            LARGEST=largest_code(dtype),
            BLOCK=tiles.block,
            COUNT=tiles.count,
            num_warps=warps(width, VALUES_A_THREAD),
        )
    return values, row_scales


@torch.library.custom_op("gossamer::norm_modulate", mutates_args=())
def norm_modulate_op(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, dtype: torch.dtype, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Opaque to torch.compile."""
    return launch_norm_modulate(x, None, Modulation(scale, shift), dtype, eps)


@norm_modulate_op.register_fake
def _(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, dtype: torch.dtype, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_rows(x.shape, dtype, x.device)


@torch.library.custom_op("gossamer::residual_gate_norm_modulate_", mutates_args=("x",))
def residual_gate_norm_modulate_op(
    x: torch.Tensor,
    gate: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    dtype: torch.dtype,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Opaque to torch.compile."""
    return launch_norm_modulate(x, (gate, y), Modulation(scale, shift), dtype, eps)


@residual_gate_norm_modulate_op.register_fake
def _(
    x: torch.Tensor,
    gate: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    dtype: torch.dtype,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_rows(x.shape, dtype, x.device)


@torch.library.custom_op("gossamer::residual_gate_", mutates_args=("x",))
def residual_gate_op(x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> None:
    """Opaque to torch.compile."""
    batch, tokens, width = x.shape
    tiles = pieces(width)
    with torch.cuda.device_of(x):
        residual_gate_kernel[(batch * tokens,)](
            x,
            gate,
            y,
            tokens,
            *x.stride()[:2],
            *y.stride()[:2],
            gate.stride(0),
            BLOCK=tiles.block,
            COUNT=tiles.count,
            num_warps=warps(width, VALUES_A_THREAD),
        )


@residual_gate_op.register_fake
def _(x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> None:
    return None


def vectors_for(x: torch.Tensor, **vectors: torch.Tensor) -> list[torch.Tensor]:
    """Modulation vectors as the kernels take them: (batch, width), one for all pictures repeated with stride 0."""
    batch, _, width = x.shape
    expanded = {name: vector.expand(batch, -1) for name, vector in vectors.items()}
    require_shape((batch, width), **expanded)
    require_unit_stride(**expanded)
    return list(expanded.values())


def require_tokens(x: torch.Tensor, y: torch.Tensor) -> None:
    """Refuse a y that cannot be added to x."""
    require_shape(tuple(x.shape), y=y)
    require_unit_stride(x=x, y=y)


def norm_modulate(x: torch.Tensor, by: Modulation, dtype: torch.dtype, eps: float = EPS) -> Rows:
    """`modulate.norm_modulate` in one pass."""
    require_unit_stride(x=x)
    scale, shift = vectors_for(x, scale=by.scale, shift=by.shift)
    return rows_from(*norm_modulate_op(x, scale, shift, dtype, eps))


def residual_gate_(x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`modulate.residual_gate_` in one pass."""
    require_tokens(x, y)
    residual_gate_op(x, *vectors_for(x, gate=gate), y)
    return x


def residual_gate_norm_modulate_(
    x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor, by: Modulation, dtype: torch.dtype, eps: float = EPS
) -> Rows:
    """`modulate.residual_gate_norm_modulate_` in one pass."""
    require_tokens(x, y)
    gate, scale, shift = vectors_for(x, gate=gate, scale=by.scale, shift=by.shift)
    return rows_from(*residual_gate_norm_modulate_op(x, gate, y, scale, shift, dtype, eps))
