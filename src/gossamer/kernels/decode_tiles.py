"""What the tile loaders of every storage format share: masks, exact small integers, half-precision scales.

A loader returns the float32 weights (ROWS, COLS) of the tile whose rows are `row` (already clamped to the matrix) and
whose first column is `first`, a multiple of COLS. It rounds in the same places as the reference in `gossamer.formats`,
so both agree bit for bit when kernels are compiled with `enable_fp_fusion=False`.

Codes are read as words of WORD bytes, as large as the alignment of the block allows, and masked and combined a word at
a time; bytes are taken apart last. Words are addressed in the order in which their elements are written, so that a
thread's values lie next to each other in the stored block and in the output. A byte that holds elements of several
sub-blocks is read several times, from L1 after the first.

Everything is loaded, in the type that it has in memory, before anything is converted. A change of layout happens where
a value is first used; it is a barrier, and no load begins above one: where loads and arithmetic alternate, a tile waits
for memory once a load.
"""

from __future__ import annotations

import triton
import triton.language as tl

# 2^23: the float32 whose lowest fraction bit is worth 1, so that OR-ing a small integer into it adds that integer
_MAGIC_BITS = tl.constexpr(0x4B000000)
_MAGIC = tl.constexpr(8388608.0)


@triton.jit
def whole(start: tl.tensor, width: tl.tensor, EVEN: tl.constexpr) -> tl.tensor:
    """Which elements or blocks, by their first column, lie inside the matrix; all of them when COLS divides it."""
    if EVEN:
        return tl.full(start.shape, True, tl.int1)
    else:
        return start < width


@triton.jit
def row_starts(blocks: tl.tensor, row: tl.tensor, row_bytes: tl.tensor) -> tl.tensor:
    """Pointers (ROWS,) to the first byte of each row, in 64 bits: a matrix may be larger than 2 GiB."""
    return blocks + row.to(tl.int64) * row_bytes


@triton.jit
def exact_float(code: tl.tensor, OFFSET: tl.constexpr) -> tl.tensor:
    """`code - OFFSET` as float32 for int32 codes 0..2^22: one OR and one subtraction, cheaper than a conversion."""
    return (code | _MAGIC_BITS).to(tl.float32, bitcast=True) - (_MAGIC + OFFSET)


@triton.jit
def load_half(pointer: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """The float16 at an even byte address."""
    return tl.load(pointer.to(tl.pointer_type(tl.float16)), mask=mask, other=0.0)


@triton.jit
def load_byte(pointer: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """A byte, 0..255."""
    return tl.load(pointer, mask=mask, other=0)


@triton.jit
def load_words(start: tl.tensor, offset: tl.tensor, inside: tl.tensor, WORD: tl.constexpr) -> tl.tensor:
    """Words of WORD bytes at `start` (ROWS, subs) + `offset` (1, subs or 1, words): (ROWS, subs, words)."""
    if WORD == 4:
        pointer = (start[:, :, None] + offset).to(tl.pointer_type(tl.int32))
    else:
        tl.static_assert(WORD == 2)
        pointer = (start[:, :, None] + offset).to(tl.pointer_type(tl.uint16))
    return tl.load(pointer, mask=inside[:, :, None], other=0)


@triton.jit
def word_starts(LENGTH: tl.constexpr, WORD: tl.constexpr) -> tl.tensor:
    """Byte offsets (1, 1, words) of the words of LENGTH bytes."""
    return tl.arange(0, LENGTH // WORD)[None, None, :] * WORD


@triton.jit
def bytes_of(word: tl.tensor, WORD: tl.constexpr) -> tl.tensor:
    """The bytes of int32 words (ROWS, subs, words), lowest first: int32 (ROWS, subs, words * WORD)."""
    each = (word[:, :, :, None] >> (tl.arange(0, WORD) * 8)[None, None, None, :]) & 255
    return tl.reshape(each, (word.shape[0], word.shape[1], word.shape[2] * WORD))


@triton.jit
def load_levels(levels: tl.tensor) -> tl.tensor:
    """The table of `look_up`: sixteen float32 values."""
    return tl.load(levels + tl.arange(0, 16))


@triton.jit
def look_up(table: tl.tensor, code: tl.tensor) -> tl.tensor:
    """Values of a table of sixteen, by codes 0..15 of any shape.

    A gather goes through shared memory: its addresses have 32 bits, which saves two instructions an element.
    """
    flat = tl.reshape(code, (code.numel,))
    return tl.reshape(tl.gather(table, flat, 0), code.shape)
