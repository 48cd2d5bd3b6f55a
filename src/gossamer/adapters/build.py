"""An adapter's term into what a layer adds: low-rank where that is exact and small, so that the decode pass adds it.

    LoHa    (a b) * (c d)       = rows of a times rows of c, then columns of b times columns of d     rank r s
    LoKr    left (x) (up down)  = (left (x) up) (I (x) down) = (I (x) up) (left (x) down)
            (lu ld) (x) (u d)   = (lu (x) u) (ld (x) d)                                               rank r s

A product of two 8- or 16-bit floats is exact in float32, so nothing is lost there; float32 factors round once. Above
LARGEST_RANK, for differences and for DoRA the layer keeps a merged copy of its weight instead, see `cost`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from gossamer.adapters.rows import take_rows
from gossamer.adapters.terms import (
    BiasTerm,
    DecomposedTerm,
    DifferenceTerm,
    HadamardTerm,
    KroneckerTerm,
    LinearTerm,
    LowRankTerm,
)
from gossamer.layers import Decomposed, Difference, Hadamard, Kronecker, LowRank, QuantLinear, Strength, Term

# the largest rank whose cost a step was measured at: 1 to 10 %, where a merged copy costs as much as the weight
LARGEST_RANK = 64

Factors = tuple[torch.Tensor, torch.Tensor]  # up (out, rank), down (rank, in)


def layer_term(layer: QuantLinear, term: LinearTerm, name: str, strength: Strength) -> Term:
    """What the layer adds, acting with a strength; not on the layer's device yet."""
    factor, bias = term.multiplier, term.bias
    match term:
        case LowRankTerm():
            return LowRank(name, term.down, term.up, factor, bias, strength)
        case BiasTerm():
            return LowRank(name, *_no_change(layer, term), factor, bias, strength)
        case DifferenceTerm():
            return Difference(name, term.matrix, factor, bias, strength)
        case DecomposedTerm():
            inner = layer_term(layer, term.inner, name, Strength())
            return Decomposed(name, inner, term.magnitude, factor, bias, strength=strength)
        case KroneckerTerm() | HadamardTerm():
            factors = low_rank_factors(term)
            if factors is not None:
                return LowRank(name, factors[1], factors[0], factor, bias, strength)
            make = _kronecker if isinstance(term, KroneckerTerm) else _hadamard
            return make(term, name, strength)  # type: ignore[arg-type]
    raise TypeError(f"no layer adds a {type(term).__name__}")


def _no_change(layer: QuantLinear, term: BiasTerm) -> tuple[torch.Tensor, torch.Tensor]:
    """(down, up) of a rank of one that adds zeros: a term needs one to carry its bias."""
    dtype = term.bias.dtype
    return torch.zeros(1, layer.in_features, dtype=dtype), torch.zeros(layer.out_features, 1, dtype=dtype)


def _kronecker(term: KroneckerTerm, name: str, strength: Strength) -> Kronecker:
    return Kronecker(name, term.left.value(), term.right.value(), term.multiplier, term.bias, term.kept, strength)


def _hadamard(term: HadamardTerm, name: str, strength: Strength) -> Hadamard:
    factors = term.up, term.down, term.other_up, term.other_down
    return Hadamard(name, *factors, term.multiplier, term.bias, strength)


# as low-rank terms ----------------------------------------------------------------------------------------------------


def low_rank_factors(term: KroneckerTerm | HadamardTerm) -> Factors | None:
    """(up, down) in float32 whose product is the term without its multiplier; None where the rank is too large."""
    if isinstance(term, HadamardTerm):
        if term.down.shape[0] * term.other_down.shape[0] > LARGEST_RANK:
            return None
        return _row_products(term.up, term.other_up), _row_products(term.down.T, term.other_down.T).T.contiguous()
    rank, make = min(_kronecker_ways(term), key=lambda way: way[0], default=(LARGEST_RANK + 1, None))
    if make is None or rank > LARGEST_RANK:
        return None
    up, down = make()
    return take_rows(up, term.kept) if term.kept else up, down


def _kronecker_ways(term: KroneckerTerm) -> list[tuple[int, Callable[[], Factors]]]:
    """Each way to write a Kronecker product with a factored right side as up @ down, with its rank."""
    left, right = term.left, term.right
    if right.down is None:
        return []
    u, d, rank = right.up.float(), right.down.float(), right.down.shape[0]
    if left.down is not None:
        ld = left.down.float()
        return [(left.down.shape[0] * rank, lambda: (torch.kron(left.up.float(), u), torch.kron(ld, d)))]
    whole = left.up.float()
    rows, columns = whole.shape
    return [
        (columns * rank, lambda: (torch.kron(whole, u), torch.kron(torch.eye(columns, device=d.device), d))),
        (rows * rank, lambda: (torch.kron(torch.eye(rows, device=u.device), u), torch.kron(whole, d))),
    ]


def _row_products(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """(rows, r) and (rows, s) to float32 (rows, r s): every product of two values of a row."""
    return (first.float()[:, :, None] * second.float()[:, None, :]).flatten(1)
