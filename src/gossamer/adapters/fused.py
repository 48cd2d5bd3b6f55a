"""Terms of fused modules: one term of BFL's `qkv` or `linear1` into terms of its parts, and back.

    split   every part takes its own rows: of LoRA's and LoHa's ups, of a LoKr's product, of a difference, of the bias
            and of a DoRA's row magnitudes; what belongs to the columns is shared
    join    low-rank terms: `down` is shared where all parts have the same one; otherwise the downs are stacked, and
            `up` is zero except for the block of each part's rows and its own columns

Both are exact; only where parts of different alpha are joined do the multipliers go into `up`, in float32. Columns of a
part's `up` that hold only zeros do nothing and are left out, so a block-sparse term splits into terms as small as those
it was joined from. A DoRA whose magnitudes belong to the columns takes norms over the rows of all parts, so its parts
remember each other's names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from gossamer.adapters.terms import DecomposedTerm, LinearTerm, LowRankTerm, folded
from gossamer.checkpoints.flux_names import Part


def split_term(term: LinearTerm, parts: Sequence[Part]) -> dict[str, LinearTerm]:
    """The terms of a BFL module's parts by diffusers name; a part that is left unchanged has none."""
    if _is_one_whole_linear(parts):
        return {parts[0].name: term}
    if len(parts) > 1 and isinstance(term, DecomposedTerm) and not term.of_rows:
        term = replace(term, whole=tuple(part.name for part in parts))
    split = {part.name: term.rows(part.rows) for part in parts}
    if len(parts) == 1 or not isinstance(term, LowRankTerm):
        return split
    trimmed = {name: _without_idle_columns(part) for name, part in split.items() if isinstance(part, LowRankTerm)}
    return {name: part for name, part in trimmed.items() if part is not None}


def join_terms(terms: Mapping[str, LinearTerm], parts: Sequence[Part]) -> LinearTerm | None:
    """The term of a BFL module from the terms of its parts; None when no part has one.

    Raises LookupError where a module of several parts has a part that is no low-rank term: most kinds cannot be joined.
    """
    present = {part: terms[part.name] for part in parts if part.name in terms}
    if not present:
        return None
    if _is_one_whole_linear(parts):
        return next(iter(present.values()))
    if len(parts) == 1:
        ((part, term),) = present.items()
        return term.rows(_inverse(part))
    low_rank = {part: term for part, term in present.items() if isinstance(term, LowRankTerm)}
    other = next((part.name for part in present if part not in low_rank), None)
    if other is not None:
        raise LookupError(other)
    return _join_low_rank(low_rank, parts)


def _join_low_rank(present: Mapping[Part, LowRankTerm], parts: Sequence[Part]) -> LowRankTerm:
    present = _with_one_multiplier(present)
    first = next(iter(present.values()))
    shared = len(present) == len(parts) and all(_same_bytes(term.down, first.down) for term in present.values())
    height = max(stop for part in parts for _, stop in part.rows)
    down = first.down if shared else _stack_downs(list(present.values()))
    up = _stack_ups(present, height, shared)
    return LowRankTerm(down, up, first.multiplier, _stack_biases(present, height))


def _is_one_whole_linear(parts: Sequence[Part]) -> bool:
    return len(parts) == 1 and not parts[0].rows


def _inverse(part: Part) -> tuple[tuple[int, int], ...]:
    """The ranges that put the rows of a part back where they came from."""
    starts, done = [], 0
    for start, stop in part.rows:
        starts.append((start, (done, done + stop - start)))
        done += stop - start
    return tuple(rows for _, rows in sorted(starts))


def _without_idle_columns(term: LowRankTerm) -> LowRankTerm | None:
    used = term.up.ne(0).any(dim=0)
    if used.all():
        return term
    if not used.any():
        if term.bias is None or not term.bias.any():
            return None
        used[0] = True  # a term needs a rank of at least one to carry its bias
    return LowRankTerm(term.down[used], term.up[:, used], term.multiplier, term.bias)


def _with_one_multiplier(terms: Mapping[Part, LowRankTerm]) -> dict[Part, LowRankTerm]:
    """A module has one alpha: where the parts differ, the multipliers go into up and bias, in float32."""
    if len({term.multiplier for term in terms.values()}) == 1:
        return dict(terms)
    pairs = ((part, folded(term)) for part, term in terms.items())
    return {part: term for part, term in pairs if isinstance(term, LowRankTerm)}


def _place_rows(target: torch.Tensor, part: Part, values: torch.Tensor) -> None:
    """Write (rows, ...) in the part's order to the part's rows of the target."""
    done = 0
    for start, stop in part.rows:
        target[start:stop] = values[done : done + stop - start]
        done += stop - start


def _stack_ups(terms: Mapping[Part, LowRankTerm], height: int, shared: bool) -> torch.Tensor:
    first = next(iter(terms.values()))
    columns = first.rank if shared else sum(term.rank for term in terms.values())
    up = torch.zeros(height, columns, dtype=_common_dtype([term.up for term in terms.values()]))
    column = 0
    for part, term in terms.items():
        _place_rows(up[:, column : column + term.rank], part, term.up)
        column += 0 if shared else term.rank
    return up


def _stack_biases(terms: Mapping[Part, LowRankTerm], height: int) -> torch.Tensor | None:
    biases = {part: term.bias for part, term in terms.items() if term.bias is not None}
    if not biases:
        return None
    stacked = torch.zeros(height, dtype=_common_dtype(list(biases.values())))
    for part, bias in biases.items():
        _place_rows(stacked, part, bias)
    return stacked


def _common_dtype(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    """The type that all have; float32, which holds every narrower one exactly, where they differ."""
    dtypes = {tensor.dtype for tensor in tensors}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _stack_downs(terms: Sequence[LowRankTerm]) -> torch.Tensor:
    dtype = _common_dtype([term.down for term in terms])
    return torch.cat([term.down.to(dtype) for term in terms])


def _same_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equality that every type has, the 8-bit floats included."""
    return first.dtype == second.dtype and torch.equal(*(t.contiguous().view(torch.uint8) for t in (first, second)))
