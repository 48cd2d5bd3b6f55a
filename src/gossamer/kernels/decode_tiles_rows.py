"""Tiles of the formats without blocks: fp32, fp16 and bf16 as they are; fp8, fp8_e5m2 and int8 with one scale a row.

Eight-bit floats are given as bytes and widened through float16 where the chip has no such type, before Ada for e4m3.
The layouts and formulas are those of `formats/plain.py`, `formats/fp8.py` and `formats/int8.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

from gossamer.kernels.decode_tiles import in_row_units, row_starts, steps, tile_rows, whole


@triton.jit
def _values(
    values: tl.tensor,
    begin: tl.tensor,
    rows: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EVEN: tl.constexpr,
) -> tl.tensor:
    col = first + steps(COLS)
    inside = whole(col, width, EVEN)
    row = row_starts(values, begin, rows, width, ROWS)
    return tl.load(row[:, None] + col[None, :], mask=inside[None, :])


@triton.jit
def plain_tile(
    values: tl.tensor,
    begin: tl.tensor,
    rows: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EVEN: tl.constexpr,
) -> tl.tensor:
    """w = values."""
    value = _values(values, begin, rows, first, width, ROWS, COLS, EVEN)
    if value.dtype == tl.bfloat16:
        # a shift and nothing else, so that the interpreter, which converts subnormals wrongly, agrees
        return (value.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def _row_scale(scale: tl.tensor, units: tl.tensor, begin: tl.tensor, rows: tl.tensor, ROWS: tl.constexpr) -> tl.tensor:
    """(ROWS, 1): the stored scale of each row, in `units` if there are any."""
    return in_row_units(tl.load(scale + begin + tile_rows(begin, rows, ROWS))[:, None], units, begin, rows)


if knobs.runtime.interpret:

    @triton.jit
    def _int8_half(code: tl.tensor) -> tl.tensor:
        """int8 as float16."""
        return code.to(tl.float16)

else:

    @triton.jit
    def _int8_half(code: tl.tensor) -> tl.tensor:
        """int8 as float16, four at a time: 128 is added as a bit, then each byte becomes the end of 1024."""
        shifted = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 word;
            xor.b32 word, $2, 0x80808080;
            prmt.b32 $0, word, 0x64646464, 0x4140;
            prmt.b32 $1, word, 0x64646464, 0x4342;
            }
            """,
            "=r,=r,r",
            [code],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
        return shifted - 1152.0


@triton.jit
def int8_tile(
    codes: tl.tensor,
    scale: tl.tensor,
    units: tl.tensor,
    begin: tl.tensor,
    rows: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EVEN: tl.constexpr,
) -> tl.tensor:
    """w = code * scale[row]."""
    code = _values(codes, begin, rows, first, width, ROWS, COLS, EVEN)
    unit = _row_scale(scale, units, begin, rows, ROWS)
    value = code.to(tl.float32) if units is None else _int8_half(code)
    return value * unit.to(value.dtype)


@triton.jit
def fp8_tile(
    codes: tl.tensor,
    scale: tl.tensor,
    units: tl.tensor,
    begin: tl.tensor,
    rows: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EVEN: tl.constexpr,
) -> tl.tensor:
    """w = code * scale[row], codes e4m3fn, as such or as bytes."""
    code = _values(codes, begin, rows, first, width, ROWS, COLS, EVEN)
    unit = _row_scale(scale, units, begin, rows, ROWS)
    if units is not None:
        return code.to(tl.float16) * unit.to(tl.float16)
    elif code.dtype == tl.float8e4nv:
        return code.to(tl.float32) * unit
    else:
        # the four exponent bits of e4m3 (bias 7) as the low ones of float16's five (bias 15): 2^-8 of the value,
        # exactly, subnormals included; the row scale takes the 2^8 back
        bits = code.to(tl.int32)
        shrunk = (((bits & 127) << 7) | ((bits & 128) << 8)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return tl.where((bits & 127) == 127, float("nan"), shrunk * (unit * 256.0))


@triton.jit
def fp8_e5m2_tile(
    codes: tl.tensor,
    scale: tl.tensor,
    units: tl.tensor,
    begin: tl.tensor,
    rows: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EVEN: tl.constexpr,
) -> tl.tensor:
    """w = code * scale[row], codes e5m2: the upper byte of a float16."""
    code = _values(codes, begin, rows, first, width, ROWS, COLS, EVEN)
    unit = _row_scale(scale, units, begin, rows, ROWS)
    half = (code.to(tl.int16) << 8).to(tl.float16, bitcast=True)
    value = half.to(tl.float32) if units is None else half
    return value * unit.to(value.dtype)
