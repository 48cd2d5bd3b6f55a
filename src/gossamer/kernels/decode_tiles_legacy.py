"""Tiles of the GGUF types with blocks of 32: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and IQ4_NL.

Layouts are tabled in `formats/gguf/legacy.py` and `formats/gguf/iq4.py`. A tile is worked on as (ROWS, blocks, 32), so
that a scale is read once a thread and block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gossamer.kernels.decode_tiles import (
    block_starts,
    bytes_of,
    exact_float,
    load_half,
    load_words,
    look_up,
    parts_inside,
    steps,
)


@triton.jit
def nibbles(start: tl.tensor, inside: tl.tensor, WORD: tl.constexpr) -> tl.tensor:
    """32 codes from 16 bytes at `start` (ROWS, blocks), int32: low nibbles first, then the high ones."""
    low = load_words(start, inside, 16 // WORD, WORD).to(tl.int32)
    both = (low[:, :, None, :] >> (steps(2) * 4)[None, None, :, None]) & 0x0F0F0F0F
    return tl.reshape(bytes_of(both, WORD), (start.shape[0], start.shape[1], 32))


@triton.jit
def _fifth_bits(start: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Bit i of the four bytes at `start` (ROWS, blocks) as bit 4 of element i: int32 (ROWS, blocks, 32)."""
    half = start.to(tl.pointer_type(tl.uint16))
    low = tl.load(half, mask=inside, other=0).to(tl.int32)
    bits = low | (tl.load(half + 1, mask=inside, other=0).to(tl.int32) << 16)
    return ((bits[:, :, None] >> steps(32)[None, None, :]) & 1) << 4


@triton.jit
def legacy_tile(
    blocks: tl.tensor,
    levels: tl.tensor,
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
    block = block_starts(blocks, begin, rows, first, row_bytes, 32, 32, BYTES, ROWS, COLS)
    inside = parts_inside(first, width, 32, COLS, EVEN)
    unit = load_half(block, inside)
    with_minimum: tl.constexpr = (FORMAT == "Q4_1") | (FORMAT == "Q5_1")
    if with_minimum:
        minimum = load_half(block + 2, inside)
    # codes have indices of their own
    block = block_starts(blocks, begin, rows, first, row_bytes, 32, 32, BYTES, ROWS, COLS)
    inside = parts_inside(first, width, 32, COLS, EVEN)
    # the blocks with a minimum are multiples of four bytes
    WORD: tl.constexpr = 4 if with_minimum else 2
    if FORMAT == "Q4_0":
        code, OFFSET = nibbles(block + 2, inside, WORD), 8
    elif FORMAT == "Q4_1":
        code, OFFSET = nibbles(block + 4, inside, WORD), 0
    elif FORMAT == "IQ4_NL":
        code, OFFSET = nibbles(block + 2, inside, WORD), 0
    elif FORMAT == "Q8_0":
        code, OFFSET = bytes_of(load_words(block + 2, inside, 16, WORD).to(tl.int32), WORD).to(tl.int8), 0
    else:
        tl.static_assert((FORMAT == "Q5_0") | (FORMAT == "Q5_1"))
        START: tl.constexpr = 4 if with_minimum else 2
        code = nibbles(block + START + 4, inside, WORD)
        again = block_starts(blocks, begin, rows, first, row_bytes, 32, 32, BYTES, ROWS, COLS)
        code |= _fifth_bits(again + START, parts_inside(first, width, 32, COLS, EVEN))
        OFFSET = 0 if with_minimum else 16
    if FORMAT == "IQ4_NL":
        value = look_up(levels, code, RUN)
    elif FORMAT == "Q8_0":
        value = code.to(tl.float32)
    else:
        value = exact_float(code, OFFSET)
    weight = value * unit.to(tl.float32)[:, :, None]
    if with_minimum:
        weight += minimum.to(tl.float32)[:, :, None]
    return tl.reshape(weight, (ROWS, COLS))
