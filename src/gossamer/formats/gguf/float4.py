"""MXFP4 and NVFP4: four-bit floats (E2M1) with an eight-bit float scale.

    type   block  bytes  layout (offsets)     weight             scale
    MXFP4  32     17     e 0, qs[16] 1        (2^(e-128)) * v    one E8M0 byte a block
    NVFP4  64     36     s[4] 0, qs[32] 4     (s / 2) * v        one unsigned E4M3 byte for 16 elements

`v` is twice the E2M1 value (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; bit 3 is the sign), so the scale is halved.
In every run of 16 (MXFP4) or 8 (NVFP4) bytes the low nibbles come first, then the high ones. NVFP4 scales ignore their
sign bit, and bytes 0 and 0x7F stand for 0. Zero codes are +0 whatever their sign.
"""

from __future__ import annotations

import torch

from gossamer.formats.gguf.bits import read_bytes, split

_DOUBLED_E2M1 = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0)


def _values(packed: torch.Tensor) -> torch.Tensor:
    """Doubled E2M1 values of bytes (..., k): float32 (..., 2, k)."""
    codes = split(packed, 4)
    table = torch.tensor(_DOUBLED_E2M1, dtype=torch.float32, device=packed.device)
    return table.index_select(0, codes.view(-1).int()).view(codes.shape)


def _halved_e8m0(exponent: torch.Tensor) -> torch.Tensor:
    """2^(e - 128) by its float32 bits; e = 0 and 1 are subnormal."""
    exponent = exponent.int()
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return bits.view(torch.float32)


def _halved_e4m3(scale: torch.Tensor) -> torch.Tensor:
    """Half of an unsigned E4M3 (bias 7), exactly."""
    exponent, mantissa = (scale.int() >> 3) & 15, scale.int() & 7
    normal = (((exponent + 119) << 23) | (mantissa << 20)).view(torch.float32)
    value = torch.where(exponent == 0, mantissa * 2.0**-10, normal)
    return torch.where((scale == 0) | (scale == 0x7F), 0.0, value)


def decode_mxfp4(blocks: torch.Tensor) -> torch.Tensor:
    """Bytes (n, 17) -> float32 (n, 32)."""
    return _values(read_bytes(blocks, 1, 16)).view(-1, 32).mul_(_halved_e8m0(blocks[:, :1]))


def decode_nvfp4(blocks: torch.Tensor) -> torch.Tensor:
    """Bytes (n, 36) -> float32 (n, 64)."""
    scale = _halved_e4m3(blocks[:, :4]).unsqueeze(-1)
    return _values(read_bytes(blocks, 4, 4, 8)).view(-1, 4, 16).mul_(scale).view(-1, 64)
