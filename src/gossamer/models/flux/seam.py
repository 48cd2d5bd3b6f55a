"""The seam: the one loop over blocks, and the call around each of them that may be replaced.

A step cache that leaves blocks out is a `BlockRunner`. It is set on the model (`model.runner = ...`) and sees every
block of every forward:

    def timed(step: BlockStep, state: BlockState) -> None:
        started = time.perf_counter()
        step(state)                     # leave this out, and the block is skipped
        print(step.index, step.kind, time.perf_counter() - started)

A block that runs first asks the model's `weights` for its own (`BlockWeights`): they may be streamed from the host.
That is part of `step(state)`, so runners need not know of it, and no weights come for a block that is left out.

Blocks work in place: whoever wants to compare tokens before and after a block has to clone them before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import nn

from gossamer.kernels.pointwise import Modulation, Rotation, Rows
from gossamer.kernels.pointwise.backends import Pointwise
from gossamer.models.flux.modulation import DoubleVectors, SingleVectors
from gossamer.models.flux.operators import Operators

Part = Literal["all", "text", "image"]


@dataclass(frozen=True, eq=False)
class Residual:
    """gate * y, still to be added to a part of the tokens."""

    gate: torch.Tensor
    y: torch.Tensor
    pointwise: Pointwise


class BlockState:
    """The tokens (batch, tokens, width) on their way through the blocks, text first; every block changes them in place.

    `branch` names the part of the guidance that this forward computes, as diffusers' pipelines announce it: "cond",
    "uncond", or None outside of a pipeline. Anything kept from one step to the next has to be kept per branch.

    A block's last residual may wait for the next block's norm, which adds it in the same pass. Whoever looks at the
    tokens sees it added: `tokens`, `text` and `image` add what waits.
    """

    def __init__(self, tokens: torch.Tensor, text_tokens: int, branch: str | None = None) -> None:
        self.text_tokens = text_tokens
        self.branch = branch
        self._tokens = tokens
        self._waiting: dict[Part, Residual] = {}

    @property
    def tokens(self) -> torch.Tensor:
        """All tokens."""
        for part, residual in self._waiting.items():
            residual.pointwise.residual_gate_(self._part(part), residual.gate, residual.y)
        self._waiting.clear()
        return self._tokens

    @property
    def text(self) -> torch.Tensor:
        """A view of the text tokens."""
        return self.tokens[:, : self.text_tokens]

    @property
    def image(self) -> torch.Tensor:
        """A view of the image tokens."""
        return self.tokens[:, self.text_tokens :]

    @property
    def dtype(self) -> torch.dtype:
        """The type of the tokens."""
        return self._tokens.dtype

    def empty(self, width: int) -> torch.Tensor:
        """An unwritten buffer (batch, tokens, width)."""
        return self._tokens.new_empty(*self._tokens.shape[:2], width)

    def normed(self, part: Part, by: Modulation, rows_type: torch.dtype, pointwise: Pointwise) -> Rows:
        """Norm and modulation of a part, after the residual that waits for it."""
        waiting = self._waiting.pop(part, None)
        if waiting is None or part == "all" or "all" in self._waiting:
            _ = self.tokens  # what waits for other parts comes first where they overlap
        x = self._part(part)
        if waiting is None:
            return pointwise.norm_modulate(x, by, rows_type)
        return pointwise.residual_gate_norm_modulate_(x, waiting.gate, waiting.y, by, rows_type)

    def add(self, part: Part, gate: torch.Tensor, y: torch.Tensor, pointwise: Pointwise) -> None:
        """Add gate * y to a part, now or with the next norm of it."""
        if self._waiting.keys() & ({part, "all"} if part != "all" else self._waiting.keys()):
            _ = self.tokens
        self._waiting[part] = Residual(gate, y, pointwise)

    def _part(self, part: Part) -> torch.Tensor:
        if part == "all":
            return self._tokens
        return self._tokens[:, : self.text_tokens] if part == "text" else self._tokens[:, self.text_tokens :]


@dataclass(frozen=True, eq=False)
class Shared:
    """What all blocks of one forward share."""

    rotation: Rotation
    operators: Operators


class BlockWeights(Protocol):
    """Where the weights of blocks come from, each known by its index."""

    def obstacle(self) -> str | None:
        """Why a recorded step cannot be repeated with the copies that bring weights in it, or None."""

    def recording(self) -> Recording:
        """Of one step; what the calling thread queues from now on begins after all copies so far."""

    def arrive(self, index: int) -> None:
        """Have the weights of a block on the device before anything that is queued from now on."""

    def depart(self, index: int) -> None:
        """All that reads the weights of the block has been queued."""


class Recording(Protocol):
    """The copies of one step that is recorded, to be repeated later without the host."""

    def recorded(self) -> AbstractContextManager[None]:
        """Inside, copies are recorded with the work that the calling thread queues; none of it happens yet."""

    def possible(self) -> bool:
        """Whether weights are now where the recorded step expects them; what is queued next finds them there."""

    def repeated(self) -> None:
        """The recorded step was queued once more."""


class Resident:
    """The weights of all blocks are on the device at all times."""

    def obstacle(self) -> None:
        """There are no copies."""

    def recording(self) -> Resident:
        """Nothing to record."""
        return self

    def recorded(self) -> AbstractContextManager[None]:
        """Nothing is recorded."""
        return nullcontext()

    def possible(self) -> bool:
        """They are there."""
        return True

    def repeated(self) -> None:
        """They stay."""

    def arrive(self, index: int) -> None:
        """They are there."""

    def depart(self, index: int) -> None:
        """They stay."""


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
    weights: BlockWeights
    residual: torch.Tensor | None = None

    def __call__(self, state: BlockState) -> None:
        """Run the block, then add the residual."""
        self.weights.arrive(self.index)
        try:
            self.block(state, self.vectors, self.shared)
        finally:
            self.weights.depart(self.index)
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
