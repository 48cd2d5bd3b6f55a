"""F32, F16 and BF16: one number an element, no blocks.

F32    4 bytes  IEEE float32
F16    2 bytes  IEEE float16
BF16   2 bytes  upper half of a float32, rounded to nearest even
"""

from __future__ import annotations

import torch


def decode_f32(blocks: torch.Tensor) -> torch.Tensor:
    """Bytes (n, 4) -> float32 (n, 1)."""
    return blocks.clone().view(torch.float32)


def decode_f16(blocks: torch.Tensor) -> torch.Tensor:
    """Bytes (n, 2) -> float32 (n, 1)."""
    return blocks.clone().view(torch.float16).float()


def decode_bf16(blocks: torch.Tensor) -> torch.Tensor:
    """Bytes (n, 2) -> float32 (n, 1)."""
    return blocks.clone().view(torch.bfloat16).float()
