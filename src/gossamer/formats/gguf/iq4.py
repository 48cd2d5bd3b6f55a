"""IQ4_NL and IQ4_XS: 4-bit indices into 16 uneven levels -127..113.

    type    block  bytes  layout (offsets)                                    weight
    IQ4_NL  32     18     d 0, qs[16] 2                                       d * v[q]
    IQ4_XS  256    136    d 0, scales_h u16 2, scales_l[4] 4, qs[128] 8       (d * (s - 32)) * v[q]

`d` is float16. Sub-blocks have 32 elements: 16 bytes with the first half in the low nibbles. The 6-bit scale s of
sub-block j has its low nibble in `scales_l` (even j low) and its high two bits at bit 2 j of `scales_h`.
"""

from __future__ import annotations

import torch

from gossamer.formats.gguf.bits import as_bytes, join, read_bytes, read_half, split
from gossamer.formats.gguf.iq_codebooks import iq4_values, rows
from gossamer.formats.gguf.scale_search import SymmetricGrid, fit_symmetric, search_symmetric


def _levels(blocks: torch.Tensor, start: int, groups: int) -> torch.Tensor:
    """Levels of the sub-blocks from byte `start`: float32 (n, groups, 32)."""
    codes = split(read_bytes(blocks, start, groups, 16), 4)
    return rows(iq4_values(blocks.device), codes).view(-1, groups, 32)


def decode_iq4_nl(blocks: torch.Tensor) -> torch.Tensor:
    """Bytes (n, 18) -> float32 (n, 32)."""
    return _levels(blocks, 2, 1).view(-1, 32).mul_(read_half(blocks, 0))


def decode_iq4_xs(blocks: torch.Tensor) -> torch.Tensor:
    """Bytes (n, 136) -> float32 (n, 256)."""
    high = split(read_bytes(blocks, 2, 2, 1), 2).view(-1, 8)
    low = split(read_bytes(blocks, 4, 4, 1), 4).view(-1, 8)
    scales = (low | (high << 4)).view(torch.int8) - 32
    step = (scales * read_half(blocks, 0)).unsqueeze(-1)
    return _levels(blocks, 8, 8).mul_(step).view(-1, 256)


def _nearest_of_halves(values: torch.Tensor) -> torch.Tensor:
    """Nearest level for every half from -128 to 128: (513,), level of x at 2 * x + 256."""
    halves = torch.arange(-256, 257, dtype=torch.float32, device=values.device) / 2
    return values[torch.bucketize(halves, (values[1:] + values[:-1]) / 2)]


def _grid(device: torch.device) -> SymmetricGrid:
    # levels are integers, so they meet at multiples of a half: rounding up to those first changes nothing
    nearest = _nearest_of_halves(iq4_values(device))

    def snap(scaled: torch.Tensor) -> torch.Tensor:
        halves = (scaled * 2).ceil_().clamp_(-256, 256).add_(256)
        return nearest.index_select(0, halves.view(-1).int()).view(scaled.shape)

    return SymmetricGrid(snap, targets=[-127.0 + shift for shift in range(-12, 13, 2)], scale_bottom=32)


def _packed_codes(levels: torch.Tensor) -> torch.Tensor:
    """Levels (32, n, groups) -> bytes (n, 16 * groups)."""
    codes = torch.bucketize(levels, iq4_values(levels.device), out_int32=True).to(torch.uint8)
    halves = codes.permute(1, 2, 0).reshape(levels.shape[1], -1, 2, 16)
    return join(halves, 4).flatten(1)


def encode_iq4_nl(weight: torch.Tensor) -> torch.Tensor:
    """Float32 (n, 32) -> bytes (n, 18)."""
    x, grid = weight.t().unsqueeze(-1).contiguous(), _grid(weight.device)
    scale = fit_symmetric(x, grid).to(torch.float16)
    inverse = scale.float().reciprocal()
    levels = grid.snap(x * torch.where(inverse.isfinite(), inverse, 0.0))
    return torch.cat([as_bytes(scale, torch.float16), _packed_codes(levels)], dim=-1)


def encode_iq4_xs(weight: torch.Tensor) -> torch.Tensor:
    """Float32 (n, 256) -> bytes (n, 136)."""
    x = weight.view(-1, 8, 32).permute(2, 0, 1).contiguous()
    found = search_symmetric(x, _grid(weight.device))
    scales = (found.scales + 32).to(torch.uint8)
    high = join((scales >> 4).view(-1, 2, 4, 1), 2).view(-1, 2)
    low = join((scales & 15).view(-1, 4, 2, 1), 4).view(-1, 4)
    return torch.cat([as_bytes(found.d, torch.float16), high, low, _packed_codes(found.levels)], dim=-1)
