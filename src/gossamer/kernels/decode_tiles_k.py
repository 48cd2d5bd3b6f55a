"""Tiles of the GGUF types with super-blocks of 256: Q2_K, Q3_K, Q4_K, Q5_K, Q6_K and IQ4_XS.

Layouts are tabled in `formats/gguf/k_unpack.py`, `k_scales.py` and `iq4.py`. Codes are taken apart as (ROWS, parts,
fields, 32), where the fields of a part share their bytes, and scaled as (ROWS, sub-blocks, 16 or 32), so that a
sub-block's scale is put together once a thread and sub-block. COLS may be a part of a super-block, 128 at least.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gossamer.kernels.decode_tiles import (
    block_starts,
    byte_value,
    byte_values,
    exact_float,
    in_row_units,
    load_byte,
    load_half,
    load_words,
    parts_inside,
    steps,
    word_bytes,
)
from gossamer.kernels.decode_tiles_legacy import nibble_levels, nibbles


@triton.jit
def _part(first: tl.tensor, SIZE: tl.constexpr, COLS: tl.constexpr) -> tl.tensor:
    """Number in its super-block (1, parts) of each part of SIZE columns."""
    return ((first // SIZE + steps(COLS // SIZE)) % (256 // SIZE))[None, :]


@triton.jit
def _load_pair(pointer: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """The eight bytes at an address that is a multiple of eight."""
    return tl.load(pointer.to(tl.pointer_type(tl.int64)), mask=mask, other=0)


@triton.jit
def _half_of(word: tl.tensor) -> tl.tensor:
    """The float16 in the low 16 bits of an integer, as float32."""
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _q4_scales(
    early: tl.tensor, late: tl.tensor, pair: tl.tensor, units: tl.tensor, begin: tl.tensor, rows: tl.tensor
) -> tl.tensor:
    """Six-bit scales and minimums (ROWS, pairs, 2) of Q4_K and Q5_K, times d and dmin: both float32.

    `early` and `late` are the two halves of the first sixteen bytes of the super-block: d, dmin and twelve bytes.
    Both sub-blocks of a pair are worked on at once, in the two low bytes of a word.
    """
    place = pair % 2 * 16
    first, second = (early >> 32).to(tl.int32) >> place, late.to(tl.int32) >> place
    last = (late >> 32).to(tl.int32) >> place
    low = pair < 2
    scale = tl.where(low, first & 0x3F3F, (last & 0x0F0F) | ((first >> 2) & 0x3030))
    minimum = tl.where(low, second & 0x3F3F, ((last >> 4) & 0x0F0F) | ((second >> 2) & 0x3030))
    unit = in_row_units(_half_of(early), units, begin, rows)
    minimum_unit = in_row_units(_half_of(early.to(tl.int32) >> 16), units, begin, rows)
    which = steps(2)[None, None, :]
    scale, minimum = byte_value(scale[:, :, None], which, 0, False), byte_value(minimum[:, :, None], which, 0, False)
    return scale * unit[:, :, None], minimum * minimum_unit[:, :, None]


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
    """Q2_K, Q3_K and Q6_K: sub-blocks of 16."""
    SHORT: tl.constexpr = units is not None
    WORD: tl.constexpr = word_bytes(FORMAT == "Q2_K", RUN)
    block = block_starts(blocks, begin, rows, first, row_bytes, 16, 256, BYTES, ROWS, COLS)
    sub, inside = _part(first, 16, COLS), parts_inside(first, width, 16, COLS, EVEN)
    # a half of the super-block has four fields of 32 elements
    start = block_starts(blocks, begin, rows, first, row_bytes, 128, 256, BYTES, ROWS, COLS)
    half, inside_half = _part(first, 128, COLS), parts_inside(first, width, 128, COLS, EVEN)
    field = steps(4)[None, None, :, None]
    if FORMAT == "Q2_K":
        word = load_words(start + 16 + half * 32, inside_half, 8, True, RUN)
        packed = load_byte(block + sub, inside).to(tl.int32)
        unit, minimum_unit = load_half(block + 80, inside), load_half(block + 82, inside)
        scale = exact_float(packed & 15, 0) * in_row_units(unit.to(tl.float32), units, begin, rows)
        minimum = exact_float(packed >> 4, 0) * in_row_units(minimum_unit.to(tl.float32), units, begin, rows)
        value = byte_values((word[:, :, None, :] >> (field * 2)) & 0x03030303, WORD, 0, SHORT)
        value = tl.reshape(value, (ROWS, COLS // 16, 16))
        # in float32 the product is exact, so a fused sum rounds as two operations do
        weight = tl.fma(value, scale.to(value.dtype)[:, :, None], -minimum.to(value.dtype)[:, :, None])
    elif FORMAT == "Q3_K":
        low = load_words(start + 32 + half * 32, inside_half, 8, False, RUN)
        again = block_starts(blocks, begin, rows, first, row_bytes, 128, 256, BYTES, ROWS, COLS)
        high = load_words(again, parts_inside(first, width, 128, COLS, EVEN), 8, False, RUN)
        scale = in_row_units(_q3_scale(block, sub, inside), units, begin, rows)
        bit = _part(first, 128, COLS)[:, :, None, None] * 4 + field
        word = (low[:, :, None, :] >> (field * 2)) & 0x03030303
        word |= ((high[:, :, None, :] >> bit) & 0x01010101) << 2
        value = tl.reshape(byte_values(word, WORD, 4, SHORT), (ROWS, COLS // 16, 16))
        weight = value * scale.to(value.dtype)[:, :, None]
    else:
        tl.static_assert(FORMAT == "Q6_K")
        # 32 bytes have the low four bits of two fields, two fields apart
        quarter = _part(first, 64, COLS)
        pairs = block_starts(blocks, begin, rows, first, row_bytes, 64, 256, BYTES, ROWS, COLS)
        low = load_words(pairs + quarter * 32, parts_inside(first, width, 64, COLS, EVEN), 8, False, RUN)
        high = load_words(start + 128 + half * 32, inside_half, 8, False, RUN)
        code, unit = load_byte(block + 192 + sub, inside), load_half(block + 208, inside)
        scale = code.to(tl.int8, bitcast=True).to(tl.float32) * unit.to(tl.float32)
        scale = in_row_units(scale, units, begin, rows)
        low = tl.reshape(low, (ROWS, COLS // 128, 1, 2, 32 // WORD)) >> (steps(2) * 4)[None, None, :, None, None]
        low = tl.reshape(low & 0x0F0F0F0F, (ROWS, COLS // 128, 4, 32 // WORD))
        word = low | (((high[:, :, None, :] >> (field * 2)) & 0x03030303) << 4)
        value = tl.reshape(byte_values(word, WORD, 32, SHORT), (ROWS, COLS // 16, 16))
        weight = value * scale.to(value.dtype)[:, :, None]
    return tl.reshape(weight, (ROWS, COLS))


@triton.jit
def k32_tile(
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
    """Q4_K, Q5_K and IQ4_XS: sub-blocks of 32."""
    SHORT: tl.constexpr = units is not None
    if FORMAT == "IQ4_XS":
        block = block_starts(blocks, begin, rows, first, row_bytes, 32, 256, BYTES, ROWS, COLS)
        sub, inside = _part(first, 32, COLS), parts_inside(first, width, 32, COLS, EVEN)
        start = block_starts(blocks, begin, rows, first, row_bytes, 32, 256, BYTES, ROWS, COLS)
        codes = start + 8 + _part(first, 32, COLS) * 16
        word = load_words(codes, parts_inside(first, width, 32, COLS, EVEN), 4, True, RUN)
        low, high = load_byte(block + 4 + sub // 2, inside), load_byte(block + 2 + sub // 4, inside)
        unit = load_half(block, inside)
        factor = ((low.to(tl.int32) >> (sub % 2 * 4)) & 15) | (((high.to(tl.int32) >> (sub % 4 * 2)) & 3) << 4)
        scale = in_row_units(exact_float(factor, 32) * unit.to(tl.float32), units, begin, rows)
        value = nibble_levels(levels, word, 4, SHORT, RUN)
        weight = value * scale.to(value.dtype)[:, :, None]
    else:
        tl.static_assert((FORMAT == "Q4_K") | (FORMAT == "Q5_K"))
        # 32 bytes have the low four bits of two sub-blocks
        START: tl.constexpr = 16 if FORMAT == "Q4_K" else 48
        pair = block_starts(blocks, begin, rows, first, row_bytes, 64, 256, BYTES, ROWS, COLS) + START
        word = load_words(pair + _part(first, 64, COLS) * 32, parts_inside(first, width, 64, COLS, EVEN), 8, True, RUN)
        if FORMAT == "Q5_K":
            again = block_starts(blocks, begin, rows, first, row_bytes, 64, 256, BYTES, ROWS, COLS)
            high = load_words(again + 16, parts_inside(first, width, 64, COLS, EVEN), 8, True, RUN)
        block = block_starts(blocks, begin, rows, first, row_bytes, 64, 256, BYTES, ROWS, COLS)
        inside = parts_inside(first, width, 64, COLS, EVEN)
        early, late = _load_pair(block, inside), _load_pair(block + 8, inside)
        scale, minimum = _q4_scales(early, late, _part(first, 64, COLS), units, begin, rows)
        word = nibbles(word)
        if FORMAT == "Q5_K":
            bit = _part(first, 64, COLS)[:, :, None, None] * 2 + steps(2)[None, None, :, None]
            word |= ((high[:, :, None, :] >> bit) & 0x01010101) << 4
        value = byte_values(word, 4, 0, SHORT)
        # in float32 the product is exact, so a fused sum rounds as two operations do
        weight = tl.fma(value, scale.to(value.dtype)[:, :, :, None], -minimum.to(value.dtype)[:, :, :, None])
    return tl.reshape(weight, (ROWS, COLS))
