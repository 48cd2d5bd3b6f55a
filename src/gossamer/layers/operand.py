"""The weight side of a product (out, width): what fills it, what one unit of its codes is worth, and its bias."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from gossamer.formats import Packed
from gossamer.kernels.decode_ops import Backend, bound_decode, decode_into, measure_row_scale_into
from gossamer.kernels.decode_reference import round_to, row_scales
from gossamer.kernels.operators import lasting, through_operator
from gossamer.layers.execution import Execution
from gossamer.layers.low_rank import LowRank
from gossamer.layers.model_terms import Lift
from gossamer.layers.stacks import Stack, Wanted
from gossamer.layers.term import Term

if TYPE_CHECKING:
    from gossamer.layers.join import Joined
    from gossamer.layers.linear import QuantLinear


BANDS_LARGEST = 8  # layers of one launch; more and narrower bands would leave programs little to do


@dataclass(frozen=True, eq=False)
class Part:
    """What fills rows `start` to `stop` of the operand."""

    packed: Packed
    stack: Stack | None
    start: int
    stop: int

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """Its rows of something that has all rows."""
        return whole if self.stop - self.start == len(whole) else whole[self.start : self.stop]


@dataclass(frozen=True, eq=False)
class Operand:
    """The weight side: kept as `weight`, or written from `parts` before every product.

    `copied` says that what is kept was written from `parts`, and is no stored weight. `base` is the row scale without
    terms where `scale` is that plus what terms add.
    """

    parts: tuple[Part, ...]
    weight: torch.Tensor | None
    scale: torch.Tensor | None
    base: torch.Tensor | None
    bias: torch.Tensor | None
    rows: int
    width: int
    copied: bool = False

    def lifts(self) -> Iterator[Lift]:
        """Rows whose scale follows from the scales of terms."""
        if self.base is None or self.scale is None:
            return
        for part in self.parts:
            added = part.stack.lift if part.stack is not None else None
            if added is not None:
                yield part.of(self.scale), part.of(self.base), added


class Keeper:
    """Writes the weight that an operand keeps, each time into the same memory, with launches that are ready."""

    def __init__(self, operand: Operand, execution: Execution, kept: torch.Tensor) -> None:
        self._launches = bound(operand, execution, kept)

    def __call__(self) -> None:
        """Write it anew."""
        for launch in self._launches:
            launch()


class Writer:
    """Writes the weight of an operand through the shared buffer, launches ready for the buffer that is there."""

    def __init__(self, operand: Operand, execution: Execution, device: torch.device) -> None:
        self._operand, self._execution, self._device = operand, execution, device
        self._bytes: torch.Tensor | None = None
        self._weight: torch.Tensor | None = None
        self._launches: tuple[Callable[[], None], ...] = ()

    def __call__(self) -> torch.Tensor:
        """The weight, valid until the next one is written."""
        operand, execution = self._operand, self._execution
        held = execution.workspace.at_least(operand.rows * operand.width * execution.operand.itemsize, self._device)
        if through_operator(held):
            weight = as_matrix(held, operand.rows, operand.width, execution.operand)
            decode(operand, execution, weight)
            return weight
        if held is not self._bytes or self._weight is None:
            self._bytes = held
            with lasting():
                self._weight = as_matrix(held, operand.rows, operand.width, execution.operand)
                self._launches = bound(operand, execution, self._weight)
        for launch in self._launches:
            launch()
        return self._weight


def as_matrix(held: torch.Tensor, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """The first bytes of a buffer as a matrix."""
    return held[: rows * columns * dtype.itemsize].view(dtype).view(rows, columns)


def decode(operand: Operand, execution: Execution, weight: torch.Tensor) -> None:
    """Write base and terms of every part into `weight`."""
    for part in operand.parts:
        decode_into(*_arguments(part, operand, execution, weight))


def bound(operand: Operand, execution: Execution, weight: torch.Tensor) -> tuple[Callable[[], None], ...]:
    """The calls of `decode`, made ready once."""
    return tuple(bound_decode(*_arguments(part, operand, execution, weight)) for part in operand.parts)


def _arguments(part: Part, operand: Operand, execution: Execution, weight: torch.Tensor) -> tuple:  # type: ignore[type-arg]
    scale = None if operand.scale is None else part.of(operand.scale)
    terms = None if part.stack is None else part.stack.terms
    return part.packed, part.of(weight), writer_of(execution, part), terms, scale


def writer_of(execution: Execution, part: Part) -> Backend:
    """Who decodes a part."""
    return execution.merge if part.stack is not None or execution.decode == "none" else execution.decode


def measure(parts: Sequence[Part], scale: torch.Tensor, width: int, execution: Execution) -> torch.Tensor:
    """Write into `scale` (out,) the largest value of each row over the largest code; hands it back."""
    for part in parts:
        terms = None if part.stack is None else part.stack.terms
        backend = writer_of(execution, part)
        measure_row_scale_into(part.packed, part.of(scale), execution.operand, width, backend, terms)
    return scale


def bias_of(layers: Sequence[QuantLinear], dtype: torch.dtype) -> torch.Tensor | None:
    """All biases side by side (out,), zeros for a layer without one."""
    biases = [layer.effective_bias(dtype) for layer in layers]
    if all(bias is None for bias in biases):
        return None
    pairs = zip(biases, layers, strict=True)
    filled = [_no_bias(layer, dtype) if bias is None else bias for bias, layer in pairs]
    return torch.cat(filled)  # a copy even of one: a load or a cast of the model writes into the layer's own


def _no_bias(layer: QuantLinear, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(layer.out_features, dtype=dtype, device=layer.packed.device)


def needs_merging(active: Iterable[Sequence[Term]]) -> bool:
    """Whether a term is of a kind that no kernel adds while it decodes."""
    return any(not isinstance(term, LowRank) for terms in active for term in terms)


def plan(
    layers: Sequence[QuantLinear], active: Sequence[Sequence[Term]], joined: Joined | None
) -> list[tuple[Packed, int, Wanted | None]]:
    """Stored bytes, rows and terms of each part: one in all where the bytes lie side by side, else one a layer."""
    low_rank = [cast(tuple[LowRank, ...], tuple(terms)) for terms in active]
    if joined is not None:
        packed, rows = joined.packed, joined.packed.shape[0]
        if not any(low_rank):
            return [(packed, rows, None)]
        bands = _bands([layer.out_features for layer in layers], low_rank)
        if bands is not None:
            return [(packed, rows, Wanted(tuple(low_rank), bands))]
    pairs = zip(layers, low_rank, strict=True)
    return [(of.packed, of.out_features, Wanted((terms,), (1,)) if terms else None) for of, terms in pairs]


def _bands(heights: Sequence[int], active: Sequence[tuple[LowRank, ...]]) -> tuple[int, ...] | None:
    """How many bands of one height each layer fills, where its terms have the same ranks as those of the others."""
    ranks = {tuple([term.rank for term in terms]) for terms in active}
    band = math.gcd(*heights)
    if len(ranks) > 1 or sum(heights) // band > BANDS_LARGEST:
        return None
    return tuple(height // band for height in heights)


def merged(layers: Sequence[QuantLinear], execution: Execution) -> Operand:
    """A merged copy, kept until an adapter comes or goes: for terms that no kernel adds while it decodes."""
    rows, width, device = sum(layer.out_features for layer in layers), layers[0].in_features, layers[0].packed.device
    kept = torch.empty(rows, width, dtype=execution.operand, device=device)
    scale = torch.empty(rows, dtype=torch.float32, device=device) if execution.rows_have_scales else None
    operand = Operand((), kept, scale, None, bias_of(layers, execution.activations), rows, width)
    merge(operand, kept, layers)
    return operand


def merge(operand: Operand, kept: torch.Tensor, layers: Sequence[QuantLinear]) -> None:
    """Write the weights of a merged copy and their row scales, as the terms are now, in place."""
    stop = 0
    for layer in layers:
        start, stop = stop, stop + layer.out_features
        weight, own = layer.merged_weight(), None
        if operand.scale is not None:
            own = operand.scale[start:stop].copy_(row_scales(weight, kept.dtype))
        kept[start:stop] = round_to(weight, kept.dtype, own)


def renew_bias(operand: Operand, layers: Sequence[QuantLinear], dtype: torch.dtype) -> None:
    """Write the bias as the terms are now, in place."""
    fresh = bias_of(layers, dtype)
    if operand.bias is not None and fresh is not None:
        operand.bias.copy_(fresh)


def stored_as_operand(part: Part, width: int) -> bool:
    """Whether the stored codes of a part can be multiplied as they are."""
    return part.stack is None and part.packed.shape[1] == width


def codes_of(packed: Packed) -> torch.Tensor:
    """The stored codes, or plain values."""
    return packed.tensors["values"] if "values" in packed.tensors else packed.tensors["codes"]
