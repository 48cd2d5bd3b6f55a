"""Linears that read the same input as one product: y = [layer_0(x), layer_1(x), ...].

What an operand needs besides its decoding (stacked low-rank terms, row scales, the bias, a merged copy) is made once
and kept until an adapter, a scale or the place of a layer changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from gossamer.formats import Packed
from gossamer.kernels.decode_ops import Backend, decode_into, measure_row_scale_into
from gossamer.kernels.decode_reference import LARGEST_CODE, round_to, row_scales
from gossamer.kernels.low_rank import StackedTerms, set_scales, stack_terms
from gossamer.kernels.pointwise.backends import Pointwise
from gossamer.kernels.pointwise.rows import Rows
from gossamer.kernels.products import SCALED_PRODUCTS, matmul, matmul_int8
from gossamer.layers.execution import Execution
from gossamer.layers.low_rank import LowRank

if TYPE_CHECKING:
    from gossamer.layers.linear import QuantLinear


@dataclass(frozen=True, eq=False)
class Part:
    """What fills rows `start` to `stop` of the operand."""

    packed: Packed
    terms: StackedTerms | None
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Operand:
    """The weight side of a product (out, width): kept as `weight`, or decoded from `parts` before every product."""

    parts: tuple[Part, ...]
    weight: torch.Tensor | None
    scale: torch.Tensor | None
    bias: torch.Tensor | None
    rows: int
    width: int


@dataclass(frozen=True, eq=False)
class Stacked:
    """The active low-rank terms of a layer side by side, as long as they are the same ones."""

    active: tuple[LowRank, ...]
    terms: StackedTerms


class GroupProduct:
    """The product of a group of layers, and what it keeps between calls."""

    def __init__(self) -> None:
        self._operand: Operand | None = None
        self._made_for: list[tuple[QuantLinear, int]] = []
        self._made_from: Packed | None = None
        self._stacked: dict[QuantLinear, Stacked] = {}
        self._base: tuple[object, torch.Tensor] | None = None

    def __call__(
        self, layers: Sequence[QuantLinear], rows: Rows, out: torch.Tensor | None = None, joined: Packed | None = None
    ) -> torch.Tensor:
        """Rows (..., width) to (..., sum of outputs), into `out` where it is given.

        `joined` holds the stored bytes of all layers side by side, where they lie so.
        """
        execution = execution_of(layers[0])
        operand = self._current(layers, joined)
        weight = operand.weight
        if weight is None:
            weight = execution.workspace.weight(operand.rows, operand.width, execution.operand, rows.values.device)
            _decode(operand.parts, execution, weight, operand.scale)
        return _multiply(execution, rows, weight, operand, out)

    def _current(self, layers: Sequence[QuantLinear], joined: Packed | None) -> Operand:
        """The operand as the layers are now."""
        asked = [(layer, layer.revision) for layer in layers]
        if self._operand is None or joined is not self._made_from or asked != self._made_for:
            self._operand = None  # a merged copy is free before the next one is made
            self._operand = self._make(layers, joined)
            self._made_for, self._made_from = asked, joined
        return self._operand

    def _make(self, layers: Sequence[QuantLinear], joined: Packed | None) -> Operand:
        execution = execution_of(layers[0])
        if any(not isinstance(term, LowRank) for layer in layers for term in layer.active()):
            return _merged(layers, execution)
        parts = self._parts(layers, joined)
        bias = _bias(layers, execution.activations)
        operand = Operand(parts, None, None, bias, parts[-1].stop, layers[0].in_features)
        if execution.decode == "none" and _is_operand(operand):
            return replace(operand, weight=_codes(parts[0].packed), scale=parts[0].packed.tensors.get("scale"))
        if execution.rows_have_scales:
            operand = replace(operand, scale=self._row_scale(layers, operand, execution))
        if execution.keeps_merged:
            kept = torch.empty(operand.rows, operand.width, dtype=execution.operand, device=parts[0].packed.device)
            _decode(parts, execution, kept, operand.scale)
            operand = replace(operand, weight=kept)
        return operand

    # low-rank terms ---------------------------------------------------------------------------------------------------

    def _parts(self, layers: Sequence[QuantLinear], joined: Packed | None) -> tuple[Part, ...]:
        """One part a layer; one in all where the bytes lie side by side and no adapter tells the layers apart."""
        before, self._stacked = self._stacked, {}
        for layer in layers:
            if active := _low_rank(layer):
                self._stacked[layer] = _stack(active, before.get(layer))
        if joined is not None and not self._stacked:
            return (Part(joined, None, 0, joined.shape[0]),)
        parts, stop = [], 0
        for layer in layers:
            start, stop = stop, stop + layer.out_features
            stacked = self._stacked.get(layer)
            parts.append(Part(layer.packed, None if stacked is None else stacked.terms, start, stop))
        return tuple(parts)

    # row scales -------------------------------------------------------------------------------------------------------

    def _row_scale(self, layers: Sequence[QuantLinear], operand: Operand, execution: Execution) -> torch.Tensor:
        """(out,): what one unit of code is worth in each row.

        Measured for int8. For e4m3, whose step follows the value, the base is measured once and each term adds a bound,
        so that adapters and their scales change without another look at the weights.
        """
        if execution.operand != torch.float8_e4m3fn:
            return _measured_scale(operand.parts, operand, execution)
        scale = self._base_scale(layers, operand, execution)
        if not self._stacked:
            return scale
        unit = 1.0 / LARGEST_CODE[execution.operand]
        scale, stop = scale.clone(), 0
        for layer in layers:
            start, stop = stop, stop + layer.out_features
            for each in _low_rank(layer):
                scale[start:stop].add_(each.row_bound(), alpha=abs(each.scale) * unit)
        return scale

    def _base_scale(self, layers: Sequence[QuantLinear], operand: Operand, execution: Execution) -> torch.Tensor:
        """The row scale without adapters, measured again only after a layer was moved or widened."""
        key = [(layer, layer.place, layer.in_features) for layer in layers]
        if self._base is None or self._base[0] != key:
            bare = [replace(part, terms=None) for part in operand.parts]
            self._base = (key, _measured_scale(bare, operand, execution))
        return self._base[1]


def as_rows(x: torch.Tensor, dtype: torch.dtype, pointwise: Pointwise) -> Rows:
    """x (batch, tokens, in) as rows of a type; nothing is done where it is of that type."""
    return Rows(x) if x.dtype == dtype else pointwise.quantize_rows(x, dtype)


def execution_of(layer: QuantLinear) -> Execution:
    """The execution of a layer that has one."""
    if layer.execution is None:
        raise ValueError("the layer has no execution")
    return layer.execution


def _low_rank(layer: QuantLinear) -> tuple[LowRank, ...]:
    return tuple(term for term in layer.active() if isinstance(term, LowRank))


def _stack(active: tuple[LowRank, ...], before: Stacked | None) -> Stacked:
    """The terms side by side; where only scales changed, in the tensors that are there."""
    if before is not None and before.active == active:  # a LowRank equals itself only
        set_scales(before.terms, [each.scale for each in active])
        return before
    return Stacked(active, stack_terms([(each.up, each.down, each.scale) for each in active]))


# the weight -----------------------------------------------------------------------------------------------------------


def _merged(layers: Sequence[QuantLinear], execution: Execution) -> Operand:
    """A merged copy, kept until an adapter changes: for terms that no kernel adds while it decodes."""
    rows, width, device = sum(layer.out_features for layer in layers), layers[0].in_features, layers[0].packed.device
    kept = torch.empty(rows, width, dtype=execution.operand, device=device)
    scale = torch.empty(rows, dtype=torch.float32, device=device) if execution.rows_have_scales else None
    stop = 0
    for layer in layers:
        start, stop = stop, stop + layer.out_features
        weight, own = layer.merged_weight(), None
        if scale is not None:
            own = scale[start:stop].copy_(row_scales(weight, execution.operand))
        kept[start:stop] = round_to(weight, execution.operand, own)
    return Operand((), kept, scale, _bias(layers, execution.activations), rows, width)


def _is_operand(operand: Operand) -> bool:
    """Whether the stored codes can be multiplied as they are."""
    first = operand.parts[0]
    return len(operand.parts) == 1 and first.terms is None and first.packed.shape[1] == operand.width


def _bias(layers: Sequence[QuantLinear], dtype: torch.dtype) -> torch.Tensor | None:
    """All biases side by side (out,), zeros for a layer without one."""
    biases = [layer.effective_bias(dtype) for layer in layers]
    if all(bias is None for bias in biases):
        return None
    if len(biases) == 1:
        return biases[0]
    device = layers[0].packed.device
    pairs = zip(biases, layers, strict=True)
    filled = [torch.zeros(of.out_features, dtype=dtype, device=device) if bias is None else bias for bias, of in pairs]
    return torch.cat(filled)


def _measured_scale(parts: Sequence[Part], operand: Operand, execution: Execution) -> torch.Tensor:
    """(out,): largest value of each row over the largest code."""
    scale = torch.empty(operand.rows, dtype=torch.float32, device=parts[0].packed.device)
    for part in parts:
        own = scale[part.start : part.stop]
        backend = _writer(execution, part)
        measure_row_scale_into(part.packed, own, execution.operand, operand.width, backend, part.terms)
    return scale


def _decode(parts: Sequence[Part], execution: Execution, weight: torch.Tensor, scale: torch.Tensor | None) -> None:
    for part in parts:
        own = slice(part.start, part.stop)
        row_scale = None if scale is None else scale[own]
        decode_into(part.packed, weight[own], _writer(execution, part), part.terms, row_scale)


def _writer(execution: Execution, part: Part) -> Backend:
    return execution.merge if part.terms is not None or execution.decode == "none" else execution.decode


def _codes(packed: Packed) -> torch.Tensor:
    return packed.tensors["values"] if "values" in packed.tensors else packed.tensors["codes"]


# the product ----------------------------------------------------------------------------------------------------------


def _multiply(
    execution: Execution, rows: Rows, weight: torch.Tensor, operand: Operand, out: torch.Tensor | None
) -> torch.Tensor:
    """One library product, written straight into `out` where its rows lie side by side."""
    target = _flat(out, execution.activations)
    codes = rows.values.reshape(-1, operand.width)
    if rows.scale is None:
        result = matmul(codes, weight, operand.bias, target)
    else:
        assert operand.scale is not None
        scaled = (codes, rows.scale.reshape(-1), weight, operand.scale, operand.bias, execution.activations, target)
        if execution.product == "int_mm":
            result = matmul_int8(*scaled, execution.pointwise.rescale_product)
        else:
            result = SCALED_PRODUCTS[execution.product](*scaled)
    shaped = result.view(*rows.values.shape[:-1], operand.rows)
    if out is None:
        return shaped
    return out if target is not None else out.copy_(shaped)


def _flat(out: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """`out` as a matrix, or None where the product cannot write into it: scattered rows, or another type."""
    fit = out is not None and out.is_contiguous() and out.dtype == dtype
    return out.view(-1, out.shape[-1]) if out is not None and fit else None
