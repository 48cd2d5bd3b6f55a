"""Fuse terms into single layers: the changed weight packed anew, the original kept, and what became of the change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from gossamer.adapters.adapter import Adapter
from gossamer.adapters.fuse_report import LayerFidelity
from gossamer.errors import GossamerError
from gossamer.formats import pack, unpack
from gossamer.layers import QuantLinear, StoredWeight, Term


@dataclass(frozen=True, eq=False)
class Original:
    """What a layer was before: its stored weight, in host memory unless others use it too, and its bias."""

    stored: StoredWeight
    bias: nn.Parameter | None


class LayerFuser:
    """Fuses layers one after the other, and remembers what they were before."""

    def __init__(self, layers: Mapping[str, QuantLinear], chosen: Mapping[str, Adapter]) -> None:
        """`layers` are all that there are, by place, because several may share a weight; `chosen` are by name."""
        self.originals: dict[str, Original] = {}
        self.original_bytes = 0
        self._layers = layers
        self._chosen = chosen
        # a layer that is reachable by two names is one user of its weight
        self._users = Counter(id(layer.stored) for layer in dict.fromkeys(layers.values()))
        self._done: dict[int, LayerFidelity | None] = {}

    def fuse(self, place: str) -> LayerFidelity | None:
        """Fuse into one layer, unless it was met under another name; None where its weight stays as it is."""
        layer = self._layers[place]
        if id(layer) in self._done:
            return self._done[id(layer)]
        original = self.originals[place] = Original(layer.stored, layer.bias)
        terms = [term for term in layer.active() if term.name in self._chosen]
        width = _fused_width(layer, self._chosen.values())
        try:
            stored, fidelity = _fused_weight(layer, terms, width)
        except GossamerError as error:
            raise type(error)(f"Layer {place!r}: {error.what}", error.why, error.next_step) from error
        layer.rebase(stored, _fused_bias(layer, terms))
        if stored is not original.stored:
            self._let_go(original.stored)
        self._done[id(layer)] = fidelity
        return fidelity

    def undo(self) -> None:
        """Every layer as it was."""
        for place, original in self.originals.items():
            restore(self._layers[place], original)

    def _let_go(self, stored: StoredWeight) -> None:
        """A weight that no layer uses any more leaves the device."""
        self._users[id(stored)] -= 1
        if self._users[id(stored)] == 0:
            stored.adopt({role: _on_host(tensor) for role, tensor in stored.packed.tensors.items()})
            self.original_bytes += stored.packed.nbytes


def _fused_weight(layer: QuantLinear, terms: Iterable[Term], width: int) -> tuple[StoredWeight, LayerFidelity | None]:
    """The weight with the terms in it (out, width), packed anew, and what became of it."""
    base = layer.base_weight(torch.float32) if width == layer.in_features else layer.stored.unpack(torch.float32)
    target = base.clone()
    for term in terms:
        own = term if term.in_features == width else term.widened(width)
        own.add_to_weight(target, base)
    change = target - base
    if width == layer.stored.shape[1] and not change.any():
        return layer.stored, None
    packed = pack(target, layer.stored.format.name)
    error = unpack(packed, torch.float32) - target
    sizes = (float(change.norm()), float(error.norm()), float((change * error).sum()))
    return StoredWeight(packed), LayerFidelity(packed.format, *sizes)


def _fused_bias(layer: QuantLinear, terms: Iterable[Term]) -> nn.Parameter | None:
    added = [term.scaled_bias() for term in terms if term.bias is not None]
    if not added:
        return layer.bias
    whole = sum(added[1:], start=added[0])
    return nn.Parameter(whole if layer.bias is None else layer.bias.float() + whole, requires_grad=False)


def _fused_width(layer: QuantLinear, adapters: Iterable[Adapter]) -> int:
    """Input features of the fused weight: a Control LoRA that is fused leaves the input layer as wide as it made it."""
    stored = layer.stored.shape[1]
    if layer.in_features == stored:
        return stored
    return max(stored, *(adapter.input_channels or 0 for adapter in adapters))


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in host memory, without the rest of a larger one that it may be a part of."""
    part = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
    return tensor.to("cpu", copy=True) if part else tensor.cpu()


def restore(layer: QuantLinear, original: Original) -> None:
    """The layer as it was, on the device that it is on now."""
    device = layer.device
    if original.bias is not None:
        original.bias.data = original.bias.data.to(device)
    layer.rebase(original.stored.to(device), original.bias)
