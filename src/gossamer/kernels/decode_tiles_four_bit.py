"""Tiles of nf4, fp4 and their -dq forms, laid out as in `formats/four_bit.py`; rows must hold whole blocks of 64.

A byte holds two neighbours, the earlier in its high four bits. Codes are read as words of eight, each word once.

With terms and towards fp8 a thread finds its levels itself: sixteen float16 are eight words of constants, whose bytes
an instruction selects four at a time. So any layout will do; without terms `look_up` is faster.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl

from gossamer.formats.four_bit import VALUES
from gossamer.kernels.decode_tiles import in_row_units, load_byte, look_up, row_starts, steps, tile_rows, whole


def _table(kind: str) -> list[str]:
    """Sixteen float16 as eight words: low bytes of values 0 to 3, 4 to 7, 8 to 11, 12 to 15, then their high bytes."""
    values = [struct.pack("<e", value) for value in VALUES[kind]]
    words = b"".join(bytes(value[place] for value in values) for place in range(2))
    return [f"0x{word:08x}" for word in struct.unpack("<8I", words)]


def _selection(kind: str) -> str:
    """PTX: the float16 of the eight codes in the word $4, two a register, in the order in which they are stored.

    The low three bits of four codes select bytes from half of the table; the fourth bit decides between the halves: a
    permutation that copies signs makes a mask of it, where every other code has been moved up to the sign's place.
    """
    table = _table(kind)
    lines = [".reg .b32 codes, next, fourth, first, second, low, high;"]
    lines += ["and.b32 codes, $4, 0x77777777;", "shl.b32 next, $4, 4;"]
    for half, signs in enumerate(("0xd9c8", "0xfbea")):
        lines += [f"prmt.b32 fourth, next, $4, {signs};"] + ["shr.b32 codes, codes, 16;"] * half
        for name, (a, b, c, d) in (("low", table[:4]), ("high", table[4:])):
            lines += [f"mov.b32 first, {a};", f"prmt.b32 first, first, {b}, codes;"]
            lines += [f"mov.b32 second, {c};", f"prmt.b32 second, second, {d}, codes;"]
            lines += [f"lop3.b32 {name}, fourth, second, first, 0xca;"]
        lines += [f"prmt.b32 ${2 * half}, low, high, 0x4051;", f"prmt.b32 ${2 * half + 1}, low, high, 0x6273;"]
    return f"{{ {' '.join(lines)} }}"


_SELECT_NF4 = tl.constexpr(_selection("nf4"))
_SELECT_FP4 = tl.constexpr(_selection("fp4"))


@triton.jit
def _selected(packed: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Levels, float16 (ROWS, words, 8), of the codes of words (ROWS, words); a thread has whole words."""
    SELECT: tl.constexpr = _SELECT_NF4 if (FORMAT == "nf4") | (FORMAT == "nf4-dq") else _SELECT_FP4
    return tl.inline_asm_elementwise(
        SELECT,
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r",
        [packed[:, :, None] + (steps(8)[None, None, :] & 0)],  # the word itself, once for each of its codes
        dtype=tl.float16,
        is_pure=True,
        pack=8,
    )


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
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EVEN: tl.constexpr,
    RUN: tl.constexpr,
) -> tl.tensor:
    """w = levels[code] * absmax[block]; absmax = nested_levels[absmax] * nested_scale + nested_offset where nested.

    `levels` as `look_up` takes them, or None: the thread then selects them itself.
    """
    word = first // 8 + steps(COLS // 8)
    words = row_starts(codes.to(tl.pointer_type(tl.int32)), begin, rows, width // 8, ROWS)
    packed = tl.load(words[:, None] + word[None, :], mask=whole(word * 8, width, EVEN)[None, :], other=0)
    group = first // 64 + steps(COLS // 64)
    inside = whole(group * 64, width, EVEN)[None, :]
    block = row_starts(absmax, begin, rows, width // 64, ROWS)[:, None] + group[None, :]
    if nested_levels is not None:
        difference = tl.load(nested_levels + load_byte(block, inside).to(tl.int32))
        number = (begin + tile_rows(begin, rows, ROWS)).to(tl.int64)[:, None] * (width // 64) + group[None, :]
        largest = difference * tl.load(nested_scale + number // 256, mask=inside, other=0.0)
        largest += tl.load(nested_offset)
    else:
        largest = tl.load(block, mask=inside, other=0.0)

    if levels is None:
        value = _selected(packed, FORMAT)
    else:
        # bytes come lowest first, and in a byte the high four bits: shifts 4, 0, 12, 8, ...
        place = steps(8)[None, None, :] ^ 1
        value = look_up(levels, packed[:, :, None] >> (place * 4), units is not None, RUN)
    value = tl.reshape(value, (ROWS, COLS // 64, 64))
    scale = in_row_units(largest, units, begin, rows).to(value.dtype)
    return tl.reshape(value * scale[:, :, None], (ROWS, COLS))
