"""Decoding as operators that `torch.compile(fullgraph=True)` takes as they are: gossamer::decode, gossamer::row_scale.

Importing this module registers them. `backend` is "triton" or "torch", chosen before the call; neither stands in for
the other. Both operators only write into tensors that they are given.

A call that nothing traces or records goes straight to the backend: passing through an operator costs the host five
times what preparing the launch costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch

from gossamer.formats import Packed
from gossamer.kernels import decode_reference
from gossamer.kernels.low_rank import StackedTerms
from gossamer.kernels.operators import through_operator

Backend = Literal["triton", "torch"]


def decode_into(
    packed: Packed,
    out: torch.Tensor,
    backend: Backend,
    terms: StackedTerms | None = None,
    row_scale: torch.Tensor | None = None,
) -> None:
    """Write W_eff into `out`, as `kernels.decode.decode` states it."""
    if through_operator(out):
        _decode(*_flat(packed), backend, out, row_scale, *_factors(terms))
    else:
        _decode_now(packed, out, backend, terms, row_scale)


def bound_decode(
    packed: Packed,
    out: torch.Tensor,
    backend: Backend,
    terms: StackedTerms | None = None,
    row_scale: torch.Tensor | None = None,
) -> Callable[[], None]:
    """`decode_into` made ready for many calls that nothing traces or records, on tensors that stay where they are."""
    if backend == "torch":
        return partial(decode_reference.decode_in_torch, packed, out, terms, row_scale)
    from gossamer.kernels import decode  # needs Triton

    return decode.bound_decode(packed, out, terms, row_scale)


def measure_row_scale_into(
    packed: Packed,
    row_scale: torch.Tensor,
    dtype: torch.dtype,
    width: int,
    backend: Backend,
    terms: StackedTerms | None = None,
) -> None:
    """Write the row scales of W_eff, as `kernels.decode.measure_row_scale` states it."""
    if through_operator(row_scale):
        _row_scale(*_flat(packed), backend, row_scale, dtype, width, *_factors(terms))
    else:
        _row_scale_now(packed, row_scale, dtype, width, backend, terms)


def _decode_now(
    packed: Packed,
    out: torch.Tensor,
    backend: str,
    terms: StackedTerms | None,
    row_scale: torch.Tensor | None,
) -> None:
    if backend == "torch":
        decode_reference.decode_in_torch(packed, out, terms, row_scale)
    else:
        from gossamer.kernels.decode import decode  # needs Triton

        decode(packed, out, terms, row_scale)


def _row_scale_now(
    packed: Packed,
    row_scale: torch.Tensor,
    dtype: torch.dtype,
    width: int,
    backend: str,
    terms: StackedTerms | None,
) -> None:
    if backend == "torch":
        decode_reference.measure_row_scale_in_torch(packed, row_scale, dtype, width, terms)
    else:
        from gossamer.kernels.decode import measure_row_scale  # needs Triton

        measure_row_scale(packed, row_scale, dtype, width, terms)


def _flat(packed: Packed) -> tuple[str, str, list[torch.Tensor], int, int]:
    """A Packed as types that an operator may have: format, roles, tensors, out, in."""
    return packed.format, " ".join(packed.tensors), list(packed.tensors.values()), *packed.shape


def _packed(storage: str, roles: str, tensors: Sequence[torch.Tensor], out_features: int, in_features: int) -> Packed:
    return Packed(storage, dict(zip(roles.split(), tensors, strict=True)), (out_features, in_features))


def _factors(
    terms: StackedTerms | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    return (None, None, None, None) if terms is None else (terms.up, terms.down, terms.scale, terms.power)


def _terms(
    up: torch.Tensor | None, down: torch.Tensor | None, scale: torch.Tensor | None, power: torch.Tensor | None
) -> StackedTerms | None:
    if up is None or down is None or scale is None or power is None:
        return None
    return StackedTerms(up, down, scale, power, (up.shape[1],))


@torch.library.custom_op("gossamer::decode", mutates_args=("out",))
def _decode(
    storage: str,
    roles: str,
    tensors: Sequence[torch.Tensor],
    out_features: int,
    in_features: int,
    backend: str,
    out: torch.Tensor,
    row_scale: torch.Tensor | None,
    up: torch.Tensor | None,
    down: torch.Tensor | None,
    scale: torch.Tensor | None,
    power: torch.Tensor | None,
) -> None:
    packed = _packed(storage, roles, tensors, out_features, in_features)
    _decode_now(packed, out, backend, _terms(up, down, scale, power), row_scale)


@torch.library.custom_op("gossamer::row_scale", mutates_args=("row_scale",))
def _row_scale(
    storage: str,
    roles: str,
    tensors: Sequence[torch.Tensor],
    out_features: int,
    in_features: int,
    backend: str,
    row_scale: torch.Tensor,
    dtype: torch.dtype,
    width: int,
    up: torch.Tensor | None,
    down: torch.Tensor | None,
    scale: torch.Tensor | None,
    power: torch.Tensor | None,
) -> None:
    packed = _packed(storage, roles, tensors, out_features, in_features)
    _row_scale_now(packed, row_scale, dtype, width, backend, _terms(up, down, scale, power))


@_decode.register_fake
def _(*_: object) -> None:
    """Nothing is returned; `out` is written in place."""


@_row_scale.register_fake
def _(*_: object) -> None:
    """Nothing is returned; `row_scale` is written in place."""
