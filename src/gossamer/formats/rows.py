"""Rows of a weight: their scale, as the fp8 and int8 formats use it, and a packed weight cut between them."""

from __future__ import annotations

import torch

from gossamer.errors import UnsupportedShapeError
from gossamer.formats import four_bit
from gossamer.formats.packed import Packed


def row_scale(values: torch.Tensor, largest: float) -> torch.Tensor:
    """Float32 (out,): what one unit of code is worth, so that a row's largest magnitude lands on `largest`.

    A row of zeros, or one so small that the quotient underflows, gets scale 1: its codes are then zero.
    """
    scale = values.abs().amax(dim=1) / largest
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def row_split(packed: Packed, start: int, stop: int) -> Packed:
    """Rows `start` to `stop` as a packed weight of their own, with exactly the same numbers; views where possible.

    Formats with four bits have blocks that run on from row to row. A cut between two blocks is exact; elsewhere it is
    an UnsupportedShapeError. Block scales that are compressed in groups come out as nf4 or fp4, with the same scales in
    float32, where the cut goes through a group.
    """
    rows, width = packed.shape
    if not 0 <= start < stop <= rows:
        raise UnsupportedShapeError(
            f"Rows {start} to {stop} of a weight with {rows} rows cannot be taken.",
            "They are not there.",
            "Take at least one row, from 0 on.",
        )
    if packed.format.removesuffix("-dq") in four_bit.VALUES:
        return _split_blocks(packed, start, stop)
    # every other format keeps one slice of each tensor for each row
    tensors = {role: tensor[start:stop] for role, tensor in packed.tensors.items()}
    return Packed(packed.format, tensors, (stop - start, width))


def _split_blocks(packed: Packed, start: int, stop: int) -> Packed:
    """Rows of nf4, fp4, nf4-dq or fp4-dq."""
    rows, width = packed.shape
    first, last = start * width, stop * width
    if first % four_bit.BLOCK or (last % four_bit.BLOCK and stop < rows):
        raise UnsupportedShapeError(
            f"Rows {start} to {stop} of a weight with {width} columns cannot be cut out of {packed.format}.",
            f"Its blocks of {four_bit.BLOCK} values run on from row to row, and the cut would go through one.",
            "Decode the weight first, or store it in a format whose blocks end with the row.",
        )
    blocks = slice(first // four_bit.BLOCK, -(-last // four_bit.BLOCK))
    codes = packed.tensors["codes"][first // 2 : -(-last // 2)]
    storage, scales = _split_scales(packed, blocks, to_end=stop == rows)
    return Packed(storage, {"codes": codes, **scales}, (stop - start, width))


def _split_scales(packed: Packed, blocks: slice, *, to_end: bool) -> tuple[str, dict[str, torch.Tensor]]:
    """The format and the scales of some blocks: still compressed if the cut goes between two groups."""
    tensors, group = packed.tensors, four_bit.NESTED_BLOCK
    if "absmax" in tensors:
        return packed.format, {"absmax": tensors["absmax"][blocks]}
    if blocks.start % group or (blocks.stop % group and not to_end):
        return packed.format.removesuffix("-dq"), {"absmax": four_bit.block_scales(packed)[blocks]}
    groups = slice(blocks.start // group, -(-blocks.stop // group))
    return packed.format, {
        "absmax_codes": tensors["absmax_codes"][blocks],
        "absmax_scale": tensors["absmax_scale"][groups],
        "absmax_offset": tensors["absmax_offset"],
    }
