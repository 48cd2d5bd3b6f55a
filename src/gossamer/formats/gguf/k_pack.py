"""Q2_K to Q6_K, encoding: least-squares scales, then the layouts that `k_unpack` describes."""

from __future__ import annotations

import torch

from gossamer.formats.gguf.bits import as_bytes, join
from gossamer.formats.gguf.k_scales import join_q3_k_scales, join_q4_k_scales
from gossamer.formats.gguf.scale_search import Affine, AffineGrid, SymmetricGrid, search_affine, search_symmetric


def _steps(first: float, last: float, count: int) -> tuple[float, ...]:
    return tuple(first + (last - first) * index / (count - 1) for index in range(count))


# A stretch above 0 means finer steps that clip the largest weights, one below 0 coarser steps. Ranges and counts were
# chosen on normal, Laplace and heavy-tailed weights: twice as many steps lower the error by less than 0.5 %.
_Q2_K = AffineGrid(top=3, scale_top=15, stretches=_steps(-1.0, 0.6, 9))
_Q4_K = AffineGrid(top=15, scale_top=63, stretches=_steps(-2.0, 1.0, 13))
_Q5_K = AffineGrid(top=31, scale_top=63, stretches=_steps(-3.0, 1.0, 17))


def _round_to(half: int, levels: torch.Tensor) -> torch.Tensor:
    return levels.round_().clamp_(-half, half - 1)


_Q3_K = SymmetricGrid(lambda x: _round_to(4, x), targets=_steps(-3.0, -4.75, 8), scale_bottom=32)
_Q6_K = SymmetricGrid(lambda x: _round_to(32, x), targets=_steps(-25.0, -33.0, 17), scale_bottom=128)


def _sub_blocks(weight: torch.Tensor, length: int) -> torch.Tensor:
    """Blocks (n, 256) -> (length, n, 256 / length), as the searches want them."""
    return weight.view(-1, 256 // length, length).permute(2, 0, 1).contiguous()


def _elements(codes: torch.Tensor) -> torch.Tensor:
    """Codes (length, n, groups) in the order of elements: uint8 (n, 256)."""
    return codes.permute(1, 2, 0).to(torch.uint8).reshape(-1, 256)


def _affine_header(found: Affine) -> torch.Tensor:
    return as_bytes(torch.cat([found.d, found.dmin], dim=-1), torch.float16)


def _packed_scales(found: Affine) -> torch.Tensor:
    return join_q4_k_scales(found.scales.to(torch.uint8), found.minimums.to(torch.uint8))


def encode_q2_k(weight: torch.Tensor) -> torch.Tensor:
    """Float32 (n, 256) -> bytes (n, 84)."""
    found = search_affine(_sub_blocks(weight, 16), _Q2_K)
    scales = found.scales.to(torch.uint8) | (found.minimums.to(torch.uint8) << 4)
    codes = join(_elements(found.codes).view(-1, 2, 4, 32), 2).view(-1, 64)
    return torch.cat([scales, codes, _affine_header(found)], dim=-1)


def encode_q3_k(weight: torch.Tensor) -> torch.Tensor:
    """Float32 (n, 256) -> bytes (n, 110)."""
    found = search_symmetric(_sub_blocks(weight, 16), _Q3_K)
    codes = _elements(found.levels + 4)
    high = join((codes >> 2).view(-1, 8, 32), 1)
    low = join((codes & 3).view(-1, 2, 4, 32), 2).view(-1, 64)
    return torch.cat([high, low, join_q3_k_scales(found.scales), as_bytes(found.d, torch.float16)], dim=-1)


def encode_q4_k(weight: torch.Tensor) -> torch.Tensor:
    """Float32 (n, 256) -> bytes (n, 144)."""
    found = search_affine(_sub_blocks(weight, 32), _Q4_K)
    codes = join(_elements(found.codes).view(-1, 4, 2, 32), 4).view(-1, 128)
    return torch.cat([_affine_header(found), _packed_scales(found), codes], dim=-1)


def encode_q5_k(weight: torch.Tensor) -> torch.Tensor:
    """Float32 (n, 256) -> bytes (n, 176)."""
    found = search_affine(_sub_blocks(weight, 32), _Q5_K)
    codes = _elements(found.codes)
    high = join((codes >> 4).view(-1, 8, 32), 1)
    low = join((codes & 15).view(-1, 4, 2, 32), 4).view(-1, 128)
    return torch.cat([_affine_header(found), _packed_scales(found), high, low], dim=-1)


def encode_q6_k(weight: torch.Tensor) -> torch.Tensor:
    """Float32 (n, 256) -> bytes (n, 210)."""
    found = search_symmetric(_sub_blocks(weight, 16), _Q6_K)
    codes = _elements(found.levels + 32)
    low = join((codes & 15).view(-1, 2, 2, 64), 4).view(-1, 128)
    high = join((codes >> 4).view(-1, 2, 4, 32), 2).view(-1, 64)
    scales = as_bytes(found.scales, torch.int8)
    return torch.cat([low, high, scales, as_bytes(found.d, torch.float16)], dim=-1)
