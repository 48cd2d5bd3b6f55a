"""Tiles of nf4, fp4 and their -dq forms, laid out as in `formats/four_bit.py`; rows must hold whole blocks of 64.

A byte holds two neighbours, the earlier in its high four bits. Codes are read as words of eight, each word once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gossamer.kernels.decode_tiles import in_row_units, load_byte, look_up, row_starts, steps, tile_rows, whole


@triton.jit
def four_bit_tile(
    codes: tl.tensor,
    absmax: tl.tensor,
    nested_scale: tl.tensor,
    nested_offset: tl.tensor,
    levels: tl.tensor,
    nested_levels: tl.tensor,
    units: tl.tensor,
    begin: tl.tensor,
    rows: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    NESTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EVEN: tl.constexpr,
    RUN: tl.constexpr,
) -> tl.tensor:
    """w = levels[code] * absmax[block]; absmax = nested_levels[absmax] * nested_scale + nested_offset when NESTED."""
    word = first // 8 + steps(COLS // 8)
    words = row_starts(codes.to(tl.pointer_type(tl.int32)), begin, rows, width // 8, ROWS)
    packed = tl.load(words[:, None] + word[None, :], mask=whole(word * 8, width, EVEN)[None, :], other=0)
    group = first // 64 + steps(COLS // 64)
    inside = whole(group * 64, width, EVEN)[None, :]
    block = row_starts(absmax, begin, rows, width // 64, ROWS)[:, None] + group[None, :]
    if NESTED:
        difference = tl.load(nested_levels + load_byte(block, inside).to(tl.int32))
        number = (begin + tile_rows(begin, rows, ROWS)).to(tl.int64)[:, None] * (width // 64) + group[None, :]
        largest = difference * tl.load(nested_scale + number // 256, mask=inside, other=0.0)
        largest += tl.load(nested_offset)
    else:
        largest = tl.load(block, mask=inside, other=0.0)

    # bytes come lowest first, and in a byte the high four bits: shifts 4, 0, 12, 8, ...
    place = steps(8)[None, None, :] ^ 1
    value = look_up(levels, packed[:, :, None] >> (place * 4), units is not None, RUN)
    value = tl.reshape(value, (ROWS, COLS // 64, 64))
    scale = in_row_units(largest, units, begin, rows).to(value.dtype)
    return tl.reshape(value * scale[:, :, None], (ROWS, COLS))
