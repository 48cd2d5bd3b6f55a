"""What one step of the model reads, apart from weights, and who runs it.

model.stepper = run_step                        every kernel is called, one after the other
model.stepper = GraphedSteps(CudaGraphs())      see `graph`
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from gossamer.kernels.pointwise import Rotation
from gossamer.models.flux.modulation import ModelVectors


@dataclass(frozen=True, eq=False)
class StepInputs:
    """Image and text tokens before their embedding, every block's vectors, positions, and a residual or None a block.

    `image` (batch, image tokens, in_channels), `text` (batch, text tokens, joint_attention_dim), a residual
    (batch, image tokens, width). `branch` names the part of the guidance.
    """

    image: torch.Tensor
    text: torch.Tensor
    vectors: ModelVectors
    rotation: Rotation
    residuals: Sequence[torch.Tensor | None]
    branch: str | None = None


class Stepper(Protocol):
    """What runs a step of a model."""

    def __call__(self, model: Any, inputs: StepInputs, /) -> torch.Tensor:
        """The predicted velocity (batch, image tokens, patch^2 * out_channels), which nobody else writes into."""


def run_step(model: Any, inputs: StepInputs) -> torch.Tensor:
    """The plain way."""
    sample: torch.Tensor = model.run(inputs)
    return sample


@runtime_checkable
class TakesTurns(Protocol):
    """A stepper whose forwards share memory."""

    def in_turn(self) -> AbstractContextManager[None]:
        """Around a forward, which waits for those before it on other streams."""


def in_turn(stepper: Stepper) -> AbstractContextManager[None]:
    """What a forward runs in. A compiled forward is one of many calls in a graph of its own, and waits for nobody."""
    if torch.compiler.is_compiling() or not isinstance(stepper, TakesTurns):
        return nullcontext()
    return stepper.in_turn()
