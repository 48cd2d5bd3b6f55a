"""Stored weights as float16 in units of their row, on the way to fp8: the arithmetic, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from gossamer.formats import pack, unpack
from gossamer.kernels.decode_kernel import stored_tile
from gossamer.kernels.decode_reference import row_scales
from gossamer.kernels.decode_support import READABLE, stored_parts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, COLS = 8, 256
WITH_MINIMUM = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")
# plain values are no codes; e4m3 needs a chip that has the type
STORAGES = [name for name, known in READABLE.items() if known.family not in ("plain", "fp8")]


@triton.jit
def halves_kernel(
    out: tl.tensor,
    units: tl.tensor,
    codes: tl.tensor,
    scale: tl.tensor,
    nested_scale: tl.tensor,
    nested_offset: tl.tensor,
    levels: tl.tensor,
    nested_levels: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    row_bytes: tl.tensor,
    FAMILY: tl.constexpr,
    FORMAT: tl.constexpr,
    BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """Write the tile of this program, whose rows are all there, into `out` (rows, width)."""
    begin, first = tl.program_id(0) * ROWS, tl.program_id(1) * COLS
    tile = stored_tile(
        codes, scale, nested_scale, nested_offset, levels, nested_levels, units,
        begin, rows, first, width, row_bytes, FAMILY, FORMAT, BYTES, ROWS, COLS, False, 0,
    )  # fmt: skip
    tl.static_assert(tile.dtype == tl.float16)
    row, col = begin + tl.arange(0, ROWS), first + tl.arange(0, COLS)
    tl.store(out + row[:, None] * width + col[None, :], tile, mask=(col < width)[None, :])


@pytest.mark.parametrize("width", [768, 1280])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_stored_weight_in_units_of_its_row_is_right_to_eleven_bits(storage, width):
    rows, known = 2 * ROWS, READABLE[storage]
    generator = torch.Generator().manual_seed(width)
    packed = pack((torch.randn(rows, width, generator=generator) * 0.02).to(DEVICE), storage)
    weight = unpack(packed, torch.float32)
    units, stored = row_scales(weight, torch.float8_e4m3fn), stored_parts(packed)
    out = torch.full((rows, width), float("nan"), dtype=torch.float16, device=DEVICE)
    halves_kernel[(rows // ROWS, triton.cdiv(width, COLS))](
        out, units, stored.codes, stored.scale, stored.nested_scale, stored.nested_offset, stored.levels,
        stored.nested_levels, rows, width, width // known.width_multiple * known.block_bytes,
        known.family, known.name, known.block_bytes, ROWS, COLS,
    )  # fmt: skip
    expected = weight / units[:, None]
    # scale, code and product are rounded by 2^-11 each; a minimum and what it is added to are up to 900 units large
    allowed = expected.abs() * 2**-9 + (0.5 if storage in WITH_MINIMUM else 1e-6)
    assert ((out.float() - expected).abs() <= allowed).all()
