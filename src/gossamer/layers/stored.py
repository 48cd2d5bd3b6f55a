"""A packed weight as a torch module: it follows `.to(device)` and goes into `state_dict`, and no cast reaches it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from gossamer.formats import Packed, find_format


class StoredWeight(nn.Module):
    """One Packed held as buffers named `<format>_<role>`, so that a file of one format never loads into another.

    Two layers with tied weights share one StoredWeight.
    """

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.format = find_format(packed.format)
        self.shape = packed.shape
        self.roles = tuple(packed.tensors)
        for role, tensor in packed.tensors.items():
            self.register_buffer(self._key(role), tensor)

    def _key(self, role: str) -> str:
        return f"{self.format.name}_{role}"

    @property
    def packed(self) -> Packed:
        """The stored bytes as they are now."""
        return Packed(self.format.name, {role: self.tensor(role) for role in self.roles}, self.shape)

    def tensor(self, role: str) -> torch.Tensor:
        """One of the stored tensors."""
        return self.get_buffer(self._key(role))

    def adopt(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take these tensors, which hold the same bytes elsewhere, in place of the own ones."""
        for role in self.roles:
            setattr(self, self._key(role), tensors[role])

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight (out, in); shares memory with the stored bytes where they already are `dtype`."""
        return self.format.unpack(self.packed, dtype)

    def shares_memory(self, weight: torch.Tensor) -> bool:
        """Whether writing into `weight` would write into the stored bytes."""
        address = weight.untyped_storage().data_ptr()
        return any(tensor.untyped_storage().data_ptr() == address for tensor in self.packed.tensors.values())

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> StoredWeight:
        """Follow a move to another device; codes and scales keep their types under `.to(dtype)` and `.half()`."""
        for role in self.roles:
            before = self.get_buffer(self._key(role))
            after = fn(before)
            setattr(self, self._key(role), after if after.dtype == before.dtype else before.to(after.device))
        return self

    def extra_repr(self) -> str:
        """Format and shape, for printing."""
        return f"{self.format.name}, shape={self.shape}"
