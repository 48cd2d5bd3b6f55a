"""How a linear layer runs on a device: who decodes, what the product reads, and the buffer in between.

A layer without an execution runs the reference of `linear`. `models.flux.prepare` makes executions from a choice of
`kernels.choice`; nothing here chooses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from gossamer.kernels.decode_ops import Backend
from gossamer.kernels.operators import lasting
from gossamer.kernels.pointwise.backends import Pointwise
from gossamer.layers.model_terms import ModelTerms

Writer = Literal["none", "triton", "torch"]


class Buffers:
    """One buffer a device, through which decoded weights go, and those who have to know when it is replaced."""

    def __init__(self) -> None:
        self.readers: list[ModelTerms] = []
        self._held: dict[torch.device, torch.Tensor] = {}

    def at_least(self, needed: int, device: torch.device) -> torch.Tensor:
        """The buffer, in bytes, the same one until it has to grow; what is in it is valid until the next call."""
        held = self._held.get(device)
        if held is None or held.numel() < needed:
            self._held.pop(device, None)  # the old one is free before the new one is made
            with lasting():
                held = self._held[device] = torch.empty(needed, dtype=torch.uint8, device=device)
            for terms in self.readers:
                terms.structure += 1  # captured steps read the old one
        return held

    @property
    def nbytes(self) -> int:
        """Bytes held on all devices."""
        return sum(buffer.numel() for buffer in self._held.values())


class Workspace:
    """What the layers of a model share: what is known of their terms, and the buffers.

    Every decoded weight goes through a buffer on its way into a product, so layers have to run one after the other,
    on one stream.
    """

    def __init__(self, buffers: Buffers | None = None) -> None:
        self.terms = ModelTerms()
        self.buffers = Buffers() if buffers is None else buffers
        self.buffers.readers.append(self.terms)

    def beside(self) -> Workspace:
        """For layers that run at other times: the same buffers, but changes of theirs are nobody else's business."""
        return Workspace(self.buffers)

    def at_least(self, needed: int, device: torch.device) -> torch.Tensor:
        """The buffer of a device, see `Buffers`."""
        return self.buffers.at_least(needed, device)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return self.buffers.nbytes


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
        kind = (self.operand, self.product, self.activations)
        return kind == (other.operand, other.product, other.activations) and self.workspace is other.workspace

    @property
    def rows_have_scales(self) -> bool:
        """Whether the operands are 8-bit codes."""
        return self.operand in (torch.float8_e4m3fn, torch.int8)
