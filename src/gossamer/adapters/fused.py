"""Low-rank terms of fused modules: one term of BFL's `qkv` or `linear1` into terms of its parts, and back.

    split   every part shares `down` and takes its own rows of `up` and of the bias
    join    `down` is shared where all parts have the same one; otherwise the downs are stacked, and `up` is zero
            except for the block of each part's rows and its own columns

Both are exact; only where parts of different alpha are joined do the multipliers go into `up`, in float32. Columns of a
part's `up` that hold only zeros do nothing and are left out, so a block-sparse term splits into terms as small as those
it was joined from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from gossamer.adapters.adapter import LowRankTerm
from gossamer.checkpoints.flux_names import Part


def split_term(term: LowRankTerm, parts: Sequence[Part]) -> dict[str, LowRankTerm]:
    """The terms of a BFL module's parts by diffusers name; a part that is left unchanged has none."""
    if _is_one_whole_linear(parts):
        return {parts[0].name: term}
    terms = {part.name: _rows_of_term(term, part) for part in parts}
    if len(parts) == 1:
        return terms
    trimmed = {name: _without_idle_columns(part_term) for name, part_term in terms.items()}
    return {name: part_term for name, part_term in trimmed.items() if part_term is not None}


def join_terms(terms: Mapping[str, LowRankTerm], parts: Sequence[Part]) -> LowRankTerm | None:
    """The term of a BFL module from the terms of its parts; None when no part has one."""
    present = {part: terms[part.name] for part in parts if part.name in terms}
    if not present:
        return None
    if _is_one_whole_linear(parts):
        return next(iter(present.values()))
    present = _with_one_multiplier(present)
    first = next(iter(present.values()))
    shared = len(present) == len(parts) and all(_same_bytes(term.down, first.down) for term in present.values())
    height = max(stop for part in parts for _, stop in part.rows)
    down = first.down if shared else _stack_downs(list(present.values()))
    up = _stack_ups(present, height, shared)
    return LowRankTerm(down, up, first.multiplier, _stack_biases(present, height))


def _is_one_whole_linear(parts: Sequence[Part]) -> bool:
    return len(parts) == 1 and not parts[0].rows


def _rows_of(values: torch.Tensor, part: Part) -> torch.Tensor:
    """The part's rows of (rows, ...), in the part's order."""
    pieces = [values[start:stop] for start, stop in part.rows]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _rows_of_term(term: LowRankTerm, part: Part) -> LowRankTerm:
    bias = None if term.bias is None else _rows_of(term.bias, part)
    return LowRankTerm(term.down, _rows_of(term.up, part), term.multiplier, bias)


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
    return {
        part: LowRankTerm(
            term.down,
            term.up.float() * term.multiplier,
            1.0,
            None if term.bias is None else term.bias.float() * term.multiplier,
        )
        for part, term in terms.items()
    }


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
