"""The rotation of ConvRot: groups of a row's values times a regular Hadamard matrix.

The matrix of size 4^k is the k-fold Kronecker product of [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]],
divided by 2^k. It is symmetric and its own inverse, so rotating twice gives the first values back.

Each factor is one pass here: that matrix times (a, b, c, d) is the sum of the four minus twice (d, c, b, a).
"""

from __future__ import annotations

import torch


def is_rotation_size(size: int) -> bool:
    """Whether `size` is a power of four from 4 on, as the matrix needs."""
    return size >= 4 and size & (size - 1) == 0 and size.bit_length() % 2 == 1


def rotate_unscaled(values: torch.Tensor, size: int) -> torch.Tensor:
    """Float32 (rows, width): each group of `size` times 2^k of the matrix; exact for integers with sums below 2^24."""
    shape, stride = values.shape, 1
    while stride < size:
        quads = values.reshape(-1, 4, stride)
        values = quads.sum(dim=1, keepdim=True) - 2 * quads.flip(1)
        stride *= 4
    return values.reshape(shape)


def rotation_factor(size: int) -> float:
    """What the result of `rotate_unscaled` still has to be multiplied by: 2^-k, a power of two."""
    return 2.0 ** -((size.bit_length() - 1) // 2)
