"""The stored weights of one block: their bytes at home, and the linears that read them on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gossamer.layers import LinearGroup, QuantLinear
from gossamer.layers.stored import Slot, StoredWeight
from gossamer.memory.offload_home import Home, OpenFile, Pinned, file_of, pinned_home, scattered_home
from gossamer.memory.offload_host import host_bytes
from gossamer.memory.offload_layout import Layout, lay_out


class Station:
    """Linears whose weights come and go together. `groups` run several of them as one product."""

    def __init__(self, layers: Sequence[QuantLinear], groups: Sequence[LinearGroup], device: torch.device) -> None:
        self._layers = tuple(layers)
        self._groups = tuple(groups)
        self._weights: tuple[StoredWeight, ...] = tuple(dict.fromkeys(layer.stored for layer in layers))
        self._layout: Layout = lay_out(self._weights, self._groups)
        self._home: Home | None = None
        self.slot = Slot(device)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, with what lies between them."""
        return self._layout.nbytes

    @property
    def home(self) -> Home:
        """Where the bytes are while they are not on the device."""
        if self._home is None:
            raise RuntimeError("the weights of this station have not gone home yet")
        return self._home

    def host_bytes_to_take(self, pinned: bool, files: Sequence[OpenFile]) -> int:
        """Host memory that `go_home` takes and keeps: for what is on another device, or pinned, in a file."""
        pieces = self._layout.pieces
        device = sum(piece.nbytes for piece in pieces if piece.tensor.device.type != "cpu")
        mapped = sum(piece.nbytes for piece in pieces if file_of(piece.source, files) is not None)
        return device + mapped * pinned

    def go_home(self, pinned: bool, files: Sequence[OpenFile]) -> None:
        """Put the bytes where copies start from. Weights that were on the device are gone from it then."""
        if not pinned:
            self._leave_device()
            self._home = scattered_home(self._layout, files)
        else:
            home = pinned_home(self._layout, self.slot.device)
            self._keep(home.memory)
            self._home = home
        self.vacate()

    def occupy(self, memory: torch.Tensor) -> None:
        """Have this device memory as the place that the bytes come to."""
        for stored, tensors in self._layout.views(memory).items():
            stored.stream(self.slot, tensors)
        self._moved()

    def vacate(self) -> None:
        """Have no place on the device; nothing that was made from it is kept."""
        self.slot.filled = False
        for stored in self._weights:
            stored.stream(self.slot, None)
        self._moved()
        for layer in self._layers:
            layer.forget()
        for group in self._groups:
            group.forget()

    def settle(self) -> None:
        """Bring the bytes to the device for good; they are as if they had never been streamed."""
        with torch.inference_mode(False), torch.no_grad():
            memory = torch.empty(self.nbytes, dtype=torch.uint8, device=self.slot.device)
            memory.copy_(self._at_home())
        for stored, tensors in self._layout.views(memory).items():
            stored.settle(tensors)
        self._home, self._layout = None, lay_out(self._weights, self._groups)
        self._moved()

    def withdraw(self) -> None:
        """Be streamed no longer, the bytes staying in host memory as they are at home."""
        for stored in self._weights:
            stored.settle({role: stored.tensor(role) for role in stored.roles})
        self._home = None  # groups are not joined here: that would copy bytes out of a mapped file

    def _leave_device(self) -> None:
        """What is not in host memory goes into ordinary host memory."""
        if all(piece.tensor.device.type == "cpu" for piece in self._layout.pieces):
            return
        memory = host_bytes(self.nbytes)
        self._layout.gather(memory)
        self._keep(memory)

    def _keep(self, memory: torch.Tensor) -> None:
        """Make this host memory, which holds the bytes, the weights' own."""
        for stored, tensors in self._layout.views(memory).items():
            stored.adopt(tensors)
        self._layout = lay_out(self._weights, self._groups)

    def _at_home(self) -> torch.Tensor:
        """All bytes in host memory."""
        if isinstance(self.home, Pinned):
            return self.home.memory
        memory = host_bytes(self.nbytes)
        self.home.read(0, self.nbytes, memory)
        return memory

    def _moved(self) -> None:
        for group in self._groups:
            group.join()
