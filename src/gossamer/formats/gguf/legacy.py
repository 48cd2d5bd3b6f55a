"""Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: blocks of 32 with one float16 scale each.

    type   bytes  layout                           weight                 codes
    Q4_0   18     d, qs[16]                        d * (q - 8)            0..15
    Q4_1   20     d, m, qs[16]                     d * q + m              0..15
    Q5_0   22     d, qh[4], qs[16]                 d * (q - 16)           0..31
    Q5_1   24     d, m, qh[4], qs[16]              d * q + m              0..31
    Q8_0   34     d, qs[32]                        d * q                  -127..127

`d` and `m` are float16. Byte i of `qs` holds element i in its low and element i + 16 in its high nibble; bit i of `qh`
is the fifth bit of element i. Scales follow from the extremes of the block without a search, so that the bytes equal
those of the `gguf` package: Q4_0 and Q5_0 map the element of largest magnitude onto code 0.
"""

from __future__ import annotations

import torch

from gossamer.formats.gguf.bits import as_bytes, join, read, read_bytes, read_half, split, spread_bits


def _codes_of_5_bits(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """`qh` and `qs` from byte `start`: (n, 32) uint8."""
    high = spread_bits(blocks[:, start : start + 4])
    low = split(read_bytes(blocks, start + 4, 16), 4).view(-1, 32)
    return low | (high << 4)


def decode_q4_0(blocks: torch.Tensor) -> torch.Tensor:
    """Bytes (n, 18) -> float32 (n, 32)."""
    codes = split(read_bytes(blocks, 2, 16), 4).view(-1, 32).float()
    return codes.sub_(8).mul_(read_half(blocks, 0))


def decode_q4_1(blocks: torch.Tensor) -> torch.Tensor:
    """Bytes (n, 20) -> float32 (n, 32)."""
    codes = split(read_bytes(blocks, 4, 16), 4).view(-1, 32).float()
    return codes.mul_(read_half(blocks, 0)).add_(read_half(blocks, 2))


def decode_q5_0(blocks: torch.Tensor) -> torch.Tensor:
    """Bytes (n, 22) -> float32 (n, 32)."""
    return _codes_of_5_bits(blocks, 2).float().sub_(16).mul_(read_half(blocks, 0))


def decode_q5_1(blocks: torch.Tensor) -> torch.Tensor:
    """Bytes (n, 24) -> float32 (n, 32)."""
    return _codes_of_5_bits(blocks, 4).float().mul_(read_half(blocks, 0)).add_(read_half(blocks, 2))


def decode_q8_0(blocks: torch.Tensor) -> torch.Tensor:
    """Bytes (n, 34) -> float32 (n, 32)."""
    return read(blocks, 2, 32, torch.int8).float().mul_(read_half(blocks, 0))


def _divide(value: torch.Tensor, divisor: float) -> torch.Tensor:
    """A true division on every device: CUDA multiplies by the reciprocal when the divisor is a Python number."""
    return value / torch.tensor(divisor, dtype=value.dtype, device=value.device)


def _reciprocal(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, and 0 where that is not a number: such a scale is stored as 0, so its codes do not matter."""
    inverse = scale.reciprocal()
    return torch.where(inverse.isfinite(), inverse, 0.0)


def _encode_signed(weight: torch.Tensor, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale (n, 1) and codes 0..2*half-1 (n, 32) with weight = scale * (code - half)."""
    pivot = weight.gather(-1, weight.abs().argmax(-1, keepdim=True))
    scale = pivot / -half
    codes = (weight * _reciprocal(scale) + (half + 0.5)).trunc().clamp(0, 2 * half - 1)
    return scale, codes.to(torch.uint8)


def _encode_affine(weight: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scale and minimum (n, 1) and codes 0..top (n, 32) with weight = scale * code + minimum."""
    low, high = weight.aminmax(dim=-1, keepdim=True)
    scale = _divide(high - low, top)
    codes = ((weight - low) * _reciprocal(scale) + 0.5).trunc().clamp(0, top)
    return scale, low, codes.to(torch.uint8)


def _pack_4_bits(codes: torch.Tensor) -> torch.Tensor:
    return join((codes & 15).view(-1, 2, 16), 4)


def _pack_fifth_bits(codes: torch.Tensor) -> torch.Tensor:
    return join((codes >> 4).view(-1, 4, 8, 1), 1).view(-1, 4)


def encode_q4_0(weight: torch.Tensor) -> torch.Tensor:
    """Float32 (n, 32) -> bytes (n, 18)."""
    scale, codes = _encode_signed(weight, 8)
    return torch.cat([as_bytes(scale, torch.float16), _pack_4_bits(codes)], dim=-1)


def encode_q4_1(weight: torch.Tensor) -> torch.Tensor:
    """Float32 (n, 32) -> bytes (n, 20)."""
    scale, low, codes = _encode_affine(weight, 15)
    header = torch.cat([scale, low], dim=-1)
    return torch.cat([as_bytes(header, torch.float16), _pack_4_bits(codes)], dim=-1)


def encode_q5_0(weight: torch.Tensor) -> torch.Tensor:
    """Float32 (n, 32) -> bytes (n, 22)."""
    scale, codes = _encode_signed(weight, 16)
    return torch.cat([as_bytes(scale, torch.float16), _pack_fifth_bits(codes), _pack_4_bits(codes)], dim=-1)


def encode_q5_1(weight: torch.Tensor) -> torch.Tensor:
    """Float32 (n, 32) -> bytes (n, 24)."""
    scale, low, codes = _encode_affine(weight, 31)
    header = torch.cat([scale, low], dim=-1)
    return torch.cat([as_bytes(header, torch.float16), _pack_fifth_bits(codes), _pack_4_bits(codes)], dim=-1)


def encode_q8_0(weight: torch.Tensor) -> torch.Tensor:
    """Float32 (n, 32) -> bytes (n, 34)."""
    scale = _divide(weight.abs().amax(-1, keepdim=True), 127)
    scaled = weight * _reciprocal(scale)
    # halves round away from zero here; torch.round would send them to the even neighbour
    whole = scaled.trunc()
    codes = whole + (2 * (scaled - whole)).trunc()
    return torch.cat([as_bytes(scale, torch.float16), as_bytes(codes, torch.int8)], dim=-1)
