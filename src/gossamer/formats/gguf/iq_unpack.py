"""IQ1, IQ2 and IQ3 types, decoding: super-blocks of 256 whose elements are rows of a code book.

    type     bytes  layout (offsets)                                            weight
    IQ2_XXS  66     d 0, (4 indices, signs and scale)[8] of 8 bytes 2           ((d * (0.5 + s)) * 0.25) * g * sign
    IQ2_XS   74     d 0, qs u16[32] 2, scales[8] 66                             as above
    IQ2_S    82     d 0, qs[32] 2, signs[32] 34, qh[8] 66, scales[8] 74         as above
    IQ3_XXS  98     d 0, qs[64] 2, (signs and scale) u32[8] 66                  ((d * (0.5 + s)) * 0.5) * g * sign
    IQ3_S    110    d 0, qs[64] 2, qh[8] 66, signs[32] 74, scales[4] 106        (d * (1 + 2 s)) * g * sign
    IQ1_S    50     d 0, qs[32] 2, qh u16[8] 34                                 (d * (2 s + 1)) * (g + delta)
    IQ1_M    56     qs[32] 0, qh[16] 32, scales u16[4] 48                       (d * (2 s + 1)) * (g + delta)

`d` is float16 (in IQ1_M its four nibbles are the top ones of the four scale words); `s` has 4 bits, in IQ1 three;
`g` is a magnitude out of the type's grid, 8 elements an index for IQ1 and IQ2, 4 for IQ3; delta is +-1/8.
"""

from __future__ import annotations

import torch

from gossamer.formats.gguf.bits import read, read_bytes, read_half, split
from gossamer.formats.gguf.iq_codebooks import grid, parity_signs, rows, signs

_DELTA = 0.125


def _nibbles(blocks: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """Nibbles of `count` bytes, low before high: float32 (n, 2 * count)."""
    return split(read_bytes(blocks, start, count, 1), 4).view(-1, 2 * count).float()


def _signs_and_scale(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Words int32 (n, 8) -> factors (n, 8, 4, 8) from four 7-bit indices, and the scale in the top four bits (n, 8)."""
    index = torch.stack([(words >> shift) & 127 for shift in (0, 7, 14, 21)], dim=-1)
    return rows(parity_signs(words.device), index), ((words >> 28) & 15).float()


def _signed(scale: torch.Tensor, magnitude: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """(scale * magnitude) * factor for scale (n, groups) and magnitudes and factors of 256 elements a block."""
    groups = scale.shape[1]
    size = 256 // groups
    return magnitude.view(-1, groups, size).mul_(scale.unsqueeze(-1)).mul_(factor.view(-1, groups, size)).view(-1, 256)


def decode_iq2_xxs(blocks: torch.Tensor) -> torch.Tensor:
    """Bytes (n, 66) -> float32 (n, 256)."""
    words = read(blocks, 2, 16, torch.int32).view(-1, 8, 2)
    factor, scale = _signs_and_scale(words[..., 1])
    index = read_bytes(blocks, 2, 8, 8)[..., :4]
    scale = read_half(blocks, 0) * (0.5 + scale) * 0.25
    return _signed(scale, rows(grid("IQ2_XXS", blocks.device), index), factor)


def decode_iq2_xs(blocks: torch.Tensor) -> torch.Tensor:
    """Bytes (n, 74) -> float32 (n, 256)."""
    words = read(blocks, 2, 32, torch.int16).int()
    factor = rows(parity_signs(blocks.device), (words >> 9) & 127)
    scale = read_half(blocks, 0) * (0.5 + _nibbles(blocks, 66, 8)) * 0.25
    return _signed(scale, rows(grid("IQ2_XS", blocks.device), words & 511), factor)


def decode_iq2_s(blocks: torch.Tensor) -> torch.Tensor:
    """Bytes (n, 82) -> float32 (n, 256)."""
    factor = rows(signs(blocks.device), read_bytes(blocks, 34, 32))
    high = split(read_bytes(blocks, 66, 8, 1), 2).view(-1, 32)
    index = read_bytes(blocks, 2, 32).int() | (high.int() << 8)
    scale = read_half(blocks, 0) * (0.5 + _nibbles(blocks, 74, 8)) * 0.25
    return _signed(scale, rows(grid("IQ2_S", blocks.device), index), factor)


def decode_iq3_xxs(blocks: torch.Tensor) -> torch.Tensor:
    """Bytes (n, 98) -> float32 (n, 256)."""
    factor, scale = _signs_and_scale(read(blocks, 66, 8, torch.int32))
    scale = read_half(blocks, 0) * (0.5 + scale) * 0.5
    return _signed(scale, rows(grid("IQ3_XXS", blocks.device), read_bytes(blocks, 2, 64)), factor)


def decode_iq3_s(blocks: torch.Tensor) -> torch.Tensor:
    """Bytes (n, 110) -> float32 (n, 256)."""
    factor = rows(signs(blocks.device), read_bytes(blocks, 74, 32))
    high = split(read_bytes(blocks, 66, 8, 1), 1).view(-1, 64)
    index = read_bytes(blocks, 2, 64).int() | (high.int() << 8)
    scale = read_half(blocks, 0) * (1 + 2 * _nibbles(blocks, 106, 4))
    return _signed(scale, rows(grid("IQ3_S", blocks.device), index), factor)


def _shifted(scale: torch.Tensor, level: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """scale * (level +- 1/8) for levels (n, 32, 8); scale and `negative` broadcast over them."""
    delta = torch.where(negative, -_DELTA, _DELTA)
    return level.add_(delta).mul_(scale).view(-1, 256)


def decode_iq1_s(blocks: torch.Tensor) -> torch.Tensor:
    """Bytes (n, 50) -> float32 (n, 256)."""
    words = read(blocks, 34, 8, torch.int16).int().unsqueeze(-1)
    high = torch.cat([(words >> shift) & 7 for shift in (0, 3, 6, 9)], dim=-1).view(-1, 32)
    index = read_bytes(blocks, 2, 32).int() | (high << 8)
    scale = read_half(blocks, 0).unsqueeze(-1) * (2 * ((words >> 12) & 7) + 1)
    level = rows(grid("IQ1_S", blocks.device), index).view(-1, 8, 32)
    return _shifted(scale, level, (words & 0x8000) != 0)


def _split_half(words: torch.Tensor) -> torch.Tensor:
    """The float16 whose nibbles are the top ones of four words int32 (n, 4), lowest first: float32 (n, 1)."""
    top = (words >> 12) & 15
    bits = top[:, 0] | (top[:, 1] << 4) | (top[:, 2] << 8) | (top[:, 3] << 12)
    return bits.to(torch.int16).view(torch.float16).float().unsqueeze(-1)


def decode_iq1_m(blocks: torch.Tensor) -> torch.Tensor:
    """Bytes (n, 56) -> float32 (n, 256)."""
    words = read(blocks, 48, 4, torch.int16).int()
    scales = torch.stack([(words >> shift) & 7 for shift in (0, 3, 6, 9)], dim=-1).view(-1, 16)
    scale = (_split_half(words) * (2 * scales + 1)).view(-1, 16, 1, 1)
    high = split(read_bytes(blocks, 32, 16, 1), 4).view(-1, 32)
    index = read_bytes(blocks, 0, 32).int() | ((high & 7).int() << 8)
    level = rows(grid("IQ1_M", blocks.device), index).view(-1, 16, 2, 8)
    return _shifted(scale, level, ((high & 8) != 0).view(-1, 16, 2, 1))
