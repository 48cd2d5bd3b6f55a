"""Tiles of the GGUF types with blocks of 32: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and IQ4_NL.

Layouts are tabled in `formats/gguf/legacy.py` and `formats/gguf/iq4.py`. A tile is worked on as (ROWS, blocks, 32), so
that a scale is read once a thread and block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gossamer.kernels.decode_tiles import (
    bytes_of,
    exact_float,
    load_half,
    load_levels,
    load_words,
    look_up,
    row_starts,
    whole,
    word_starts,
)


@triton.jit
def nibbles(start: tl.tensor, inside: tl.tensor, WORD: tl.constexpr) -> tl.tensor:
    """Words of 32 codes from 16 bytes at `start` (ROWS, blocks): low nibbles first, then the high ones."""
    byte = word_starts(32, WORD)
    return (load_words(start, byte % 16, inside, WORD).to(tl.int32) >> (byte // 16 * 4)) & 0x0F0F0F0F


@triton.jit
def _fifth_bits(start: tl.tensor, inside: tl.tensor, WORD: tl.constexpr) -> tl.tensor:
    """Bit i of the four bytes at `start` (ROWS, blocks) as bit 4 of byte i, in words like those of `nibbles`."""
    half = start.to(tl.pointer_type(tl.uint16))
    low = tl.load(half, mask=inside, other=0).to(tl.int32)
    bits = low | (tl.load(half + 1, mask=inside, other=0).to(tl.int32) << 16)
    few = (bits[:, :, None] >> word_starts(32, WORD)) & ((1 << WORD) - 1)
    # copies of the few bits at 4, 11, 18 and 25 put bit k on place 8 * k + 4
    return (few * 0x02040810) & 0x10101010


@triton.jit
def legacy_tile(
    blocks: tl.tensor,
    levels: tl.tensor,
    row: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    row_bytes: tl.tensor,
    FORMAT: tl.constexpr,
    BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EVEN: tl.constexpr,
) -> tl.tensor:
    """The formula of FORMAT, with blocks of BYTES bytes."""
    group = first // 32 + tl.arange(0, COLS // 32)
    inside = whole(group * 32, width, EVEN)[None, :]
    block = row_starts(blocks, row, row_bytes)[:, None] + (group * BYTES)[None, :]
    unit = load_half(block, inside)
    with_minimum: tl.constexpr = (FORMAT == "Q4_1") | (FORMAT == "Q5_1")
    if with_minimum:
        minimum = load_half(block + 2, inside)
    # the blocks with a minimum are multiples of four bytes
    WORD: tl.constexpr = 4 if with_minimum else 2
    if FORMAT == "Q4_0":
        word, OFFSET = nibbles(block + 2, inside, WORD), 8
    elif FORMAT == "Q4_1":
        word, OFFSET = nibbles(block + 4, inside, WORD), 0
    elif FORMAT == "Q5_0":
        word, OFFSET = nibbles(block + 6, inside, WORD) | _fifth_bits(block + 2, inside, WORD), 16
    elif FORMAT == "Q5_1":
        word, OFFSET = nibbles(block + 8, inside, WORD) | _fifth_bits(block + 4, inside, WORD), 0
    elif FORMAT == "IQ4_NL":
        word, OFFSET = nibbles(block + 2, inside, WORD), 0
    else:
        tl.static_assert(FORMAT == "Q8_0")
        # flipping the sign bit turns -128..127 into 0..255
        word, OFFSET = load_words(block, 2 + word_starts(32, WORD), inside, WORD).to(tl.int32) ^ 0x8080, 128
    code = bytes_of(word, WORD)
    value = look_up(load_levels(levels), code) if FORMAT == "IQ4_NL" else exact_float(code, OFFSET)
    weight = value * unit.to(tl.float32)[:, :, None]
    if with_minimum:
        weight += minimum.to(tl.float32)[:, :, None]
    return tl.reshape(weight, (ROWS, COLS))
