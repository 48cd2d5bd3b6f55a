"""Six-bit scales of the K types, and how twelve bytes hold sixteen numbers.

Q4_K and Q5_K: eight scales s and eight minimums m, all 0..63, in three rows of four bytes (j = 0..3):

    byte j        s[j]  | high two bits of s[j + 4] in bits 6 and 7
    byte 4 + j    m[j]  | high two bits of m[j + 4] in bits 6 and 7
    byte 8 + j    low nibble of s[j + 4] | low nibble of m[j + 4] in the high nibble

Q3_K: sixteen scales, stored as s + 32 = 0..63:

    byte j (0..7)       low nibble of s[j] | low nibble of s[j + 8] in the high nibble
    byte 8 + j (0..3)   high two bits of s[j], s[j + 4], s[j + 8], s[j + 12], lowest first
"""

from __future__ import annotations

import torch

from gossamer.formats.gguf.bits import join, split


def split_q4_k_scales(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes (n, 12) -> scales and minimums, each (n, 8) uint8."""
    first, second, last = packed.view(-1, 3, 4).unbind(1)
    scales = torch.cat([first & 63, (last & 15) | ((first >> 2) & 48)], dim=-1)
    minimums = torch.cat([second & 63, (last >> 4) | ((second >> 2) & 48)], dim=-1)
    return scales, minimums


def join_q4_k_scales(scales: torch.Tensor, minimums: torch.Tensor) -> torch.Tensor:
    """Inverse of `split_q4_k_scales`."""
    first = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    second = minimums[:, :4] | ((minimums[:, 4:] >> 4) << 6)
    last = (scales[:, 4:] & 15) | (minimums[:, 4:] << 4)
    return torch.cat([first, second, last], dim=-1)


def split_q3_k_scales(packed: torch.Tensor) -> torch.Tensor:
    """Bytes (n, 12) -> scales -32..31 (n, 16) int8."""
    low = split(packed[:, :8], 4).reshape(-1, 16)
    high = split(packed[:, 8:], 2).reshape(-1, 16)
    return (low | (high << 4)).view(torch.int8) - 32


def join_q3_k_scales(scales: torch.Tensor) -> torch.Tensor:
    """Inverse of `split_q3_k_scales`."""
    raised = (scales + 32).to(torch.uint8)
    low = join((raised & 15).view(-1, 2, 8), 4)
    high = join((raised >> 4).view(-1, 4, 4), 2)
    return torch.cat([low, high], dim=-1)
