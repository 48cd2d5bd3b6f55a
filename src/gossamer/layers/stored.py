"""A packed weight as a torch module: it follows `.to(device)` and goes into `state_dict`, and no cast reaches it.

A weight may be streamed. Its buffers are then its bytes in host memory, which stay true at all times, and it has a
place in a `Slot`: device memory that its bytes are copied into before they are used, each time at the same address, so
that whatever was made from that address stays valid from one time to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import nn

from gossamer.formats import Packed, find_format


class Watcher(Protocol):
    """What wants to know of changes: a count of them."""

    structure: int


@dataclass(eq=False)
class Slot:
    """Device memory of weights that come and go together; `filled` while their bytes are in it."""

    device: torch.device
    filled: bool = False


class StoredWeight(nn.Module):
    """One Packed held as buffers named `<format>_<role>`, so that a file of one format never loads into another.

    Two layers with tied weights share one StoredWeight.
    """

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.format = find_format(packed.format)
        self.shape = packed.shape
        self.roles = tuple(packed.tensors)
        self._keys = {role: f"{self.format.name}_{role}" for role in self.roles}
        self.moves = 0  # of the place where products read the bytes
        self.loads = 0  # of other bytes, into the same place or a new one
        self.watcher: Watcher | None = None
        self.slot: Slot | None = None
        self._in_slot: Packed | None = None
        for role, tensor in packed.tensors.items():
            self.register_buffer(self._keys[role], tensor)

    @property
    def packed(self) -> Packed:
        """The stored bytes where they can be read now: those in the slot while it is filled, else the own buffers."""
        if self.slot is not None and self.slot.filled:
            return self.placed
        return self.kept

    @property
    def placed(self) -> Packed:
        """Where products read the bytes: the place in the slot, filled or not, or the own buffers."""
        return self.kept if self._in_slot is None else self._in_slot

    @property
    def kept(self) -> Packed:
        """The own buffers, which `state_dict` saves."""
        return Packed(self.format.name, {role: self.tensor(role) for role in self.roles}, self.shape)

    @property
    def device(self) -> torch.device:
        """Where products read the bytes."""
        return self.slot.device if self.slot is not None else self.tensor(self.roles[0]).device

    def tensor(self, role: str) -> torch.Tensor:
        """One of the stored tensors."""
        return cast(torch.Tensor, self._buffers[self._keys[role]])  # `get_buffer` takes ten times as long

    def adopt(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take these tensors, which hold the same bytes elsewhere, in place of the own ones."""
        for role in self.roles:
            setattr(self, self._keys[role], tensors[role])
        self._moved()

    def stream(self, slot: Slot, tensors: Mapping[str, torch.Tensor] | None) -> None:
        """Have the bytes come into a slot, into these tensors of it; None while the slot has no memory."""
        self.slot = slot
        self._in_slot = None if tensors is None else Packed(self.format.name, dict(tensors), self.shape)
        self._moved()

    def settle(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Be streamed no longer: these tensors hold the bytes for good."""
        self.slot = self._in_slot = None
        self.adopt(tensors)

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight (out, in); shares memory with the stored bytes where they already are `dtype`."""
        return self.format.unpack(self.packed, dtype)

    def shares_memory(self, weight: torch.Tensor) -> bool:
        """Whether writing into `weight` would write into the stored bytes."""
        address = weight.untyped_storage().data_ptr()
        return any(tensor.untyped_storage().data_ptr() == address for tensor in self.packed.tensors.values())

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> StoredWeight:
        """Follow a move to another device; codes and scales keep their types under `.to(dtype)` and `.half()`.

        Streamed bytes stay where they are: it is the slot that is on a device.
        """
        if self.slot is not None:
            return self
        moved = False
        for role in self.roles:
            before = self.get_buffer(self._keys[role])
            after = fn(before)
            after = after if after.dtype == before.dtype else before.to(after.device)
            setattr(self, self._keys[role], after)
            moved = moved or after is not before
        if moved:
            self._moved()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Take other bytes, copied into the own buffers or, with `assign`, in new ones: either is a change."""
        before = self.kept.tensors
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.loads += 1
        if any(self.tensor(role) is not before[role] for role in self.roles):
            self._moved()
        else:
            self._changed()

    def _moved(self) -> None:
        self.moves += 1
        self._changed()

    def _changed(self) -> None:
        if self.watcher is not None:
            self.watcher.structure += 1

    def extra_repr(self) -> str:
        """Format and shape, for printing."""
        return f"{self.format.name}, shape={self.shape}"
