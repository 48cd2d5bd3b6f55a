"""The seam: the one loop over blocks, and the call around each of them that may be replaced.

A step cache that leaves blocks out, or a streamer that fetches weights before a block and drops them after it, is a
`BlockRunner`. It is set on the model (`model.runner = ...`) and sees every block of every forward:

    def timed(step: BlockStep, state: BlockState) -> None:
        started = time.perf_counter()
        step(state)                     # leave this out, and the block is skipped
        print(step.index, step.kind, time.perf_counter() - started)

Blocks work in place: whoever wants to compare tokens before and after a block has to clone them before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import nn

from gossamer.kernels.pointwise import Rotation
from gossamer.models.flux.modulation import DoubleVectors, SingleVectors
from gossamer.models.flux.operators import Operators


@dataclass(frozen=True, eq=False)
class BlockState:
    """The tokens (batch, tokens, width) on their way through the blocks, text first; every block changes them in place.

    `branch` names the part of the guidance that this forward computes, as diffusers' pipelines announce it: "cond",
    "uncond", or None outside of a pipeline. Anything kept from one step to the next has to be kept per branch.
    """

    tokens: torch.Tensor
    text_tokens: int
    branch: str | None = None

    @property
    def text(self) -> torch.Tensor:
        """A view of the text tokens."""
        return self.tokens[:, : self.text_tokens]

    @property
    def image(self) -> torch.Tensor:
        """A view of the image tokens."""
        return self.tokens[:, self.text_tokens :]


@dataclass(frozen=True, eq=False)
class Shared:
    """What all blocks of one forward share."""

    rotation: Rotation
    operators: Operators


@dataclass(frozen=True, eq=False)
class BlockStep:
    """One block with all it needs besides the state. `index` counts over all `count` blocks, double ones first.

    `residual` is a ControlNet's: (batch, image tokens, width), added to the image tokens after the block.
    """

    index: int
    count: int
    kind: Literal["double", "single"]
    block: nn.Module
    vectors: DoubleVectors | SingleVectors
    shared: Shared
    residual: torch.Tensor | None = None

    def __call__(self, state: BlockState) -> None:
        """Run the block, then add the residual."""
        self.block(state, self.vectors, self.shared)
        if self.residual is not None:
            state.image.add_(self.residual)


class BlockRunner(Protocol):
    """What is called in place of each block; `step(state)` runs the block itself."""

    def __call__(self, step: BlockStep, state: BlockState, /) -> None:
        """Do for this block whatever is to be done, in place on the state."""


def run_block(step: BlockStep, state: BlockState) -> None:
    """The default runner: just the block."""
    step(state)


def run_blocks(steps: Iterable[BlockStep], state: BlockState, runner: BlockRunner) -> None:
    """Every block in order, each through the runner."""
    for step in steps:
        runner(step, state)
