"""What every format asks of a weight before it packs it, and the error when the answer is no."""

from __future__ import annotations

import torch

from gossamer.errors import InvalidOptionError, UnsupportedShapeError


def require_packable(weight: torch.Tensor, storage: str) -> None:
    """Refuse a weight that is not a finite float matrix (out, in)."""
    if weight.dim() != 2 or weight.numel() == 0:
        raise UnsupportedShapeError(
            f"A weight of shape {tuple(weight.shape)} cannot be stored as {storage}.",
            "Storage formats hold the matrix (out, in) of a linear layer, with at least one row and one column.",
            "Pass a 2-D weight; reshape a convolution to (out, in * kernel) first.",
        )
    if not weight.is_floating_point():
        raise InvalidOptionError(
            f"A weight of type {weight.dtype} cannot be stored as {storage}.",
            "Packing starts from floating-point values; these are integers, perhaps already packed.",
            "Unpack the weight to a float type first.",
        )
    if weight.is_meta:
        raise InvalidOptionError(
            f"A weight on the meta device cannot be stored as {storage}.",
            "It has a shape but no values yet.",
            "Load the checkpoint into the model first.",
        )
    finite = torch.isfinite(weight)
    if not bool(finite.all()):
        rows = int((~finite).any(dim=1).sum())
        raise InvalidOptionError(
            f"A weight with NaN or infinite values cannot be stored as {storage}.",
            f"{int((~finite).sum())} values in {rows} of {weight.shape[0]} rows are not finite; "
            "one of them would spoil the scale of its whole block or row.",
            "Repair or reload the checkpoint; a float16 file that overflowed has to be made again from its source.",
        )


def require_width(storage: str, in_features: int, width_multiple: int) -> None:
    """Refuse a width that a format's blocks do not divide."""
    if in_features % width_multiple:
        raise UnsupportedShapeError(
            f"A weight with {in_features} input features cannot be stored as {storage}.",
            f"{storage} packs blocks of {width_multiple} values along a row, and {in_features} is not a multiple.",
            "Choose a format without that limit (nf4, fp8, int8, bf16) for this layer, or skip it.",
        )
