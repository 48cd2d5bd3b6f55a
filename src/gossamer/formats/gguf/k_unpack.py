"""Q2_K to Q6_K, decoding: super-blocks of 256 whose sub-blocks have small integer scales.

    type  bytes  layout (offsets)                               sub-block  weight                             codes
    Q2_K  84     scales[16] 0, qs[64] 16, d 80, dmin 82         16         (d * s) * q - (dmin * m)           0..3
    Q3_K  110    hmask[32] 0, qs[64] 32, scales[12] 96, d 108   16         (d * (s - 32)) * (q - 4)           0..7
    Q4_K  144    d 0, dmin 2, scales[12] 4, qs[128] 16          32         (d * s) * q - (dmin * m)           0..15
    Q5_K  176    d 0, dmin 2, scales[12] 4, qh[32] 16, qs 48    32         (d * s) * q - (dmin * m)           0..31
    Q6_K  210    ql[128] 0, qh[64] 128, scales[16] 192, d 208   16         (d * s) * (q - 32)                 0..63

`d` and `dmin` are float16. `s` and `m` have 4 bits in Q2_K and 6 bits in Q4_K and Q5_K, all unsigned; `s` has 6 bits in
Q3_K and is an int8 in Q6_K. Bytes of codes are read in runs: 32 bytes hold 64, 128 or 256 elements of 4, 2 or 1 bits,
the lowest field of every byte first. Products are rounded to float32 in the order that the brackets show.
"""

from __future__ import annotations

import torch

from gossamer.formats.gguf.bits import read, read_bytes, read_half, split
from gossamer.formats.gguf.k_scales import split_q3_k_scales, split_q4_k_scales


def decode_q2_k(blocks: torch.Tensor) -> torch.Tensor:
    """Bytes (n, 84) -> float32 (n, 256)."""
    scales = read_bytes(blocks, 0, 16)
    scale = ((scales & 15) * read_half(blocks, 80)).unsqueeze(-1)
    minimum = ((scales >> 4) * read_half(blocks, 82)).unsqueeze(-1)
    codes = split(read_bytes(blocks, 16, 2, 32), 2).view(-1, 16, 16).float()
    return codes.mul_(scale).sub_(minimum).view(-1, 256)


def decode_q3_k(blocks: torch.Tensor) -> torch.Tensor:
    """Bytes (n, 110) -> float32 (n, 256)."""
    scales = split_q3_k_scales(read_bytes(blocks, 96, 12))
    scale = (scales * read_half(blocks, 108)).unsqueeze(-1)
    high = split(read_bytes(blocks, 0, 32), 1).view(-1, 16, 16)
    low = split(read_bytes(blocks, 32, 2, 32), 2).view(-1, 16, 16)
    return (low | (high << 2)).float().sub_(4).mul_(scale).view(-1, 256)


def _affine(blocks: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Codes as float32 (n, 8, 32), in place, to weights (n, 256) with the header of Q4_K and Q5_K."""
    scales, minimums = split_q4_k_scales(read_bytes(blocks, 4, 12))
    scale = (scales * read_half(blocks, 0)).unsqueeze(-1)
    minimum = (minimums * read_half(blocks, 2)).unsqueeze(-1)
    return codes.mul_(scale).sub_(minimum).view(-1, 256)


def decode_q4_k(blocks: torch.Tensor) -> torch.Tensor:
    """Bytes (n, 144) -> float32 (n, 256)."""
    return _affine(blocks, split(read_bytes(blocks, 16, 4, 32), 4).view(-1, 8, 32).float())


def decode_q5_k(blocks: torch.Tensor) -> torch.Tensor:
    """Bytes (n, 176) -> float32 (n, 256)."""
    high = split(read_bytes(blocks, 16, 32), 1)
    low = split(read_bytes(blocks, 48, 4, 32), 4).view(-1, 8, 32)
    return _affine(blocks, (low | (high << 4)).float())


def decode_q6_k(blocks: torch.Tensor) -> torch.Tensor:
    """Bytes (n, 210) -> float32 (n, 256)."""
    scale = (read(blocks, 192, 16, torch.int8) * read_half(blocks, 208)).unsqueeze(-1)
    low = split(read_bytes(blocks, 0, 2, 64), 4).view(-1, 16, 16)
    high = split(read_bytes(blocks, 128, 2, 32), 2).view(-1, 16, 16)
    return (low | (high << 4)).float().sub_(32).mul_(scale).view(-1, 256)
