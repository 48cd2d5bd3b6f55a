"""Rows of a stored weight, taken and put together without decoding: for names that hold several linears in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from gossamer.errors import UnsupportedShapeError
from gossamer.formats import Packed
from gossamer.formats.four_bit import BLOCK, VALUES
from gossamer.formats.rows import row_split

Rows = tuple[int, int]  # first and last, exclusive

OF_THE_WHOLE = "absmax_offset"  # the one tensor that does not grow with the rows


def take_rows(value: Packed | torch.Tensor, ranges: Sequence[Rows]) -> Packed | torch.Tensor:
    """These rows of a weight (out, in), or of a bias (out,), in this order; views where it is one range."""
    if isinstance(value, torch.Tensor):
        parts = [value[start:stop] for start, stop in ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    return join_rows([row_split(value, start, stop) for start, stop in ranges])


def join_rows(parts: Sequence[Packed]) -> Packed:
    """Packed rows of one format and width, one part below the other."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    rows, width = sum(part.shape[0] for part in parts), first.shape[1]
    if first.format.removesuffix("-dq") in VALUES and any(part.shape[0] * width % BLOCK for part in parts[:-1]):
        raise UnsupportedShapeError(
            f"Parts of a {first.format} weight of {width} columns cannot change places.",
            f"Its blocks of {BLOCK} values run on from row to row, and one of them lies in two parts.",
            "Use a version of the model in another storage format.",
        )
    tensors = {role: torch.cat([part.tensors[role] for part in parts]) for role in first.tensors}
    if OF_THE_WHOLE in tensors:
        tensors[OF_THE_WHOLE] = first.tensors[OF_THE_WHOLE]
    return replace(first, tensors=tensors, shape=(rows, width))
