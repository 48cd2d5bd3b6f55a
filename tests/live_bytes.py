"""Counts the bytes of memory that tensors hold, at any time and at most: what a device's allocator would have given."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside, every storage that an operation makes counts until it is free. `peak` is the most since `reset`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def reset(self) -> None:
        """Begin a new peak."""
        self.peak = self.now

    def ignore(self, *tensors: torch.Tensor) -> None:
        """Never count the storages of tensors, such as those of the host or of a model."""
        for tensor in tensors:
            self._note(tensor.untyped_storage(), 0)

    def _note(self, storage: torch.UntypedStorage, size: int) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, storage._cdata, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self._note(storage, storage.nbytes())
        return result
