"""A term into tensors by role, as files have them: the way back from `kinds`."""

from __future__ import annotations

import torch

from gossamer.adapters.rows import take_rows
from gossamer.adapters.spelling_tables import Role
from gossamer.adapters.terms import (
    BiasTerm,
    DecomposedTerm,
    DifferenceTerm,
    HadamardTerm,
    KroneckerTerm,
    LinearTerm,
    LowRankTerm,
    Matrix,
    folded,
    rank_of,
)

Values = dict[Role, torch.Tensor]


def roles_of(term: LinearTerm, always_alpha: bool = False) -> Values:
    """The tensors of a term by role; alpha where it differs from the rank, or always where there is a rank.

    What has no alpha in a file has its multiplier in a factor. A LoKr that is a part of a fused module is written as
    what it is then, a difference.
    """
    match term:
        case LowRankTerm():
            values: Values = {"down": term.down, "up": term.up}
            return values | _optional("bias", term.bias) | _alpha(term, always_alpha)
        case HadamardTerm():
            names: tuple[Role, ...] = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
            factors = (term.up, term.down, term.other_up, term.other_down)
            return dict(zip(names, factors, strict=True)) | _unscaled_bias(term) | _alpha(term, always_alpha)
        case KroneckerTerm():
            return _kronecker(term, always_alpha)
        case DifferenceTerm():
            whole = folded(term)
            assert isinstance(whole, DifferenceTerm)
            difference: Values = {"diff": whole.matrix}
            return difference | _optional("diff_b", whole.bias)
        case DecomposedTerm():
            return _decomposed(term, always_alpha)
        case BiasTerm():
            return _unscaled_bias(term)
    raise TypeError(f"no file has a {type(term).__name__}")


def _kronecker(term: KroneckerTerm, always_alpha: bool) -> Values:
    if not term.is_whole:
        product = torch.kron(term.left.value().float(), term.right.value().float())
        matrix = take_rows(product, term.kept)
        return roles_of(DifferenceTerm(matrix, term.multiplier, term.bias))
    if rank_of(term) is None:  # alpha means nothing beside two whole factors
        bias, whole = _unscaled_bias(term), folded(term)
        assert isinstance(whole, KroneckerTerm)
        return _factor("lokr_w1", whole.left) | _factor("lokr_w2", whole.right) | bias
    factors = _factor("lokr_w1", term.left) | _factor("lokr_w2", term.right)
    return factors | _unscaled_bias(term) | _alpha(term, always_alpha)


def _factor(name: str, matrix: Matrix) -> Values:
    if matrix.down is None:
        return {name: matrix.up}  # type: ignore[dict-item]
    return {f"{name}_a": matrix.up, f"{name}_b": matrix.down}  # type: ignore[dict-item]


def _decomposed(term: DecomposedTerm, always_alpha: bool) -> Values:
    magnitude: Values = {"magnitude": term.magnitude}
    return roles_of(term.inner, always_alpha) | magnitude | _optional("diff_b", term.bias)


def _alpha(term: LinearTerm, always: bool) -> Values:
    if term.multiplier == 1 and not always:
        return {}
    rank = rank_of(term)
    return {} if rank is None else {"alpha": torch.tensor(term.multiplier * rank, dtype=torch.float32)}


def _unscaled_bias(term: LinearTerm) -> Values:
    """A bias as `.diff_b`, which no alpha scales."""
    if term.bias is None:
        return {}
    return {"diff_b": term.bias if term.multiplier == 1 else term.bias.float() * term.multiplier}


def _optional(role: Role, value: torch.Tensor | None) -> Values:
    return {} if value is None else {role: value}
