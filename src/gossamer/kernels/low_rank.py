"""All low-rank terms of one layer side by side, as the decode kernels take them.

    up     (out, R)   float16, bfloat16 or float32
    down   (R, in)    the same type
    scale  (R,)       float32; ranks of one term share its scale
    power  (R,)       float32; for each rank the largest power of two that is not above its largest value in `down`

W_delta = up @ (scale * down), where R is the sum of the ranks, padded with zeros to 16, 32 or a multiple of 64: the
kernels take so many ranks at a time, so three of them serve every set of adapters.

Layers that read the same input are decoded as one matrix of several bands of equally many rows: `down` then is
(bands * R, in), `scale` and `power` are (bands * R,), and each band of `up` meets its own R rows of them.

Precision: `scale * down` is rounded once to the type of the factors (exact where the scale is a power of two); products
are summed in float32. Towards fp8 up to 32 ranks become float16 instead: `down / power`, and `scale * power * up` in
units of the row. Factors given in several types become float32, which runs as three TF32 products (error about 2^-21)
from Ampere on and as plain float32 before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from gossamer.errors import AdapterError

RANK_STEPS = (16, 32, 64)
FACTOR_TYPES = (torch.float16, torch.bfloat16, torch.float32)

Term = tuple[torch.Tensor, torch.Tensor, float]


@dataclass(frozen=True)
class StackedTerms:
    """The terms of one layer; `ranks` are those of the terms, in order, before padding."""

    up: torch.Tensor
    down: torch.Tensor
    scale: torch.Tensor
    power: torch.Tensor
    ranks: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def bands(self) -> int:
        """How many bands of rows have a `down` of their own."""
        return self.down.shape[0] // self.up.shape[1]


def rank_step(rank: int) -> int:
    """How many ranks of a stack are multiplied at a time."""
    return next((step for step in RANK_STEPS if rank <= step), RANK_STEPS[-1])


def padded_rank(rank: int) -> int:
    """Ranks of a stack with its padding."""
    return rank + -rank % rank_step(rank)


def powers(down: torch.Tensor) -> torch.Tensor:
    """Largest power of two up to the largest value of each rank of `down` (..., R, in): (..., R), 2^-126 or more."""
    largest = torch.linalg.vector_norm(down, torch.inf, -1).float().view(torch.int32)
    return torch.clamp_min(largest & 0x7F800000, 0x00800000).view(torch.float32)


def common_type(factors: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.dtype:
    """The type of a stack of these pairs (up, down)."""
    types = {factor.dtype for pair in factors for factor in pair}
    only = types.pop() if len(types) == 1 else torch.float32
    return only if only in FACTOR_TYPES else torch.float32


def _require_stackable(terms: Sequence[Term]) -> None:
    shapes = [(tuple(up.shape), tuple(down.shape)) for up, down, _ in terms]
    fitting = all(len(up) == len(down) == 2 and up[1] == down[0] for up, down in shapes)
    if not shapes or not fitting or len({(up[0], down[1]) for up, down in shapes}) > 1:
        raise AdapterError(
            "These low-rank terms cannot be stacked.",
            f"Their factors (up, down) have the shapes {shapes}; at least one pair is needed, each pair has to be "
            "(out, rank) and (rank, in), and all of them have to share out and in.",
            "Stack the terms of one layer only.",
        )


def stack_terms(terms: Sequence[Term], dtype: torch.dtype | None = None) -> StackedTerms:
    """The terms (up, down, scale) of one layer in `dtype`, or in their common type. Do it once a change of adapters."""
    _require_stackable(terms)
    dtype = dtype or common_type([(up, down) for up, down, _ in terms])
    ranks = tuple(up.shape[1] for up, _, _ in terms)
    padding = padded_rank(sum(ranks)) - sum(ranks)
    up = _side_by_side([up.to(dtype) for up, _, _ in terms], padding, dim=1)
    down = _side_by_side([down.to(dtype) for _, down, _ in terms], padding, dim=0)
    scale = torch.zeros(sum(ranks) + padding, dtype=torch.float32, device=up.device)
    stacked = StackedTerms(up, down, scale, powers(down), ranks)
    set_scales(stacked, [scale for _, _, scale in terms])
    return stacked


def _side_by_side(factors: Sequence[torch.Tensor], padding: int, dim: int) -> torch.Tensor:
    """The factors and `padding` zeros along `dim`, contiguous; a single factor that needs neither stays where it is."""
    joined = factors[0] if len(factors) == 1 else torch.cat(list(factors), dim=dim)
    padded = F.pad(joined, (0, padding) if dim == 1 else (0, 0, 0, padding)) if padding else joined
    return padded.contiguous()


def set_scales(stacked: StackedTerms, scales: Sequence[float]) -> None:
    """Change the strengths of the terms, in place: one small fill each, and no kernel is compiled for it.

    Row scales that were measured before are no longer valid.
    """
    if len(scales) != len(stacked.ranks):
        raise AdapterError(
            f"{len(scales)} scales were given for {len(stacked.ranks)} low-rank terms.",
            "Every stacked term has one scale, in the order of stacking.",
            "Pass one scale a term; 0 switches a term off.",
        )
    stop = 0
    for scale, rank in zip(scales, stacked.ranks, strict=True):
        start, stop = stop, stop + rank
        stacked.scale[start:stop].fill_(scale)  # on the device: a copy from the host would wait for all work before it


def delta(stacked: StackedTerms) -> torch.Tensor:
    """The reference: float32 (out, in) of all terms, from `scale * down` rounded as the kernel rounds it."""
    scaled = (stacked.down.float() * stacked.scale[:, None]).to(stacked.down.dtype).float()
    bands, rank = stacked.bands, stacked.up.shape[1]
    return (stacked.up.float().view(bands, -1, rank) @ scaled.view(bands, rank, -1)).flatten(0, 1)
