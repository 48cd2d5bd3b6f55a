"""What the tile loaders of every storage format share: masks, exact small integers, half-precision scales.

A loader returns the float32 weights (ROWS, COLS) of the tile whose first row is `begin`, of `rows` in all, and whose
first column is `first`, a multiple of COLS. It rounds in the same places as the reference in `gossamer.formats`,
so both agree bit for bit when kernels are compiled with `enable_fp_fusion=False`.

Towards fp8 it is given the `units` of its rows, and returns float16 in these units: codes are exact there too, scales
and results are rounded to eleven bits, and two values share every instruction.

Loaders are written for two languages: Triton, which chooses a layout for each step, and Gluon, where the kernel states
the layout of the weights alone and all others follow from it backwards. An index then has one layout, so every load
makes its own indices with `steps` and `tile_rows`, and none is used for two loads of different shapes.

Codes are read as words of WORD bytes, as large as the alignment of the block allows, and masked and combined a word at
a time; bytes are taken apart last. Words are addressed in the order in which their elements are written, so that a
thread's values lie next to each other in the stored block and in the output. A byte that holds elements of several
sub-blocks is read several times, from L1 after the first.

Everything is loaded, in the type that it has in memory, before anything is converted. A change of layout happens where
a value is first used; it is a barrier, and no load begins above one: where loads and arithmetic alternate, a tile waits
for memory once a load.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import triton
import triton.language as tl
from triton import knobs

# 2^23: the float32 whose lowest fraction bit is worth 1, so that OR-ing a small integer into it adds that integer
_MAGIC_BITS = tl.constexpr(0x4B000000)
_MAGIC = tl.constexpr(8388608.0)
# 2^10: the same for float16 and bytes
_HALF_MAGIC = tl.constexpr(1024.0)


if knobs.runtime.interpret:

    @triton.jit
    def steps(COUNT: tl.constexpr) -> tl.tensor:
        """0 .. COUNT - 1."""
        return tl.arange(0, COUNT)

else:

    @tl.core.builtin
    def steps(count: tl.constexpr, _semantic: Any = None) -> tl.tensor:
        """0 .. count - 1, in Triton and in Gluon, where the layout is left open."""
        count = tl.core._unwrap_if_constexpr(count)
        in_gluon = hasattr(_semantic, "set_auto_layout")
        return _semantic.arange(0, count, None) if in_gluon else _semantic.arange(0, count)


@triton.jit
def tile_rows(begin: tl.tensor, rows: tl.tensor, ROWS: tl.constexpr) -> tl.tensor:
    """The rows (ROWS,) of the tile that begins at row `begin`, counted from there and clamped to the matrix."""
    return tl.minimum(steps(ROWS), rows - 1 - begin)


@triton.jit
def row_starts(base: tl.tensor, begin: tl.tensor, rows: tl.tensor, stride: tl.tensor, ROWS: tl.constexpr) -> tl.tensor:
    """Pointers (ROWS,) to the tile's rows, `stride` elements apart; in 64 bits only where a program's rows share it."""
    return base + begin.to(tl.int64) * stride + tile_rows(begin, rows, ROWS) * stride


@triton.jit
def whole(start: tl.tensor, width: tl.tensor, EVEN: tl.constexpr) -> tl.tensor:
    """Which elements or blocks, by their first column, lie inside the matrix; all of them when COLS divides it."""
    if EVEN:
        return start == start  # folded, and so are the masks
    else:
        return start < width


@triton.jit
def block_starts(
    blocks: tl.tensor,
    begin: tl.tensor,
    rows: tl.tensor,
    first: tl.tensor,
    row_bytes: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> tl.tensor:
    """Pointers (ROWS, parts) to the blocks, of BLOCK elements in BYTES bytes, that hold the parts of SIZE columns."""
    part = first // SIZE + steps(COLS // SIZE)
    return row_starts(blocks, begin, rows, row_bytes, ROWS)[:, None] + (part // (BLOCK // SIZE) * BYTES)[None, :]


@triton.jit
def parts_inside(
    first: tl.tensor, width: tl.tensor, SIZE: tl.constexpr, COLS: tl.constexpr, EVEN: tl.constexpr
) -> tl.tensor:
    """Which parts of SIZE columns (1, parts) lie inside the matrix."""
    return whole((first // SIZE + steps(COLS // SIZE)) * SIZE, width, EVEN)[None, :]


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


@triton.constexpr_function
def word_bytes(aligned: bool, run: int) -> int:
    """Bytes of a word of `load_words`."""
    return 4 if aligned or run else 2


@triton.constexpr_function
def _shifts(count: int) -> str:
    """PTX: `count` words, each from two neighbours of count + 1, by one selection of bytes for all.

    Operands come `count` times each: results, words, the word behind them, the selection.
    """
    word = [f"${count + place}" for place in range(count + 1)]
    return " ".join(f"prmt.b32 ${place}, {word[place]}, {word[place + 1]}, ${3 * count};" for place in range(count))


@triton.constexpr_function
def _shift_operands(count: int, word: str) -> str:
    """The constraints of these operands: `word` is r for words of four bytes, l for those of eight."""
    return ",".join([f"={word}"] * count + [word] * 2 * count + ["r"] * count)


@triton.constexpr_function
def _long_shifts(count: int) -> str:
    """PTX: `count` words of eight bytes from count + 1 neighbours, without the first bytes: 0, 2, 4 or 6 of them.

    Operands come `count` times each: results, words, the word behind them, the number of these bytes.
    """
    halves = [f"half{place}" for place in range(2 * count + 2)]
    words = [*(f"${count + place}" for place in range(count)), f"${2 * count}"]
    out = f"${3 * count}"
    lines = [f".reg .b32 {', '.join(halves)}, by;", ".reg .pred four;"]
    lines += [f"mov.b64 {{{halves[2 * n]}, {halves[2 * n + 1]}}}, {word};" for n, word in enumerate(words)]
    lines += [f"and.b32 by, {out}, 4;", "setp.ne.b32 four, by, 0;"]
    lines += [f"selp.b32 {half}, {behind}, {half}, four;" for half, behind in pairwise(halves)]
    lines += [f"and.b32 by, {out}, 2;", "mad.lo.s32 by, by, 0x1111, 0x3210;"]
    lines += [f"prmt.b32 {half}, {half}, {behind}, by;" for half, behind in pairwise(halves[:-1])]
    lines += [f"mov.b64 ${n}, {{{halves[2 * n]}, {halves[2 * n + 1]}}};" for n in range(count)]
    return f"{{ {' '.join(lines)} }}"


@triton.jit
def _granules(
    start: tl.tensor,
    inside: tl.tensor,
    DTYPE: tl.constexpr,
    BYTES: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
) -> tl.tuple:
    """From `start` (ROWS, parts), an even address, on: (ROWS, parts, GROUPS, SIZE) words of BYTES bytes at multiples of
    BYTES, the word behind each group, and how many bytes before `start` the first begins, (ROWS, parts, 1, 1).

    The word behind is read only where bytes of it belong to the group, so none reaches into another granule of BYTES.
    """
    by = (start.to(tl.int64) & (BYTES - 2)).to(tl.int32)[:, :, None, None]
    pointer = (start[:, :, None, None] - by).to(tl.pointer_type(DTYPE))
    group = (steps(GROUPS) * SIZE)[None, None, :, None]
    there = inside[:, :, None, None]
    word = tl.load(pointer + group + steps(SIZE)[None, None, None, :], mask=there, other=0)
    behind = tl.load(pointer + group + SIZE, mask=there & (by != 0), other=0)
    return word, behind, by


@triton.jit
def load_words(
    start: tl.tensor, inside: tl.tensor, COUNT: tl.constexpr, ALIGNED: tl.constexpr, RUN: tl.constexpr
) -> tl.tensor:
    """int32 words (ROWS, parts, COUNT * 4 / WORD) of WORD = `word_bytes` bytes from each of `start` (ROWS, parts) on.

    Addresses are multiples of four where ALIGNED, else of two. A Gluon thread, which has RUN neighbouring elements and
    so RUN / 4 words, then reads one word more and shifts: a warp's load takes as long as it has rows, whatever its
    width.
    """
    if ALIGNED:
        pointer = start.to(tl.pointer_type(tl.int32))[:, :, None] + steps(COUNT)[None, None, :]
        return tl.load(pointer, mask=inside[:, :, None], other=0)
    elif RUN == 0:
        pointer = start.to(tl.pointer_type(tl.uint16))[:, :, None] + steps(COUNT * 2)[None, None, :]
        return tl.load(pointer, mask=inside[:, :, None], other=0).to(tl.int32)
    else:
        GROUP: tl.constexpr = RUN // 4
        word, behind, by = _granules(start, inside, tl.int32, 4, COUNT // GROUP, GROUP)
        shifted = tl.inline_asm_elementwise(
            _shifts(GROUP),
            _shift_operands(GROUP, "r"),
            [word, behind, 0x3210 + by * 0x1111],
            dtype=tl.int32,
            is_pure=True,
            pack=GROUP,
        )
        return tl.reshape(shifted, (start.shape[0], start.shape[1], COUNT))


@triton.jit
def load_long_words(
    start: tl.tensor, inside: tl.tensor, COUNT: tl.constexpr, ALIGNED: tl.constexpr, RUN: tl.constexpr
) -> tl.tensor:
    """`load_words`, by loads of eight bytes where a Gluon thread has to shift: three fifths of the loads."""
    if ALIGNED or RUN == 0:
        return load_words(start, inside, COUNT, ALIGNED, RUN)
    else:
        GROUP: tl.constexpr = RUN // 8
        word, behind, by = _granules(start, inside, tl.int64, 8, COUNT // 2 // GROUP, GROUP)
        long = tl.inline_asm_elementwise(
            _long_shifts(GROUP),
            _shift_operands(GROUP, "l"),
            [word, behind, by],
            dtype=tl.int64,
            is_pure=True,
            pack=GROUP,
        )
        halves = tl.join(long.to(tl.int32), (long >> 32).to(tl.int32))
        return tl.reshape(halves, (start.shape[0], start.shape[1], COUNT))


if knobs.runtime.interpret:

    @triton.jit
    def _byte_float(word: tl.tensor, which: tl.tensor) -> tl.tensor:
        """2^23 and byte number `which` of int32 words, as float32."""
        return exact_float((word >> (which * 8)) & 255, 0) + _MAGIC

    @triton.jit
    def _byte_half(word: tl.tensor, which: tl.tensor) -> tl.tensor:
        """1024 and byte number `which` of int32 words, as float16."""
        return (((word >> (which * 8)) & 255) + 1024).to(tl.float16)

else:

    @triton.jit
    def _byte_float(word: tl.tensor, which: tl.tensor) -> tl.tensor:
        """2^23 and byte number `which` of int32 words, as float32: as in `exact_float`, in one permutation less."""
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0x4B000000, $2;",  # the wanted byte, two zeros, the exponent
            "=f,r,r",
            [word, which + 0x7540],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )

    @triton.jit
    def _byte_half(word: tl.tensor, which: tl.tensor) -> tl.tensor:
        """1024 and byte number `which` of int32 words, as float16: two neighbours in one permutation."""
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0x64646464, $3;",  # a byte, the exponent, the next byte, the exponent
            "=r,r,r,r,r",
            [word, which * 0x0101 + 0x4140],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )


@triton.jit
def byte_value(word: tl.tensor, which: tl.tensor, OFFSET: tl.constexpr, SHORT: tl.constexpr) -> tl.tensor:
    """Byte number `which` of int32 words, less OFFSET: float32, or float16 where SHORT. Exact."""
    if SHORT:
        return _byte_half(word, which) - (_HALF_MAGIC + OFFSET)
    else:
        return _byte_float(word, which) - (_MAGIC + OFFSET)


@triton.jit
def byte_values(word: tl.tensor, WORD: tl.constexpr, OFFSET: tl.constexpr, SHORT: tl.constexpr) -> tl.tensor:
    """Bytes of words of WORD bytes (..., words), lowest first, less OFFSET: (..., words * WORD), as `byte_value`."""
    if len(word.shape) == 3:
        each = byte_value(word[:, :, :, None], steps(WORD)[None, None, None, :], OFFSET, SHORT)
        return tl.reshape(each, (word.shape[0], word.shape[1], word.shape[2] * WORD))
    else:
        each = byte_value(word[:, :, :, :, None], steps(WORD)[None, None, None, None, :], OFFSET, SHORT)
        return tl.reshape(each, (word.shape[0], word.shape[1], word.shape[2], word.shape[3] * WORD))


@triton.jit
def in_row_units(scale: tl.tensor, units: tl.tensor, begin: tl.tensor, rows: tl.tensor) -> tl.tensor:
    """Float32 scales (ROWS, parts), divided by the rows' `units` (rows,) if there are any."""
    if units is None:
        return scale
    else:
        return scale * (1.0 / tl.load(units + begin + tile_rows(begin, rows, scale.shape[0])))[:, None]


@triton.jit
def look_up(levels: tl.tensor, code: tl.tensor, SHORT: tl.constexpr, RUN: tl.constexpr) -> tl.tensor:
    """Values of a table of sixteen, by int32 codes of any shape whose low four bits count; float16 where SHORT.

    In Triton `levels` is a pointer and RUN 0; a gather goes through shared memory, whose addresses have 32 bits.
    In Gluon every lane has one entry, `levels` (1, lanes down, 1, lanes across, 1), and asks another lane for its own;
    RUN is how many neighbours of a row, in the order of `code`, a lane has.
    """
    if RUN == 0:
        value = tl.gather(tl.load(levels + tl.arange(0, 16)), tl.reshape(code & 15, (code.numel,)), 0)
    else:
        DOWN: tl.constexpr = levels.shape[1]
        ACROSS: tl.constexpr = levels.shape[3]
        BANDS: tl.constexpr = code.shape[0] // DOWN
        spread: tl.constexpr = (BANDS, DOWN, code.numel // (BANDS * DOWN * ACROSS * RUN), ACROSS, RUN)
        # lanes 16 to 31 have the table once more, so that the fifth bit of a lane's number may be anything
        value = tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;",
            "=f,f,r",
            [levels, tl.reshape(code, spread)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return tl.reshape(value.to(tl.float16) if SHORT else value, code.shape)
