"""What an adapter takes of the memory of a model's devices while it is attached.

Low-rank terms are added while a weight is decoded and take the bytes of their factors. Other kinds need the weight as a
whole: layers that run through kernels keep it merged, in the type that their product reads, until an adapter changes.
One such term makes its whole group (q, k and v; a single block's linear1) a merged copy, as the group is one product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from gossamer.layers import LinearGroup, LowRank, QuantLinear, Term


@dataclass(frozen=True)
class Cost:
    """Bytes of an adapter's own tensors, bytes of merged copies that it alone would cause, and the reason for those.

    The reason is empty where nothing is merged. Adapters that need merged copies of the same layers share them.
    """

    factor_bytes: int = 0
    merged_bytes: int = 0
    reason: str = ""

    @property
    def total_bytes(self) -> int:
        """Both together."""
        return self.factor_bytes + self.merged_bytes

    def __add__(self, other: Cost) -> Cost:
        reasons = dict.fromkeys(reason for reason in (self.reason, other.reason) if reason)
        bytes_ = self.factor_bytes + other.factor_bytes, self.merged_bytes + other.merged_bytes
        return Cost(*bytes_, " ".join(reasons))


def cost_of(model: nn.Module, terms: Mapping[QuantLinear, Term]) -> Cost:
    """The cost of these terms on layers of a model."""
    factors = sum(term.nbytes for term in terms.values())
    dense = [layer for layer, term in terms.items() if not isinstance(term, LowRank)]
    if not dense:
        return Cost(factors)
    merged = {layer for group in _products(model) if any(layer in dense for layer in group) for layer in group}
    merged.update(dense)
    kinds = " and ".join(dict.fromkeys(_kind(terms[layer]) for layer in dense))
    kept = sum(_merged_bytes(layer) for layer in merged)
    if not kept:
        return Cost(factors, 0, f"{kinds}: {len(dense)} linears are merged anew at every call.")
    return Cost(factors, kept, f"{kinds}: {len(merged)} linears keep a merged copy of their weights.")


def _products(model: nn.Module) -> Iterator[tuple[QuantLinear, ...]]:
    """The layers of each group of linears that runs as one product."""
    for module in model.modules():
        for group in vars(module).values():
            if isinstance(group, LinearGroup):
                layers = [layer for layer in group.layers if isinstance(layer, QuantLinear)]
                if len(layers) == len(group.layers) and _fit(layers):
                    yield tuple(layers)


def _fit(layers: list[QuantLinear]) -> bool:
    first = layers[0].execution
    others = [layer.execution for layer in layers[1:]]
    return first is not None and all(other is not None and first.fits(other) for other in others)


def _merged_bytes(layer: QuantLinear) -> int:
    """Of one layer's merged copy; 0 where it is merged anew at every call: without kernels, or streamed."""
    if layer.execution is None or layer.stored.slot is not None:
        return 0
    row = layer.in_features * layer.execution.operand.itemsize + (4 if layer.execution.rows_have_scales else 0)
    return layer.out_features * row


def _kind(term: Term) -> str:
    names = {"Kronecker": "LoKr", "Hadamard": "LoHa", "Difference": "weight differences", "Decomposed": "DoRA"}
    return names[type(term).__name__]
