"""Rows of a stored weight, taken and put together without decoding: for names that hold several linears in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from gossamer.errors import UnsupportedShapeError
from gossamer.formats import Packed
from gossamer.formats.four_bit import BLOCK, NESTED_BLOCK, VALUES, block_scales
from gossamer.formats.rows import row_split

Rows = tuple[int, int]  # first and last, exclusive

NESTED = "-dq"  # ends the names of formats whose block scales are compressed in groups
OF_THE_WHOLE = "absmax_offset"  # the one tensor that does not grow with the rows


def take_rows(value: Packed | torch.Tensor, ranges: Sequence[Rows]) -> Packed | torch.Tensor:
    """These rows of a weight (out, in), or of a bias (out,), in this order; views where it is one range."""
    if isinstance(value, torch.Tensor):
        parts = [value[start:stop] for start, stop in ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    return join_rows([row_split(value, start, stop) for start, stop in ranges])


def join_rows(parts: Sequence[Packed]) -> Packed:
    """Packed rows of one format and width, one part below the other.

    Parts of nf4-dq or fp4-dq whose groups of block scales would not stay together come out as nf4 or fp4, with the same
    scales in float32; so do those beside parts of nf4 or fp4.
    """
    if len(parts) == 1:
        return parts[0]
    _require_alike(parts)
    parts = parts if _scales_stay(parts) else [_with_plain_scales(part) for part in parts]
    first = parts[0]
    tensors = {role: torch.cat([part.tensors[role] for part in parts]) for role in first.tensors}
    if OF_THE_WHOLE in tensors:
        tensors[OF_THE_WHOLE] = first.tensors[OF_THE_WHOLE]
    return replace(first, tensors=tensors, shape=(sum(part.shape[0] for part in parts), first.shape[1]))


def _require_alike(parts: Sequence[Packed]) -> None:
    """One format, but for how its block scales are stored, one width, and no block in two parts."""
    kind, width = parts[0].format.removesuffix(NESTED), parts[0].shape[1]
    if any(part.format.removesuffix(NESTED) != kind or part.shape[1] != width for part in parts):
        named = ", ".join(dict.fromkeys(f"{part.format} of {part.shape[1]} columns" for part in parts))
        raise UnsupportedShapeError(
            f"Rows that are stored as {named} cannot become one weight.",
            "A packed weight has one format and one width.",
            "Use a version of the model that stores these layers in one format.",
        )
    if kind in VALUES and any(part.shape[0] * width % BLOCK for part in parts[:-1]):
        raise UnsupportedShapeError(
            f"Parts of a {parts[0].format} weight of {width} columns cannot change places.",
            f"Its blocks of {BLOCK} values run on from row to row, and one of them lies in two parts.",
            "Use a version of the model in another storage format.",
        )


def _scales_stay(parts: Sequence[Packed]) -> bool:
    """Whether what the parts keep beside their codes may be put together as it is."""
    nested = [part for part in parts if OF_THE_WHOLE in part.tensors]
    if len(nested) < len(parts):
        return not nested
    whole = all(part.shape[0] * part.shape[1] % (BLOCK * NESTED_BLOCK) == 0 for part in parts[:-1])
    offset = parts[0].tensors[OF_THE_WHOLE]
    return whole and all(torch.equal(part.tensors[OF_THE_WHOLE], offset) for part in parts)


def _with_plain_scales(part: Packed) -> Packed:
    """The same numbers as nf4 or fp4."""
    tensors = {"codes": part.tensors["codes"], "absmax": block_scales(part)}
    return Packed(part.format.removesuffix(NESTED), tensors, part.shape)
