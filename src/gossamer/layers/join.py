"""Stored bytes of several layers side by side in memory, so that one call decodes them, or one product reads them.

Row by row nothing changes: all formats but the doubly quantised ones store rows one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gossamer.formats import Packed, find_format
from gossamer.layers.linear import QuantLinear
from gossamer.layers.stored import StoredWeight


@dataclass(frozen=True, eq=False)
class Joined:
    """The common bytes, and the weights that are views of them, each with its count of moves."""

    packed: Packed
    places: list[tuple[StoredWeight, int]]

    def holds(self, layers: Sequence[QuantLinear]) -> bool:
        """Whether these layers have the weights, and none was moved since."""
        return self.places == _places(layers)


def join(layers: Sequence[QuantLinear]) -> Joined | None:
    """Move the stored bytes into common tensors and make every layer a view of them; None where they cannot lie so.

    Bytes that lie so already are not moved, and streamed ones never are.
    """
    if not joinable(layers):
        return None
    lying = _lying(layers)
    if lying is not None or any(layer.stored.slot is not None for layer in layers):
        return lying
    parts = [layer.packed for layer in layers]
    common = {role: torch.cat([part.tensors[role] for part in parts]) for role in parts[0].tensors}
    rows = [part.shape[0] for part in parts]
    for layer, part, start in zip(layers, parts, _starts(rows), strict=True):
        views = {role: _rows(tensor, sum(rows), start, part.shape[0]) for role, tensor in common.items()}
        layer.stored.adopt(views)
    return Joined(Packed(parts[0].format, common, (sum(rows), parts[0].shape[1])), _places(layers))


def _lying(layers: Sequence[QuantLinear]) -> Joined | None:
    """The common tensors of layers whose bytes lie side by side, where products read them."""
    parts = [layer.stored.placed for layer in layers]
    common = {}
    for role in parts[0].tensors:
        whole = _whole([part.tensors[role] for part in parts])
        if whole is None:
            return None
        common[role] = whole
    rows = sum(part.shape[0] for part in parts)
    return Joined(Packed(parts[0].format, common, (rows, parts[0].shape[1])), _places(layers))


def _whole(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """One tensor over all of these, where each begins where the one before it ends."""
    first = tensors[0]
    storage, stop = first.untyped_storage().data_ptr(), first.storage_offset()
    for tensor in tensors:
        alike = (tensor.dtype, tensor.shape[1:]) == (first.dtype, first.shape[1:]) and tensor.is_contiguous()
        if not alike or tensor.untyped_storage().data_ptr() != storage or tensor.storage_offset() != stop:
            return None
        stop += tensor.numel()
    rows = sum(tensor.shape[0] for tensor in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def joinable(layers: Sequence[QuantLinear]) -> bool:
    """Whether their stored bytes could lie side by side as those of one weight."""
    first = layers[0].packed
    whole_rows = first.shape[1] % find_format(first.format).width_multiple == 0
    alike = all(layer.packed.format == first.format and layer.packed.shape[1] == first.shape[1] for layer in layers)
    shared = len({id(layer.stored) for layer in layers}) < len(layers)
    return whole_rows and alike and not shared and "absmax_offset" not in first.tensors


def _places(layers: Sequence[QuantLinear]) -> list[tuple[StoredWeight, int]]:
    return [(layer.stored, layer.stored.moves) for layer in layers]


def _starts(rows: Sequence[int]) -> list[int]:
    return [sum(rows[:place]) for place in range(len(rows))]


def _rows(tensor: torch.Tensor, rows: int, start: int, count: int) -> torch.Tensor:
    """The elements of `count` rows of a matrix whose `rows` rows fill the tensor."""
    each = tensor.shape[0] // rows
    return tensor[start * each : (start + count) * each]
