"""How a pointwise kernel is launched: a pure function of the width, the same on every chip and for every token count.

A program works on whole rows, so that a row is read once and stays in registers. Triton's tiles have power-of-two
sizes; a row of 3072 is taken as three pieces of 1024, without padding, rather than as a tile of 4096 a quarter empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gossamer.errors import InvalidOptionError, UnsupportedShapeError

PIECE_LARGEST = 4096
PIECES_LARGEST = 32  # every piece is unrolled code
WARP = 32
WARPS_LARGEST = 16


@dataclass(frozen=True)
class Pieces:
    """A row as `count` tiles of `block` values, `block` a power of two."""

    block: int
    count: int


NO_PIECES = Pieces(1, 0)


def pieces(width: int) -> Pieces:
    """The fewest equal power-of-two pieces of a row."""
    block = min(width & -width, PIECE_LARGEST)
    if width < 1 or width // block > PIECES_LARGEST:
        raise UnsupportedShapeError(
            f"the Triton pointwise kernels cannot take rows of {width} values",
            f"a row must be at most {PIECES_LARGEST} pieces of one power of two, at most {PIECE_LARGEST} each",
            "use the torch backend for this model; the widths of FLUX, 3072 and 12288, fit",
        )
    return Pieces(block, width // block)


def power_of_two(least: int) -> int:
    """The smallest power of two that is at least `least`."""
    return 1 << max(least - 1, 0).bit_length()


def warps(values: int, values_a_thread: int) -> int:
    """Warps of a program that holds `values` values in registers, about `values_a_thread` in each thread."""
    return min(power_of_two(-(-values // (WARP * values_a_thread))), WARPS_LARGEST)


@dataclass(frozen=True)
class HeadTiles:
    """The heads of a token as `count` tiles of (`heads`, dim)."""

    heads: int
    count: int


HEAD_TILE_VALUES = 1024  # 8 values, one 16-byte load of bfloat16, in each of 128 threads


def head_tiles(heads: int, dim: int) -> HeadTiles:
    """The fewest equal power-of-two tiles of a token's heads."""
    if dim & (dim - 1) or not 2 <= dim <= HEAD_TILE_VALUES:
        raise UnsupportedShapeError(
            f"the Triton rotary kernel cannot take heads of {dim} values",
            f"a head must be a power of two from 2 to {HEAD_TILE_VALUES}",
            "use the torch backend for this model; FLUX heads have 128",
        )
    tile = min(heads & -heads, HEAD_TILE_VALUES // dim)
    return HeadTiles(tile, heads // tile)


def require_unit_stride(**tensors: torch.Tensor) -> None:
    """Refuse a tensor whose last dimension is not contiguous; the kernels take every other view."""
    for name, tensor in tensors.items():
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise InvalidOptionError(
                f"{name} has stride {tensor.stride(-1)} along its last dimension",
                "the Triton pointwise kernels read whole rows of neighbouring values",
                f"make {name} contiguous along its last dimension, or use the torch backend",
            )


def require_shape(shape: tuple[int, ...], **tensors: torch.Tensor) -> None:
    """Refuse a tensor of another shape: a kernel would read past its end."""
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shape:
            raise UnsupportedShapeError(
                f"{name} has shape {tuple(tensor.shape)} where {shape} is needed",
                "the Triton pointwise kernels do not broadcast",
                f"give {name} the shape {shape}",
            )
