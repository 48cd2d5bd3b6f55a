"""What the pointwise Triton kernels share: rows in pieces, reductions over a row, and the one rounding at its end.

A row is a tuple of float32 tiles that stay in registers. The reductions combine with functions of this file, because
Triton's own maximum passes over a NaN, which would hide it in a quantised row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gossamer.kernels.pointwise import rows

AMAX_FLOOR = tl.constexpr(rows.AMAX_FLOOR)
# adding 1.5 * 2^23 to a float32 below 2^22 rounds it to the nearest integer, ties to even, and leaves that integer in
# the lowest bits: a conversion to int8 without the slow instruction for one
ROUND = tl.constexpr(12582912.0)


@triton.jit
def add(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """Combine of a sum."""
    return a + b


@triton.jit
def larger(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """Combine of a maximum that keeps NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def appended(row: tl.tuple, tile: tl.tensor) -> tl.tuple:
    """A row with one more tile; Triton has no unpacking."""
    return row + (tile,)  # noqa: RUF005


@triton.jit
def row_start(pointer: tl.tensor, batch_stride: tl.tensor, token_stride: tl.tensor) -> tl.tensor:
    """Address of this program's row of a (batch, tokens, width) view.

    The grid is (tokens, batch), and the offset 64-bit, since a wide buffer passes 2^31 values.
    """
    return pointer + tl.program_id(1).to(tl.int64) * batch_stride + tl.program_id(0).to(tl.int64) * token_stride


@triton.jit
def row_number() -> tl.tensor:
    """Number of this program's row in a contiguous (batch, tokens, width)."""
    return tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)


@triton.jit
def load_pieces(start: tl.tensor, BLOCK: tl.constexpr, COUNT: tl.constexpr) -> tl.tuple:
    """A row as COUNT tiles of float32."""
    found: tl.tuple = ()
    for piece in tl.static_range(COUNT):
        found = appended(found, tl.load(start + piece * BLOCK + tl.arange(0, BLOCK)).to(tl.float32))
    return found


@triton.jit
def row_sum(values: tl.tuple) -> tl.tensor:
    """Sum of a row; the tiles are added first, so that threads talk to each other once."""
    total = values[0]
    for piece in tl.static_range(1, len(values)):
        total += values[piece]
    return tl.reduce(total, 0, add)


@triton.jit
def row_peak(values: tl.tuple) -> tl.tensor:
    """Largest magnitude of a row; NaN if there is one in it."""
    peak = tl.abs(values[0])
    for piece in tl.static_range(1, len(values)):
        peak = larger(peak, tl.abs(values[piece]))
    return tl.reduce(peak, 0, larger)


@triton.jit
def row_scale(peak: tl.tensor, LARGEST: tl.constexpr) -> tl.tensor:
    """Scale of a row with this largest magnitude."""
    return tl.div_rn(larger(peak, AMAX_FLOOR), LARGEST)


@triton.jit
def store_pieces(start: tl.tensor, values: tl.tuple, factor: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Round a row once to the type that `start` points to; codes are values * factor."""
    for piece in tl.static_range(len(values)):
        value = values[piece]
        if start.dtype.element_ty == tl.int8:
            value = (value * factor + ROUND).to(tl.int32, bitcast=True)
        elif start.dtype.element_ty == tl.float8e4nv:
            value = value * factor
        tl.store(start + piece * BLOCK + tl.arange(0, BLOCK), value.to(start.dtype.element_ty))


@triton.jit
def store_row(
    out: tl.tensor, out_scale: tl.tensor, values: tl.tuple, LARGEST: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Write this program's row into a contiguous `out`, with its scale where there is a largest code."""
    row = row_number()
    factor = 1.0
    if LARGEST is not None:
        unit = row_scale(row_peak(values), LARGEST)
        tl.store(out_scale + row, unit)
        factor = tl.div_rn(1.0, unit)
    store_pieces(out + row * (BLOCK * len(values)), values, factor, BLOCK)
