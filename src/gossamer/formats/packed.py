"""The record that every storage format packs into, and the description of a format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Packed:
    """A weight as it stays in memory.

    `tensors` are the stored bytes by role (for example `codes`, `scale`); `shape` is the logical (out, in).
    """

    format: str
    tensors: Mapping[str, torch.Tensor]
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes that stay in memory for this weight."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    def device(self) -> torch.device:
        """Where the stored bytes are."""
        return next(iter(self.tensors.values())).device

    def to(self, device: torch.device | str) -> Packed:
        """The same bytes on another device."""
        return replace(self, tensors={role: tensor.to(device) for role, tensor in self.tensors.items()})


@dataclass(frozen=True)
class Format:
    """A storage format: its name and its three functions.

    `pack` takes a float weight (out, in); `unpack` is the reference that every faster decoder is tested against;
    `packed_bytes(out, in)` is exact. `width_multiple` is what `in` must be a multiple of. A format whose `packs` is
    False is only kept where a file holds it already.
    """

    name: str
    pack: Callable[[torch.Tensor], Packed]
    unpack: Callable[[Packed, torch.dtype], torch.Tensor]
    packed_bytes: Callable[[int, int], int]
    width_multiple: int = 1
    packs: bool = True
