"""Search for scales by least squares: the packers of the K types and of IQ4 share it.

Two families, both over super-blocks of G sub-blocks with L elements:

    affine      x = (d * s) * q - (dmin * m)     q in 0..top, s and m in 0..scale_top
    symmetric   x = (d * s) * v                  v one of the type's levels, s a signed integer

Each search has three steps. First every sub-block tries several step sizes; the codes of each give, in closed form,
the best real scale (and minimum), and the least squared error wins. Then the scales become integers times one float16.
Last, codes and scales are improved in turn (Lloyd's iteration), and a super-block keeps the best state it has seen.

Tensors are (L, n, G): sums over a sub-block then run along whole rows, which is several times faster than (n, G, L).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch

_REFINEMENTS = 3


@dataclass(frozen=True)
class AffineGrid:
    """Integer ranges of an affine type; `stretches` are added to `top` to get the step sizes that are tried."""

    top: int
    scale_top: int
    stretches: Sequence[float]


@dataclass(frozen=True)
class Affine:
    """A solution: d and dmin (n, 1) float32 with float16 values, s and m (n, G), q (L, n, G); all float32."""

    d: torch.Tensor
    dmin: torch.Tensor
    scales: torch.Tensor
    minimums: torch.Tensor
    codes: torch.Tensor


@dataclass(frozen=True)
class SymmetricGrid:
    """Levels of a symmetric type.

    `snap` rounds scaled weights to levels; `targets` are the values that the largest element is tried at;
    integer scales run from -scale_bottom to scale_bottom - 1.
    """

    snap: Callable[[torch.Tensor], torch.Tensor]
    targets: Sequence[float]
    scale_bottom: int


@dataclass(frozen=True)
class Symmetric:
    """A solution: d (n, 1) float32 with float16 values, s (n, G), levels (L, n, G); all float32."""

    d: torch.Tensor
    scales: torch.Tensor
    levels: torch.Tensor


Solution = TypeVar("Solution", Affine, Symmetric)


def _ratio(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """above / below, and 0 where that is not a finite number."""
    quotient = above / below
    return torch.where(quotient.isfinite(), quotient, 0.0)


def _as_half(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.float16).float()


def _keep_better(
    best: Solution, best_error: torch.Tensor, trial: Solution, trial_error: torch.Tensor
) -> tuple[Solution, torch.Tensor]:
    """Super-block by super-block, the solution of smaller error (n,)."""
    better = trial_error < best_error
    column = better.unsqueeze(-1)
    chosen = {f.name: torch.where(column, getattr(trial, f.name), getattr(best, f.name)) for f in fields(best)}
    return type(best)(**chosen), torch.where(better, trial_error, best_error)


def _fit_affine(
    length: int, sum_q: torch.Tensor, sum_qq: torch.Tensor, sum_qx: torch.Tensor, sum_x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum >= 0 of least squared error for given codes: x = scale * q - minimum."""
    determinant = length * sum_qq - sum_q * sum_q
    scale = _ratio(length * sum_qx - sum_q * sum_x, determinant)
    minimum = _ratio(sum_q * sum_qx - sum_qq * sum_x, determinant)
    below = minimum < 0
    return torch.where(below, _ratio(sum_qx, sum_qq), scale), minimum.clamp(min=0)


def _start_affine(x: torch.Tensor, grid: AffineGrid) -> tuple[torch.Tensor, torch.Tensor]:
    """Real scale and minimum of every sub-block (n, G)."""
    low = x.amin(0).clamp(max=0)
    span = x.amax(0) - low
    raised, sum_x = x - low, x.sum(0)
    best_scale, best_minimum = span / grid.top, -low
    best_gain = torch.full_like(span, -torch.inf)
    for stretch in grid.stretches:
        codes = (raised * _ratio(torch.full_like(span, grid.top + stretch), span)).round_().clamp_(0, grid.top)
        sum_q, sum_qq, sum_qx = codes.sum(0), (codes * codes).sum(0), (codes * x).sum(0)
        scale, minimum = _fit_affine(len(x), sum_q, sum_qq, sum_qx, sum_x)
        # at the optimum the squared error is sum(x^2) - gain
        gain = scale * sum_qx - minimum * sum_x
        better = (gain > best_gain) & (scale > 0)
        best_gain = torch.where(better, gain, best_gain)
        best_scale = torch.where(better, scale, best_scale)
        best_minimum = torch.where(better, minimum, best_minimum)
    return best_scale, best_minimum


def _affine_codes(x: torch.Tensor, grid: AffineGrid, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    return (x + minimum).mul_(_ratio(torch.ones_like(scale), scale)).round_().clamp_(0, grid.top)


def _place_affine(
    x: torch.Tensor, grid: AffineGrid, scales: torch.Tensor, minimums: torch.Tensor, d: torch.Tensor, dmin: torch.Tensor
) -> tuple[Affine, torch.Tensor]:
    """Round scales and minimums to multiples of d and dmin, then code; with the squared error (n,)."""
    d, dmin = _as_half(d), _as_half(dmin)
    s = _ratio(scales, d).round().clamp(0, grid.scale_top)
    m = _ratio(minimums, dmin).round().clamp(0, grid.scale_top)
    codes = _affine_codes(x, grid, d * s, dmin * m)
    error = (codes * (d * s)).sub_(dmin * m).sub_(x).square_().sum(0).sum(-1)
    return Affine(d, dmin, s, m, codes), error


def _improve_affine(x: torch.Tensor, grid: AffineGrid, old: Affine) -> tuple[Affine, torch.Tensor]:
    """Refit d and dmin to the codes over the super-block, then every sub-block's scale and minimum, then the codes."""
    q, s, m = old.codes, old.scales, old.minimums
    sum_x, sum_q, sum_qq, sum_qx = x.sum(0), q.sum(0), (q * q).sum(0), (q * x).sum(0)
    # normal equations of x = d * (s * q) - dmin * m
    terms = torch.stack([s * s * sum_qq, s * m * sum_q, m * m * len(x), s * sum_qx, m * sum_x])
    qq, qm, mm, qx, mx = terms.sum(-1, keepdim=True)
    determinant = qq * mm - qm * qm
    d = _ratio(qx * mm - qm * mx, determinant)
    dmin = _ratio(qm * qx - qq * mx, determinant)
    usable = (d > 0) & (dmin >= 0)
    scales, minimums = _fit_affine(len(x), sum_q, sum_qq, sum_qx, sum_x)
    return _place_affine(x, grid, scales, minimums, torch.where(usable, d, old.d), torch.where(usable, dmin, old.dmin))


def search_affine(x: torch.Tensor, grid: AffineGrid) -> Affine:
    """Best found affine solution for weights (L, n, G)."""
    scales, minimums = _start_affine(x, grid)
    d = scales.amax(-1, keepdim=True) / grid.scale_top
    dmin = minimums.amax(-1, keepdim=True) / grid.scale_top
    last, error = _place_affine(x, grid, scales, minimums, d, dmin)
    best = last
    for _ in range(_REFINEMENTS):
        last, last_error = _improve_affine(x, grid, last)
        best, error = _keep_better(best, error, last, last_error)
    return best


def fit_symmetric(x: torch.Tensor, grid: SymmetricGrid) -> torch.Tensor:
    """Real scale of every sub-block (n, G)."""
    high, low = x.amax(0), x.amin(0)
    pivot = torch.where(high >= -low, high, low)
    best_scale, best_gain = torch.zeros_like(pivot), torch.full_like(pivot, -torch.inf)
    for target in grid.targets:
        levels = grid.snap(x * _ratio(torch.full_like(pivot, target), pivot))
        sum_vx, sum_vv = (levels * x).sum(0), (levels * levels).sum(0)
        scale = _ratio(sum_vx, sum_vv)
        gain = scale * sum_vx
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale


def _place_symmetric(
    x: torch.Tensor, grid: SymmetricGrid, scales: torch.Tensor, d: torch.Tensor
) -> tuple[Symmetric, torch.Tensor]:
    """Round scales to multiples of d, then code; with the squared error (n,)."""
    d = _as_half(d)
    s = _ratio(scales, d).round().clamp(-grid.scale_bottom, grid.scale_bottom - 1)
    step = d * s
    levels = grid.snap(x * _ratio(torch.ones_like(step), step))
    return Symmetric(d, s, levels), (levels * step).sub_(x).square_().sum(0).sum(-1)


def search_symmetric(x: torch.Tensor, grid: SymmetricGrid) -> Symmetric:
    """Best found symmetric solution for weights (L, n, G)."""
    scales = fit_symmetric(x, grid)
    # the largest scale goes to -scale_bottom, the end that reaches one further
    d = scales.gather(-1, scales.abs().argmax(-1, keepdim=True)) / -grid.scale_bottom
    last, error = _place_symmetric(x, grid, scales, d)
    best = last
    for _ in range(_REFINEMENTS):
        sum_vx, sum_vv = (last.levels * x).sum(0), (last.levels * last.levels).sum(0)
        above = (last.scales * sum_vx).sum(-1, keepdim=True)
        below = (last.scales * last.scales * sum_vv).sum(-1, keepdim=True)
        last, last_error = _place_symmetric(x, grid, _ratio(sum_vx, sum_vv), _ratio(above, below))
        best, error = _keep_better(best, error, last, last_error)
    return best
