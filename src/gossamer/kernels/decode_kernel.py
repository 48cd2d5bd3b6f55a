"""The two decode kernels: one driver each, with the format, the output type and the low-rank terms as static choices.

    decode_kernel      out = round(W_eff) or round(W_eff / row_scale), one tile a program
    row_scale_kernel   row_scale = largest |W_eff| of a row / largest code, one group of rows a program

W_eff = stored tile + (rank_scale * up) @ down, in float32, as `decode_reference` states it.

Two launches, not one kernel that reads its rows twice: a row's scale stays valid until an adapter changes, so a step
usually needs the first kernel alone, and its tiles then spread evenly over the chip whatever the shape of the matrix.
When both run, the codes of the second come from L2 (33 MB of NF4 for the widest FLUX layer, 50 MB of L2 on an H200).
"""

from __future__ import annotations

import triton
import triton.language as tl

from gossamer.kernels.decode_tiles_four_bit import four_bit_tile
from gossamer.kernels.decode_tiles_k import k16_tile, k32_tile
from gossamer.kernels.decode_tiles_legacy import legacy_tile
from gossamer.kernels.decode_tiles_rows import fp8_e5m2_tile, fp8_tile, int8_tile, plain_tile

# 1.5 * 2^23: adding it rounds to an integer, ties to even, whose two's complement is in the low bits of the sum
_ROUND_MAGIC = tl.constexpr(12582912.0)


@triton.jit
def _stored_tile(
    codes: tl.tensor,
    scale: tl.tensor,
    nested_scale: tl.tensor,
    nested_offset: tl.tensor,
    levels: tl.tensor,
    nested_levels: tl.tensor,
    row: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    row_bytes: tl.tensor,
    FAMILY: tl.constexpr,
    FORMAT: tl.constexpr,
    BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EVEN: tl.constexpr,
) -> tl.tensor:
    """Float32 weights (ROWS, COLS) of the stored matrix of `width` columns; undefined beyond its last column."""
    if FAMILY == "plain":
        tile = plain_tile(codes, row, first, width, COLS, EVEN)
    elif FAMILY == "int8":
        tile = int8_tile(codes, scale, row, first, width, COLS, EVEN)
    elif FAMILY == "fp8":
        tile = fp8_tile(codes, scale, row, first, width, COLS, EVEN)
    elif FAMILY == "fp8_e5m2":
        tile = fp8_e5m2_tile(codes, scale, row, first, width, COLS, EVEN)
    elif FAMILY == "four_bit":
        tile = four_bit_tile(
            codes, scale, nested_scale, nested_offset, levels, nested_levels,
            row, first, width, nested_levels is not None, ROWS, COLS, EVEN,
        )  # fmt: skip
    elif FAMILY == "legacy":
        tile = legacy_tile(codes, levels, row, first, width, row_bytes, FORMAT, BYTES, ROWS, COLS, EVEN)
    elif FAMILY == "k16":
        tile = k16_tile(codes, row, first, width, row_bytes, FORMAT, BYTES, ROWS, COLS, EVEN)
    else:
        tl.static_assert(FAMILY == "k32")
        tile = k32_tile(codes, levels, row, first, width, row_bytes, FORMAT, BYTES, ROWS, COLS, EVEN)
    return tile


@triton.jit
def _low_rank_tile(
    up: tl.tensor,
    down: tl.tensor,
    rank_scale: tl.tensor,
    row: tl.tensor,
    col: tl.tensor,
    width: tl.tensor,
    rank: tl.tensor,
    RANKS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EVEN: tl.constexpr,
) -> tl.tensor:
    """(rank_scale * up) @ down in float32 (ROWS, COLS), RANKS ranks at a time; `rank` is a multiple of that."""
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, rank, RANKS):
        index = start + tl.arange(0, RANKS)
        left = tl.load(up + row[:, None] * rank + index[None, :])
        scaled = (left.to(tl.float32) * tl.load(rank_scale + index)[None, :]).to(left.dtype)
        right = tl.load(down + index[:, None] * width + col[None, :], mask=(col < width)[None, :] | EVEN, other=0.0)
        total = tl.dot(scaled, right, total, input_precision=PRECISION)
    return total


@triton.jit
def _effective_tile(
    codes: tl.tensor,
    scale: tl.tensor,
    nested_scale: tl.tensor,
    nested_offset: tl.tensor,
    levels: tl.tensor,
    nested_levels: tl.tensor,
    up: tl.tensor,
    down: tl.tensor,
    rank_scale: tl.tensor,
    row: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    stored_width: tl.tensor,
    row_bytes: tl.tensor,
    rank: tl.tensor,
    FAMILY: tl.constexpr,
    FORMAT: tl.constexpr,
    BYTES: tl.constexpr,
    RANKS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EVEN: tl.constexpr,
) -> tl.tensor:
    """Float32 W_eff (ROWS, COLS): the stored weight, zero beyond its own width, and the low-rank terms."""
    tile = _stored_tile(
        codes, scale, nested_scale, nested_offset, levels, nested_levels,
        row, first, stored_width, row_bytes, FAMILY, FORMAT, BYTES, ROWS, COLS, EVEN,
    )  # fmt: skip
    col = first + tl.arange(0, COLS)
    if not EVEN:
        tile = tl.where((col < stored_width)[None, :], tile, 0.0)
    if up is not None:
        tile += _low_rank_tile(up, down, rank_scale, row, col, width, rank, RANKS, PRECISION, ROWS, COLS, EVEN)
    return tile


@triton.jit
def decode_kernel(
    out: tl.tensor,
    row_scale: tl.tensor,
    codes: tl.tensor,
    scale: tl.tensor,
    nested_scale: tl.tensor,
    nested_offset: tl.tensor,
    levels: tl.tensor,
    nested_levels: tl.tensor,
    up: tl.tensor,
    down: tl.tensor,
    rank_scale: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    stored_width: tl.tensor,
    row_bytes: tl.tensor,
    rank: tl.tensor,
    out_stride: tl.tensor,
    FAMILY: tl.constexpr,
    FORMAT: tl.constexpr,
    BYTES: tl.constexpr,
    OUTPUT: tl.constexpr,
    RANKS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EVEN: tl.constexpr,
) -> None:
    """Write one tile of W_eff into `out` (rows, width), OUTPUT being float, fp8 or int8."""
    tiles = tl.cdiv(width, COLS)
    first = tl.program_id(0) % tiles * COLS
    wanted = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(wanted, rows - 1)
    tile = _effective_tile(
        codes, scale, nested_scale, nested_offset, levels, nested_levels, up, down, rank_scale,
        row, first, width, stored_width, row_bytes, rank, FAMILY, FORMAT, BYTES, RANKS, PRECISION, ROWS, COLS, EVEN,
    )  # fmt: skip
    if OUTPUT != "float":
        tile *= tl.div_rn(1.0, tl.load(row_scale + row))[:, None]
    if OUTPUT == "fp8":
        # the conversion saturates at 448 and keeps NaN
        value = tile.to(out.dtype.element_ty)
    elif OUTPUT == "int8":
        value = (tl.clamp(tile, -127.0, 127.0) + _ROUND_MAGIC).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        tl.static_assert(OUTPUT == "float")
        value = tile.to(out.dtype.element_ty)
    col = first + tl.arange(0, COLS)
    pointer = out + wanted.to(tl.int64)[:, None] * out_stride + col[None, :]
    tl.store(pointer, value, mask=(wanted < rows)[:, None] & (col < width)[None, :])


@triton.jit
def row_scale_kernel(
    row_scale: tl.tensor,
    codes: tl.tensor,
    scale: tl.tensor,
    nested_scale: tl.tensor,
    nested_offset: tl.tensor,
    levels: tl.tensor,
    nested_levels: tl.tensor,
    up: tl.tensor,
    down: tl.tensor,
    rank_scale: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    stored_width: tl.tensor,
    row_bytes: tl.tensor,
    rank: tl.tensor,
    FAMILY: tl.constexpr,
    FORMAT: tl.constexpr,
    BYTES: tl.constexpr,
    LARGEST: tl.constexpr,
    RANKS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EVEN: tl.constexpr,
) -> None:
    """Write largest |W_eff| / LARGEST for ROWS rows, or 1 where that is no normal float32."""
    wanted = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(wanted, rows - 1)
    largest = tl.zeros((ROWS, COLS), tl.float32)
    for first in range(0, width, COLS):
        tile = _effective_tile(
            codes, scale, nested_scale, nested_offset, levels, nested_levels, up, down, rank_scale,
            row, first, width, stored_width, row_bytes, rank, FAMILY, FORMAT, BYTES, RANKS, PRECISION, ROWS, COLS, EVEN,
        )  # fmt: skip
        largest = tl.maximum(largest, tl.abs(tile))
    unit = tl.div_rn(tl.max(largest, axis=1), tl.full((ROWS,), LARGEST, tl.float32))
    tl.store(row_scale + wanted, tl.where(unit >= 1.1754943508222875e-38, unit, 1.0), mask=wanted < rows)
