"""TQ1_0 and TQ2_0: blocks of 256 weights out of {-d, 0, d}.

    type   bytes  layout (offsets)                weight         elements in a byte
    TQ1_0  54     qs[48] 0, qh[4] 48, d 52        d * (q - 1)    five base-3 digits (four in qh)
    TQ2_0  66     qs[64] 0, d 64                  d * (q - 1)    four fields of two bits

A byte b of TQ1_0 is a fraction: digit i is floor(3 * (b * 3^i mod 256) / 256). Digits of equal rank stand together: the
first 160 elements are rank 0 to 4 of bytes 0..31, the next 80 those of bytes 32..47, the last 16 rank 0 to 3 of `qh`.
"""

from __future__ import annotations

import torch

from gossamer.formats.gguf.bits import read_bytes, read_half, split


def _digits(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` base-3 digits of bytes (n, k): int16 (n, count * k)."""
    # uint8 products wrap at 256, which is the wanted remainder
    ranks = torch.stack([packed * 3**rank for rank in range(count)], dim=1)
    return ((ranks.to(torch.int16) * 3) >> 8).flatten(1)


def decode_tq1_0(blocks: torch.Tensor) -> torch.Tensor:
    """Bytes (n, 54) -> float32 (n, 256)."""
    parts = [_digits(blocks[:, 0:32], 5), _digits(blocks[:, 32:48], 5), _digits(blocks[:, 48:52], 4)]
    return torch.cat(parts, dim=-1).float().sub_(1).mul_(read_half(blocks, 52))


def decode_tq2_0(blocks: torch.Tensor) -> torch.Tensor:
    """Bytes (n, 66) -> float32 (n, 256)."""
    codes = split(read_bytes(blocks, 0, 2, 32), 2).view(-1, 256).float()
    return codes.sub_(1).mul_(read_half(blocks, 64))
