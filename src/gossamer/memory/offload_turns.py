"""Parts of a pipeline that take turns on a device: one comes when it is called, and the one before it leaves.

A part that leaves is not copied back: its bytes never left the host, and what was on the device is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from gossamer.memory.offload_part import Part

HOST = torch.device("cpu")


class Guest:
    """A module whose tensors are on the device during its turn; `parts` hold the weights that come block by block.

    `before_leaving` is called while everything is there still: what reads tensors by their addresses has to go first.
    """

    def __init__(
        self,
        module: nn.Module,
        parts: Sequence[Part],
        device: torch.device,
        before_leaving: Callable[[], None] = lambda: None,
    ) -> None:
        self._module = module
        self._parts = tuple(parts)
        self._device = device
        self._before_leaving = before_leaving
        self._homes: dict[int, torch.Tensor] = {}
        self._move(self._at_home)

    def bring(self) -> None:
        """Have everything on the device that does not come block by block."""
        self._move(self._on_device)

    def here(self, value: Any) -> Any:
        """A tensor on the device: callers put inputs where a module says that it is, and before its turn it is away."""
        return value.to(self._device) if isinstance(value, torch.Tensor) else value

    def leave(self) -> None:
        """Have nothing on the device."""
        self._before_leaving()
        for part in self._parts:
            part.close()
        self._move(self._at_home)
        self._homes.clear()

    def _move(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """What comes block by block is not moved by this."""
        with torch.inference_mode(False), torch.no_grad():
            self._module._apply(change)

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device == self._device:  # shared by two modules, and here already
            return tensor
        moved = tensor.to(self._device, copy=True)
        if tensor.numel():
            self._homes[moved.data_ptr()] = tensor.detach()
        return moved

    def _at_home(self, tensor: torch.Tensor) -> torch.Tensor:
        """Its own bytes on the host; what came while it was here is copied."""
        if not tensor.numel():
            return torch.empty_like(tensor, device=HOST)
        return self._homes.get(tensor.data_ptr(), tensor).to(HOST)


class Turns:
    """Which guest is on the device."""

    def __init__(self) -> None:
        self._present: Guest | None = None

    def take(self, guest: Guest | None) -> None:
        """Let a guest come, after the one before it left; with None the device is left to what never leaves it."""
        if guest is self._present:
            return
        if self._present is not None:
            self._present.leave()
        self._present = None
        if guest is not None:
            guest.bring()
        self._present = guest

    def on_call(self, module: nn.Module, guest: Guest | None) -> RemovableHandle:
        """Have a guest take its turn whenever a module is called."""

        def before(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
            self.take(guest)
            if guest is None:
                return None
            return tuple(map(guest.here, args)), {name: guest.here(value) for name, value in options.items()}

        return module.register_forward_pre_hook(before, with_kwargs=True)
