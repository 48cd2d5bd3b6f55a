"""Residual, gate, LayerNorm, modulation and row quantisation in Triton; `modulate.py` is the specification.

One program a token: x and y are read once, x' is written back and the norm's output written, with the row in registers
between. Of x, y, x' and the output nothing is touched twice; gate, scale and shift are shared by all tokens and stay
in the caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gossamer.kernels.operators import through_operator
from gossamer.kernels.pointwise.launch import (
    Launcher,
    Plan,
    pieces,
    require_shape,
    require_unit_stride,
    warps,
)
from gossamer.kernels.pointwise.modulate import EPS, Modulation
from gossamer.kernels.pointwise.modulate import FLOAT16_LARGEST as LARGEST_HALF
from gossamer.kernels.pointwise.rows import Rows, empty_rows, from_operator, largest_code, to_operator
from gossamer.kernels.pointwise.triton_tiles import (
    appended,
    load_pieces,
    row_start,
    row_sum,
    store_pieces,
    store_row,
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
    factor = tl.rsqrt(row_sum(squares) / width + eps)
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


@triton.jit
def residual_gate_kernel(
    x: tl.tensor,  # (batch, tokens, width), written in place
    gate: tl.tensor,  # (batch, width)
    y: tl.tensor,  # (batch, tokens, width)
    x_batch_stride: tl.tensor,
    x_token_stride: tl.tensor,
    y_batch_stride: tl.tensor,
    y_token_stride: tl.tensor,
    gate_stride: tl.tensor,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
) -> None:
    """One token: x += gate * y."""
    x_row = row_start(x, x_batch_stride, x_token_stride)
    old = load_pieces(x_row, BLOCK, COUNT)
    added = load_pieces(row_start(y, y_batch_stride, y_token_stride), BLOCK, COUNT)
    gates = load_pieces(row_start(gate, gate_stride, 0), BLOCK, COUNT)
    store_pieces(x_row, gated_sum(old, gates, added, x.dtype.element_ty), 1.0, BLOCK)


@triton.jit
def norm_modulate_kernel(
    x: tl.tensor,  # (batch, tokens, width), written in place when there is a y
    gate: tl.tensor,  # (batch, width), or None
    y: tl.tensor,  # (batch, tokens, width), or None
    scale: tl.tensor,  # (batch, width)
    shift: tl.tensor,  # (batch, width)
    out: tl.tensor,  # (batch, tokens, width), contiguous
    out_scale: tl.tensor,  # (batch, tokens), contiguous, or None where `out` holds plain values
    eps: tl.tensor,
    x_batch_stride: tl.tensor,
    x_token_stride: tl.tensor,
    y_batch_stride: tl.tensor,
    y_token_stride: tl.tensor,
    gate_stride: tl.tensor,
    scale_stride: tl.tensor,
    shift_stride: tl.tensor,
    LARGEST: tl.constexpr,  # largest code, or None
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
) -> None:
    """One token: x += gate * y where there is a y, then its norm, modulated, as a row of `out`."""
    x_row = row_start(x, x_batch_stride, x_token_stride)
    values = load_pieces(x_row, BLOCK, COUNT)
    if y is not None:
        added = load_pieces(row_start(y, y_batch_stride, y_token_stride), BLOCK, COUNT)
        gates = load_pieces(row_start(gate, gate_stride, 0), BLOCK, COUNT)
        values = gated_sum(values, gates, added, x.dtype.element_ty)
        store_pieces(x_row, values, 1.0, BLOCK)
    scales = load_pieces(row_start(scale, scale_stride, 0), BLOCK, COUNT)
    shifts = load_pieces(row_start(shift, shift_stride, 0), BLOCK, COUNT)
    values = modulated(normed(values, BLOCK * COUNT, eps), scales, shifts)
    store_row(out, out_scale, values, LARGEST, BLOCK)


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


def plan_residual_gate(x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> Plan:
    """How the residual kernel is launched; refuses what does not fit."""
    require_tokens(x, y)
    (gate,) = vectors_for(x, gate=gate)
    batch, tokens, width = x.shape
    tiles = pieces(width)
    strides = (x.stride(0), x.stride(1), y.stride(0), y.stride(1), gate.stride(0))
    return Plan((tokens, batch, 1), (*strides, tiles.block, tiles.count), warps(width, VALUES_A_THREAD, tiles.block))


def plan_norm_modulate(
    x: torch.Tensor,
    gate: torch.Tensor | None,
    y: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    dtype: torch.dtype,
    eps: float,
) -> Plan:
    """How the norm kernel is launched; refuses what does not fit."""
    require_unit_stride(x=x)
    scale, shift = vectors_for(x, scale=scale, shift=shift)
    added = (0, 0, 0)
    if gate is not None and y is not None:
        require_tokens(x, y)
        added = (y.stride(0), y.stride(1), vectors_for(x, gate=gate)[0].stride(0))
    batch, tokens, width = x.shape
    tiles = pieces(width)
    strides = (x.stride(0), x.stride(1), *added, scale.stride(0), shift.stride(0))
    numbers = (eps, *strides, largest_code(dtype), tiles.block, tiles.count)
    return Plan((tokens, batch, 1), numbers, warps(width, VALUES_A_THREAD, tiles.block))


residual_gate_launch = Launcher(residual_gate_kernel, plan_residual_gate)
norm_modulate_launch = Launcher(norm_modulate_kernel, plan_norm_modulate)


def launch_norm_modulate(
    x: torch.Tensor,
    gate: torch.Tensor | None,
    y: torch.Tensor | None,
    by: Modulation,
    dtype: torch.dtype,
    eps: float,
) -> Rows:
    """Run the norm kernel, with x += gate * y before it where there is a y."""
    launch = norm_modulate_launch(x, gate, y, by.scale, by.shift, options=(dtype, eps))
    rows = empty_rows(x.shape, dtype, x.device)
    launch(x, gate, y, by.scale, by.shift, rows.values, rows.scale)
    return rows


@torch.library.custom_op("gossamer::norm_modulate", mutates_args=())
def norm_modulate_op(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, dtype: torch.dtype, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Opaque to torch.compile."""
    return to_operator(launch_norm_modulate(x, None, None, Modulation(scale, shift), dtype, eps))


@norm_modulate_op.register_fake
def _(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, dtype: torch.dtype, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return to_operator(empty_rows(x.shape, dtype, x.device))


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
    return to_operator(launch_norm_modulate(x, gate, y, Modulation(scale, shift), dtype, eps))


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
    return to_operator(empty_rows(x.shape, dtype, x.device))


@torch.library.custom_op("gossamer::residual_gate_", mutates_args=("x",))
def residual_gate_op(x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> None:
    """Opaque to torch.compile."""
    residual_gate_launch(x, gate, y)(x, gate, y)


@residual_gate_op.register_fake
def _(x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> None:
    return None


def norm_modulate(x: torch.Tensor, by: Modulation, dtype: torch.dtype, eps: float = EPS) -> Rows:
    """`modulate.norm_modulate` in one pass."""
    if not through_operator(x):
        return launch_norm_modulate(x, None, None, by, dtype, eps)
    require_unit_stride(x=x)
    vectors_for(x, scale=by.scale, shift=by.shift)
    return from_operator(*norm_modulate_op(x, by.scale, by.shift, dtype, eps))


def residual_gate_(x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`modulate.residual_gate_` in one pass."""
    if through_operator(x):
        require_tokens(x, y)
        vectors_for(x, gate=gate)
        residual_gate_op(x, gate, y)
    else:
        residual_gate_launch(x, gate, y)(x, gate, y)
    return x


def residual_gate_norm_modulate_(
    x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor, by: Modulation, dtype: torch.dtype, eps: float = EPS
) -> Rows:
    """`modulate.residual_gate_norm_modulate_` in one pass."""
    if not through_operator(x):
        return launch_norm_modulate(x, gate, y, by, dtype, eps)
    require_tokens(x, y)
    vectors_for(x, gate=gate, scale=by.scale, shift=by.shift)
    return from_operator(*residual_gate_norm_modulate_op(x, gate, y, by.scale, by.shift, dtype, eps))
