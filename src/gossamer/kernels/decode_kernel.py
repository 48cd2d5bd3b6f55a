"""The two decode kernels: one driver each, with the format, the output type and the low-rank terms as static choices.

    decode_kernel      out = round(W_eff) or round(W_eff / row_scale), one column of tiles a program
    row_scale_kernel   row_scale = largest |W_eff| of a row / largest code, one group of rows a program

W_eff = stored tile + up @ (rank_scale * down), in float32, as `decode_reference` states it. The stored tile is what the
tensor cores begin to add to, so that a tile has one set of accumulators and not two. Towards fp8 it is float16 in units
of its row; here, what the tensor cores add is brought to these units afterwards.

A program of `decode_kernel` keeps its columns and goes down the rows: `down` is read, scaled and laid out once, and a
tile costs what its codes and a few rows of `up` cost. Without terms nothing is kept, and a program has one tile. Where
layers that read the same input are decoded as one matrix, each band of `band_rows` rows has a `down` of its own, and no
program leaves its band.

`decode_gluon` has the first kernel once more, with layouts of its own. The one here serves Turing, float32 factors,
formats without blocks while there are no terms, and Triton's interpreter, which checks the loaders that both share.

Two launches, not one kernel that reads its rows twice: a row's scale stays valid until an adapter changes, so a step
usually needs the first kernel alone, and its tiles then spread evenly over the chip whatever the shape of the matrix.
When both run, the codes of the second come from L2 (33 MB of NF4 for the widest FLUX layer, 50 MB of L2 on an H200).
"""

from __future__ import annotations

import triton
import triton.language as tl

from gossamer.kernels.decode_tiles import steps
from gossamer.kernels.decode_tiles_four_bit import four_bit_tile
from gossamer.kernels.decode_tiles_k import k16_tile, k32_tile
from gossamer.kernels.decode_tiles_legacy import legacy_tile
from gossamer.kernels.decode_tiles_rows import fp8_e5m2_tile, fp8_tile, int8_tile, plain_tile

# 1.5 * 2^23: adding it rounds to an integer, ties to even, whose two's complement is in the low bits of the sum
_ROUND_MAGIC = tl.constexpr(12582912.0)


@triton.jit
def stored_tile(
    codes: tl.tensor,
    scale: tl.tensor,
    nested_scale: tl.tensor,
    nested_offset: tl.tensor,
    levels: tl.tensor,
    nested_levels: tl.tensor,
    units: tl.tensor,
    begin: tl.tensor,
    rows: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    row_bytes: tl.tensor,
    FAMILY: tl.constexpr,
    FORMAT: tl.constexpr,
    BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EVEN: tl.constexpr,
    RUN: tl.constexpr,
) -> tl.tensor:
    """Weights (ROWS, COLS) of the stored matrix of `width` columns; undefined beyond its last column.

    Float32; or, where the rows have `units` (rows,), float16 in these units, rounded twice on the way.
    """
    if FAMILY == "plain":
        tile = plain_tile(codes, begin, rows, first, width, ROWS, COLS, EVEN)
    elif FAMILY == "int8":
        tile = int8_tile(codes, scale, units, begin, rows, first, width, ROWS, COLS, EVEN)
    elif FAMILY == "fp8":
        tile = fp8_tile(codes, scale, units, begin, rows, first, width, ROWS, COLS, EVEN)
    elif FAMILY == "fp8_e5m2":
        tile = fp8_e5m2_tile(codes, scale, units, begin, rows, first, width, ROWS, COLS, EVEN)
    elif FAMILY == "four_bit":
        tile = four_bit_tile(
            codes, scale, nested_scale, nested_offset, levels, nested_levels, units,
            begin, rows, first, width, FORMAT, ROWS, COLS, EVEN, RUN,
        )  # fmt: skip
    elif FAMILY == "legacy":
        tile = legacy_tile(
            codes, levels, units, begin, rows, first, width, row_bytes, FORMAT, BYTES, ROWS, COLS, EVEN, RUN
        )
    elif FAMILY == "k16":
        tile = k16_tile(codes, units, begin, rows, first, width, row_bytes, FORMAT, BYTES, ROWS, COLS, EVEN, RUN)
    else:
        tl.static_assert(FAMILY == "k32")
        tile = k32_tile(
            codes, levels, units, begin, rows, first, width, row_bytes, FORMAT, BYTES, ROWS, COLS, EVEN, RUN
        )
    return tile


@triton.jit
def base_tile(
    codes: tl.tensor,
    scale: tl.tensor,
    nested_scale: tl.tensor,
    nested_offset: tl.tensor,
    levels: tl.tensor,
    nested_levels: tl.tensor,
    units: tl.tensor,
    begin: tl.tensor,
    rows: tl.tensor,
    first: tl.tensor,
    stored_width: tl.tensor,
    row_bytes: tl.tensor,
    FAMILY: tl.constexpr,
    FORMAT: tl.constexpr,
    BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EVEN: tl.constexpr,
    RUN: tl.constexpr,
) -> tl.tensor:
    """Stored weights (ROWS, COLS) as `stored_tile` gives them, zero beyond their own width."""
    tile = stored_tile(
        codes, scale, nested_scale, nested_offset, levels, nested_levels, units,
        begin, rows, first, stored_width, row_bytes, FAMILY, FORMAT, BYTES, ROWS, COLS, EVEN, RUN,
    )  # fmt: skip
    if EVEN:
        return tile
    else:
        return tl.where((first + steps(COLS) < stored_width)[None, :], tile, 0.0)


@triton.jit
def band_place(program: tl.tensor, rows: tl.tensor, band_rows: tl.tensor, rows_each: tl.tensor) -> tl.tuple:
    """The band of a program that takes `rows_each` rows, its first row, and the row that it stops before."""
    programs = tl.cdiv(band_rows, rows_each)
    band = program // programs
    return band, band * band_rows + program % programs * rows_each, tl.minimum(rows, (band + 1) * band_rows)


@triton.constexpr_function
def in_halves(output: str, family: str) -> bool:
    """Whether stored weights are float16 in units of their row on the way to the output."""
    return output == "fp8" and family != "plain"


@triton.jit
def _up_tile(up: tl.tensor, row: tl.tensor, start: tl.tensor, rank: tl.tensor, RANKS: tl.constexpr) -> tl.tensor:
    """RANKS ranks of `up` from `start` on: (ROWS, RANKS)."""
    return tl.load(up + row[:, None] * rank + (start + tl.arange(0, RANKS))[None, :])


@triton.jit
def _down_tile(
    down: tl.tensor,
    rank_scale: tl.tensor,
    start: tl.tensor,
    col: tl.tensor,
    width: tl.tensor,
    RANKS: tl.constexpr,
    EVEN: tl.constexpr,
) -> tl.tensor:
    """RANKS ranks of `rank_scale * down`, those of all bands one after the other, from `start` on: (RANKS, COLS)."""
    index = start + tl.arange(0, RANKS)
    factor = tl.load(down + index[:, None] * width + col[None, :], mask=(col < width)[None, :] | EVEN, other=0.0)
    return (factor.to(tl.float32) * tl.load(rank_scale + index)[:, None]).to(factor.dtype)


@triton.jit
def _add_later_ranks(
    tile: tl.tensor,
    up: tl.tensor,
    down: tl.tensor,
    rank_scale: tl.tensor,
    row: tl.tensor,
    col: tl.tensor,
    band: tl.tensor,
    width: tl.tensor,
    rank: tl.tensor,
    RANKS: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
) -> tl.tensor:
    """`tile` and the terms of all ranks after the first RANKS; `rank` is a multiple of RANKS."""
    for start in range(RANKS, rank, RANKS):
        left = _up_tile(up, row, start, rank, RANKS)
        right = _down_tile(down, rank_scale, band * rank + start, col, width, RANKS, EVEN)
        tile = tl.dot(left, right, tile, input_precision=PRECISION)
    return tile


@triton.jit
def rounded(tile: tl.tensor, dtype: tl.constexpr, OUTPUT: tl.constexpr) -> tl.tensor:
    """`tile` in the type of the output."""
    if OUTPUT == "int8":
        return (tl.clamp(tile, -127.0, 127.0) + _ROUND_MAGIC).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        # a conversion to fp8 saturates at 448 and keeps NaN
        tl.static_assert((OUTPUT == "fp8") | (OUTPUT == "float"))
        return tile.to(dtype)


@triton.jit(do_not_specialize_on_alignment=["band_rows", "tiles_each"])
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
    band_rows: tl.tensor,
    out_stride: tl.tensor,
    tiles_each: tl.tensor,
    FAMILY: tl.constexpr,
    FORMAT: tl.constexpr,
    BYTES: tl.constexpr,
    OUTPUT: tl.constexpr,
    RANKS: tl.constexpr,
    LATER_RANKS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
) -> None:
    """Write `tiles_each` tiles of W_eff, each below the last, into `out` (rows, width) as float, fp8 or int8."""
    tiles = tl.cdiv(width, COLS)
    first = tl.program_id(0) % tiles * COLS
    band, begin, stop = band_place(tl.program_id(0) // tiles, rows, band_rows, tiles_each * ROWS)
    col = first + tl.arange(0, COLS)
    if up is not None:
        right = _down_tile(down, rank_scale, band * rank, col, width, RANKS, EVEN)
    SHORT: tl.constexpr = in_halves(OUTPUT, FAMILY)
    for index in tl.range(0, tiles_each, num_stages=STAGES):  # no loop at all where there is one tile
        wanted = begin + index * ROWS + tl.arange(0, ROWS)
        row = tl.minimum(wanted, stop - 1)
        # loads first, as in the tile loaders
        if up is not None:
            left = _up_tile(up, row, 0, rank, RANKS)
        if OUTPUT != "float":
            unit = tl.load(row_scale + row)
        tile = base_tile(
            codes, scale, nested_scale, nested_offset, levels, nested_levels, row_scale if SHORT else None,
            begin + index * ROWS, stop, first, stored_width, row_bytes,
            FAMILY, FORMAT, BYTES, ROWS, COLS, EVEN, 0,
        )  # fmt: skip
        if up is not None:
            added = tl.zeros((ROWS, COLS), tl.float32) if SHORT else tile
            added = tl.dot(left, right, added, input_precision=PRECISION)
            if LATER_RANKS:
                added = _add_later_ranks(
                    added, up, down, rank_scale, row, col, band, width, rank, RANKS, PRECISION, EVEN
                )
            tile = tl.fma(added, (1.0 / unit)[:, None], tile.to(tl.float32)) if SHORT else added
        if OUTPUT != "float" and not SHORT:
            tile *= tl.div_rn(1.0, unit)[:, None]
        value = rounded(tile, out.dtype.element_ty, OUTPUT)
        pointer = out + wanted.to(tl.int64)[:, None] * out_stride + col[None, :]
        tl.store(pointer, value, mask=(wanted < stop)[:, None] & (col < width)[None, :])


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
    band_rows: tl.tensor,
    FAMILY: tl.constexpr,
    FORMAT: tl.constexpr,
    BYTES: tl.constexpr,
    LARGEST: tl.constexpr,
    RANKS: tl.constexpr,
    LATER_RANKS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
) -> None:
    """Write largest |W_eff| / LARGEST for ROWS rows, or 1 where that is no normal float32."""
    band, begin, stop = band_place(tl.program_id(0), rows, band_rows, ROWS)
    wanted = begin + tl.arange(0, ROWS)
    row = tl.minimum(wanted, stop - 1)
    largest = tl.zeros((ROWS, COLS), tl.float32)
    if up is not None:
        left = _up_tile(up, row, 0, rank, RANKS)
    for first in tl.range(0, width, COLS, num_stages=STAGES):
        col = first + tl.arange(0, COLS)
        tile = base_tile(
            codes, scale, nested_scale, nested_offset, levels, nested_levels, None,
            begin, stop, first, stored_width, row_bytes,
            FAMILY, FORMAT, BYTES, ROWS, COLS, EVEN, 0,
        )  # fmt: skip
        if up is not None:
            right = _down_tile(down, rank_scale, band * rank, col, width, RANKS, EVEN)
            tile = tl.dot(left, right, tile, input_precision=PRECISION)
            if LATER_RANKS:
                tile = _add_later_ranks(tile, up, down, rank_scale, row, col, band, width, rank, RANKS, PRECISION, EVEN)
        largest = tl.maximum(largest, tl.abs(tile))
    unit = tl.div_rn(tl.max(largest, axis=1), tl.full((ROWS,), LARGEST, tl.float32))
    tl.store(row_scale + wanted, tl.where(unit >= 1.1754943508222875e-38, unit, 1.0), mask=wanted < stop)
