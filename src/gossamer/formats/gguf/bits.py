"""Bit fields inside bytes: the helpers that every block layout of GGUF shares.

A byte holds 8 / bits fields, the first in its lowest bits. Blocks are always (n, block bytes) uint8, and all numbers in
them are little-endian.
"""

from __future__ import annotations

import torch


def read(blocks: torch.Tensor, start: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """`count` numbers of `dtype` that begin at byte `start` of each block: (n, count)."""
    # the copy aligns the bytes: a block or a file offset may be odd
    part = blocks[:, start : start + count * dtype.itemsize]
    return part.clone(memory_format=torch.contiguous_format).view(dtype)


def read_half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The float16 at byte `start` of each block as float32: (n, 1)."""
    return read(blocks, start, 1, torch.float16).float()


def read_bytes(blocks: torch.Tensor, start: int, *shape: int) -> torch.Tensor:
    """Bytes from `start` of each block as contiguous (n, *shape)."""
    count = 1
    for size in shape:
        count *= size
    return blocks[:, start : start + count].contiguous().view(-1, *shape)


def as_bytes(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers (n, k) stored as `dtype`, seen as bytes (n, k * item size)."""
    return values.to(dtype).contiguous().view(torch.uint8)


def split(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned fields of bytes: (..., k) -> (..., 8 / bits, k) uint8, lowest field first."""
    mask = (1 << bits) - 1
    fields = [(packed >> shift) & mask for shift in range(0, 8 - bits, bits)]
    return torch.stack([*fields, packed >> (8 - bits)], dim=-2)


def spread_bits(packed: torch.Tensor) -> torch.Tensor:
    """Single bits in a row: (..., k) bytes -> (..., 8 * k) of 0 and 1."""
    # eight copies of a byte in one word, then bit i alone in copy i: three times as fast as eight shifts
    copies = packed.long() * 0x0101010101010101
    return copies.bitwise_and_(0x8040201008040201 - (1 << 64)).view(torch.uint8).clamp_(max=1)


def join(fields: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `split`: (..., 8 / bits, k) uint8 fields -> (..., k) bytes."""
    packed = fields[..., 0, :].clone()
    for index in range(1, 8 // bits):
        packed |= fields[..., index, :] << (bits * index)
    return packed
