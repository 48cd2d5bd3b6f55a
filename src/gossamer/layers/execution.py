"""How a linear layer runs on a device: who decodes, what the product reads, and the buffer in between.

A layer without an execution runs the reference of `linear`. `models.flux.prepare` makes executions from a choice of
`kernels.choice`; nothing here chooses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from gossamer.kernels.decode_ops import Backend
from gossamer.kernels.pointwise.backends import Pointwise

Writer = Literal["none", "triton", "torch"]


class Workspace:
    """One buffer a device, through which every decoded weight of a model goes on its way into a product.

    All layers share it, so they have to run one after the other, on one stream.
    """

    def __init__(self) -> None:
        self._buffers: dict[torch.device, torch.Tensor] = {}

    def weight(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A matrix (rows, columns) that is valid until the next call; the buffer grows to the largest one."""
        needed = rows * columns * dtype.itemsize
        held = self._buffers.get(device)
        if held is None or held.numel() < needed:
            self._buffers.pop(device, None)  # the old one is free before the new one is made
            held = self._buffers[device] = torch.empty(needed, dtype=torch.uint8, device=device)
        return held[:needed].view(dtype).view(rows, columns)

    @property
    def nbytes(self) -> int:
        """Bytes held on all devices."""
        return sum(buffer.numel() for buffer in self._buffers.values())


@dataclass(frozen=True)
class Execution:
    """What runs a layer.

    `operand` is what both sides of the product are rounded to: a float type, or e4m3 or int8 with one scale a row.
    `decode` writes the weight while no adapter is attached ("none": the stored bytes are the operand), `merge` while
    one is. `keeps_merged` keeps a merged weight until the adapters change, where `decode` is "none": a second copy of
    the weight, in return for steps that cost nothing more. Results are of the type `activations`.
    """

    operand: torch.dtype
    activations: torch.dtype
    decode: Writer
    merge: Backend
    product: str
    pointwise: Pointwise
    workspace: Workspace = field(default_factory=Workspace)
    keeps_merged: bool = False

    def fits(self, other: Execution) -> bool:
        """Whether layers of both can be one product."""
        return (self.operand, self.product, self.activations) == (other.operand, other.product, other.activations)

    @property
    def rows_have_scales(self) -> bool:
        """Whether the operands are 8-bit codes."""
        return self.operand in (torch.float8_e4m3fn, torch.int8)
