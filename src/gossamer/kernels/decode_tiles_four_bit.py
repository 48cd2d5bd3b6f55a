"""Tiles of nf4, fp4 and their -dq forms, laid out as in `formats/four_bit.py`; rows must hold whole blocks of 64.

A byte holds two neighbours, the earlier in its high four bits. Codes are read as words of eight, each word once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gossamer.kernels.decode_tiles import load_byte, load_levels, look_up, whole


@triton.jit
def four_bit_tile(
    codes: tl.tensor,
    absmax: tl.tensor,
    nested_scale: tl.tensor,
    nested_offset: tl.tensor,
    levels: tl.tensor,
    nested_levels: tl.tensor,
    row: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    NESTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EVEN: tl.constexpr,
) -> tl.tensor:
    """w = levels[code] * absmax[block]; absmax = nested_levels[absmax] * nested_scale + nested_offset when NESTED."""
    table = load_levels(levels)
    word = first // 8 + tl.arange(0, COLS // 8)
    inside = whole(word * 8, width, EVEN)[None, :]
    words = codes.to(tl.pointer_type(tl.int32)) + row.to(tl.int64)[:, None] * (width // 8) + word[None, :]
    packed = tl.load(words, mask=inside, other=0)
    group = first // 64 + tl.arange(0, COLS // 64)
    block = row.to(tl.int64)[:, None] * (width // 64) + group[None, :]
    inside_group = whole(group * 64, width, EVEN)[None, :]
    if NESTED:
        difference = tl.load(nested_levels + load_byte(absmax + block, inside_group).to(tl.int32))
        largest = difference * tl.load(nested_scale + block // 256, mask=inside_group, other=0.0)
        largest += tl.load(nested_offset)
    else:
        largest = tl.load(absmax + block, mask=inside_group, other=0.0)

    # bytes come lowest first, and in a byte the high four bits: shifts 4, 0, 12, 8, ...
    place = tl.arange(0, 8)[None, None, :] ^ 1
    value = look_up(table, (packed[:, :, None] >> (place * 4)) & 15)
    return tl.reshape(tl.reshape(value, (ROWS, COLS // 64, 64)) * largest[:, :, None], (ROWS, COLS))
