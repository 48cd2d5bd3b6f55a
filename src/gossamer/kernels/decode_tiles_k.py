"""Tiles of the GGUF types with super-blocks of 256: Q2_K, Q3_K, Q4_K, Q5_K, Q6_K and IQ4_XS.

Layouts are tabled in `formats/gguf/k_unpack.py`, `k_scales.py` and `iq4.py`. A tile is worked on as (ROWS, sub-blocks,
16 or 32), so that a sub-block's scale is put together once a thread and sub-block. COLS may be a part of a super-block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gossamer.kernels.decode_tiles import (
    bytes_of,
    exact_float,
    load_byte,
    load_half,
    load_levels,
    load_words,
    look_up,
    row_starts,
    whole,
    word_starts,
)
from gossamer.kernels.decode_tiles_legacy import nibbles


@triton.jit
def _q4_scales(block: tl.tensor, sub: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Six-bit scales and minimums (ROWS, subs) of Q4_K and Q5_K, times d and dmin: both float32."""
    first = load_byte(block + 4 + sub % 4, inside)
    second = load_byte(block + 8 + sub % 4, inside)
    last = load_byte(block + 12 + sub % 4, inside)
    unit, minimum_unit = load_half(block, inside), load_half(block + 2, inside)
    first, second, last = first.to(tl.int32), second.to(tl.int32), last.to(tl.int32)
    early = sub < 4
    scale = tl.where(early, first & 63, (last & 15) | ((first >> 2) & 48))
    minimum = tl.where(early, second & 63, (last >> 4) | ((second >> 2) & 48))
    return exact_float(scale, 0) * unit.to(tl.float32), exact_float(minimum, 0) * minimum_unit.to(tl.float32)


@triton.jit
def _q3_scale(block: tl.tensor, sub: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Six-bit scales (ROWS, subs) of Q3_K less 32, times d: float32."""
    low, high = load_byte(block + 96 + sub % 8, inside), load_byte(block + 104 + sub % 4, inside)
    unit = load_half(block + 108, inside)
    scale = ((low.to(tl.int32) >> (sub // 8 * 4)) & 15) | (((high.to(tl.int32) >> (sub // 4 * 2)) & 3) << 4)
    return exact_float(scale, 32) * unit.to(tl.float32)


@triton.jit
def k16_tile(
    blocks: tl.tensor,
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
    """Q2_K, Q3_K and Q6_K: sub-blocks of 16."""
    group = first // 16 + tl.arange(0, COLS // 16)
    inside = whole(group * 16, width, EVEN)[None, :]
    block = row_starts(blocks, row, row_bytes)[:, None] + (group // 16 * BYTES)[None, :]
    sub = (group % 16)[None, :]
    # 32 bytes hold a field of 32 elements; a half of the super-block has four fields
    half, field = (sub // 8)[:, :, None], (sub % 8 // 2)[:, :, None]
    upper = (sub % 2 * 16)[:, :, None]
    if FORMAT == "Q2_K":
        word = load_words(block, 16 + half * 32 + upper + word_starts(16, 4), inside, 4)
        packed = load_byte(block + sub, inside)
        unit, minimum_unit = load_half(block + 80, inside), load_half(block + 82, inside)
        packed = packed.to(tl.int32)
        scale = exact_float(packed & 15, 0) * unit.to(tl.float32)
        minimum = exact_float(packed >> 4, 0) * minimum_unit.to(tl.float32)
        word = (word >> (field * 2)) & 0x03030303
        weight = exact_float(bytes_of(word, 4), 0) * scale[:, :, None] - minimum[:, :, None]
    elif FORMAT == "Q3_K":
        byte = upper + word_starts(16, 2)
        high, low = load_words(block, byte, inside, 2), load_words(block, 32 + half * 32 + byte, inside, 2)
        scale = _q3_scale(block, sub, inside)
        low, high = low.to(tl.int32), high.to(tl.int32)
        word = ((low >> (field * 2)) & 0x0303) | (((high >> (half * 4 + field)) & 0x0101) << 2)
        weight = exact_float(bytes_of(word, 2), 4) * scale[:, :, None]
    else:
        tl.static_assert(FORMAT == "Q6_K")
        byte = upper + word_starts(16, 2)
        low = load_words(block, half * 64 + field % 2 * 32 + byte, inside, 2)
        high = load_words(block, 128 + half * 32 + byte, inside, 2)
        code, unit = load_byte(block + 192 + sub, inside), load_half(block + 208, inside)
        low, high = low.to(tl.int32), high.to(tl.int32)
        scale = code.to(tl.int8, bitcast=True).to(tl.float32) * unit.to(tl.float32)
        word = ((low >> (field // 2 * 4)) & 0x0F0F) | (((high >> (field * 2)) & 0x0303) << 4)
        weight = exact_float(bytes_of(word, 2), 32) * scale[:, :, None]
    return tl.reshape(weight, (ROWS, COLS))


@triton.jit
def k32_tile(
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
    """Q4_K, Q5_K and IQ4_XS: sub-blocks of 32."""
    group = first // 32 + tl.arange(0, COLS // 32)
    inside = whole(group * 32, width, EVEN)[None, :]
    block = row_starts(blocks, row, row_bytes)[:, None] + (group // 8 * BYTES)[None, :]
    sub = (group % 8)[None, :]
    if FORMAT == "IQ4_XS":
        table = load_levels(levels)
        low, high = load_byte(block + 4 + sub // 2, inside), load_byte(block + 2 + sub // 4, inside)
        unit = load_half(block, inside)
        word = nibbles(block + 8 + sub * 16, inside, 4)
        code = ((low.to(tl.int32) >> (sub % 2 * 4)) & 15) | (((high.to(tl.int32) >> (sub % 4 * 2)) & 3) << 4)
        scale = exact_float(code, 32) * unit.to(tl.float32)
        weight = look_up(table, bytes_of(word, 4)) * scale[:, :, None]
    else:
        tl.static_assert((FORMAT == "Q4_K") | (FORMAT == "Q5_K"))
        start: tl.constexpr = 16 if FORMAT == "Q4_K" else 48
        byte = word_starts(32, 4)
        word = load_words(block, start + (sub // 2 * 32)[:, :, None] + byte, inside, 4)
        if FORMAT == "Q5_K":
            high = load_words(block, 16 + byte, inside, 4)
        scale, minimum = _q4_scales(block, sub, inside)
        word = (word >> (sub % 2 * 4)[:, :, None]) & 0x0F0F0F0F
        if FORMAT == "Q5_K":
            word |= ((high >> sub[:, :, None]) & 0x01010101) << 4
        weight = exact_float(bytes_of(word, 4), 0) * scale[:, :, None] - minimum[:, :, None]
    return tl.reshape(weight, (ROWS, COLS))
