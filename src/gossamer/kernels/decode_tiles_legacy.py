"""Tiles of the GGUF types with blocks of 32: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and IQ4_NL.

Layouts are tabled in `formats/gguf/legacy.py` and `formats/gguf/iq4.py`. A tile is worked on as (ROWS, blocks, 32), so
that a scale is read once a thread and block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gossamer.kernels.decode_tiles import (
    block_starts,
    byte_values,
    in_row_units,
    load_half,
    load_long_words,
    look_up,
    parts_inside,
    steps,
    word_bytes,
)


@triton.jit
def nibbles(word: tl.tensor) -> tl.tensor:
    """Low four bits of all bytes of int32 words (ROWS, blocks, words), then high ones: (ROWS, blocks, 2, words)."""
    return (word[:, :, None, :] >> (steps(2) * 4)[None, None, :, None]) & 0x0F0F0F0F


@triton.jit
def nibble_levels(
    levels: tl.tensor, word: tl.tensor, WORD: tl.constexpr, SHORT: tl.constexpr, RUN: tl.constexpr
) -> tl.tensor:
    """`look_up` of the nibbles of words of WORD bytes (ROWS, blocks, words), low ones first: (ROWS, blocks, 32)."""
    place = (steps(2) * 4)[None, None, :, None, None] + (steps(WORD) * 8)[None, None, None, None, :]
    code = tl.reshape(word[:, :, None, :, None] >> place, (word.shape[0], word.shape[1], 32))
    return look_up(levels, code, SHORT, RUN)


@triton.jit
def _fifth_bits(start: tl.tensor, inside: tl.tensor, WORD: tl.constexpr) -> tl.tensor:
    """Bit i of four bytes at `start` (ROWS, blocks) as bit 4 of byte i: words of WORD bytes (..., 2, words)."""
    half = start.to(tl.pointer_type(tl.uint16))
    low = tl.load(half, mask=inside, other=0).to(tl.int32)
    bits = low | (tl.load(half + 1, mask=inside, other=0).to(tl.int32) << 16)
    place = (steps(2) * 16)[None, None, :, None] + (steps(16 // WORD) * WORD)[None, None, None, :]
    few = (bits[:, :, None, None] >> place) & (15 if WORD == 4 else 3)
    # copies seven bits apart: bit i of the i-th is on its place, and no two bits of all meet
    return (few * 0x02040810) & (0x10101010 if WORD == 4 else 0x1010)


@triton.jit
def legacy_tile(
    blocks: tl.tensor,
    levels: tl.tensor,
    units: tl.tensor,
    begin: tl.tensor,
    rows: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    row_bytes: tl.tensor,
    FORMAT: tl.constexpr,
    BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EVEN: tl.constexpr,
    RUN: tl.constexpr,
) -> tl.tensor:
    """The formula of FORMAT, with blocks of BYTES bytes."""
    SHORT: tl.constexpr = units is not None
    block = block_starts(blocks, begin, rows, first, row_bytes, 32, 32, BYTES, ROWS, COLS)
    inside = parts_inside(first, width, 32, COLS, EVEN)
    unit = load_half(block, inside)
    # the blocks with a minimum are multiples of four bytes
    with_minimum: tl.constexpr = (FORMAT == "Q4_1") | (FORMAT == "Q5_1")
    START: tl.constexpr = 4 if with_minimum else 2
    if with_minimum:
        minimum = load_half(block + 2, inside)
    # codes have indices of their own
    block = block_starts(blocks, begin, rows, first, row_bytes, 32, 32, BYTES, ROWS, COLS)
    inside = parts_inside(first, width, 32, COLS, EVEN)
    WORD: tl.constexpr = word_bytes(with_minimum, RUN)
    if FORMAT == "Q8_0":
        word = load_long_words(block + START, inside, 8, with_minimum, RUN)
        value = byte_values(word ^ -0x7F7F7F80, WORD, 128, SHORT)
    elif FORMAT == "IQ4_NL":
        value = nibble_levels(levels, load_long_words(block + START, inside, 4, with_minimum, RUN), WORD, SHORT, RUN)
    elif (FORMAT == "Q4_0") | (FORMAT == "Q4_1"):
        word = nibbles(load_long_words(block + START, inside, 4, with_minimum, RUN))
        value = byte_values(word, WORD, 0 if with_minimum else 8, SHORT)
    else:
        tl.static_assert((FORMAT == "Q5_0") | (FORMAT == "Q5_1"))
        low = load_long_words(block + START + 4, inside, 4, with_minimum, RUN)
        again = block_starts(blocks, begin, rows, first, row_bytes, 32, 32, BYTES, ROWS, COLS)
        word = nibbles(low) | _fifth_bits(again + START, parts_inside(first, width, 32, COLS, EVEN), WORD)
        value = byte_values(word, WORD, 0 if with_minimum else 16, SHORT)
    value = tl.reshape(value, (ROWS, COLS // 32, 32))
    scale = in_row_units(unit.to(tl.float32), units, begin, rows).to(value.dtype)
    if with_minimum:
        added = in_row_units(minimum.to(tl.float32), units, begin, rows).to(value.dtype)
        # in float32 the product is exact, so a fused sum rounds as two operations do
        weight = tl.fma(value, scale[:, :, None], added[:, :, None])
    else:
        weight = value * scale[:, :, None]
    return tl.reshape(weight, (ROWS, COLS))
