"""adaLN: the vectors that shift, scale and gate every block, all computed from the conditioning before the first block.

Nothing in a block changes them, so a caller may compute them for all steps of a run at once. Order of the chunks, each
(batch, width), in the output of the linears:

    double block, image and text alike   shift, scale, gate of attention; shift, scale, gate of the feed-forward part
    single block                         shift, scale, gate
    after the last block                 scale, shift
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from gossamer.kernels.pointwise import Modulation


@dataclass(frozen=True, eq=False)
class StreamVectors:
    """What modulates one stream, text or image, of a double block; gates are (batch, width)."""

    attention: Modulation
    attention_gate: torch.Tensor
    mlp: Modulation
    mlp_gate: torch.Tensor


@dataclass(frozen=True, eq=False)
class DoubleVectors:
    """What modulates a double block."""

    text: StreamVectors
    image: StreamVectors


@dataclass(frozen=True, eq=False)
class SingleVectors:
    """What modulates a single block."""

    norm: Modulation
    gate: torch.Tensor


@dataclass(frozen=True, eq=False)
class ModelVectors:
    """What modulates a whole forward: one entry a block, and the norm after the last block."""

    double: tuple[DoubleVectors, ...]
    single: tuple[SingleVectors, ...]
    out: Modulation


@dataclass(frozen=True, eq=False)
class Conditions:
    """What a forward is given besides tokens: `timestep` and `guidance` (batch,), `pooled` (batch, pooled features).

    Timesteps run from 0 to 1; `dtype` is the latents', in which they are rounded. `branch` is that of the guidance.
    """

    timestep: torch.Tensor
    guidance: torch.Tensor | None
    pooled: torch.Tensor
    dtype: torch.dtype
    branch: str | None = None


class Modulator(Protocol):
    """Where a forward gets its vectors from."""

    def __call__(self, model: Any, given: Conditions, /) -> ModelVectors:
        """The vectors of every block of `model`."""


def modulate(model: Any, given: Conditions) -> ModelVectors:
    """The plain way: conditioning, then the linears of every block; for one step, or for several as one batch."""
    vectors: ModelVectors = model.modulation(model.condition(given))
    return vectors


class AdaLN(nn.Module):
    """The linear that makes the vectors; the LayerNorm itself has no weights and is applied elsewhere."""

    def __init__(self, width: int, vectors: int) -> None:
        super().__init__()
        self.vectors = vectors
        self.linear = nn.Linear(width, vectors * width)

    def forward(self, activated: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """SiLU of the conditioning (batch, width) to `vectors` vectors of (batch, width)."""
        out: torch.Tensor = self.linear(activated)
        return out.chunk(self.vectors, dim=-1)


def stream_vectors(norm: AdaLN, activated: torch.Tensor) -> StreamVectors:
    """The vectors of one stream of a double block."""
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = norm(activated)
    return StreamVectors(Modulation(scale, shift), gate, Modulation(mlp_scale, mlp_shift), mlp_gate)


def single_vectors(norm: AdaLN, activated: torch.Tensor) -> SingleVectors:
    """The vectors of a single block."""
    shift, scale, gate = norm(activated)
    return SingleVectors(Modulation(scale, shift), gate)


def each_vector(vectors: ModelVectors, change: Callable[[torch.Tensor], torch.Tensor]) -> ModelVectors:
    """The same with every vector changed, in an order that is always the same."""

    def norm(by: Modulation) -> Modulation:
        return Modulation(change(by.scale), change(by.shift))

    def stream(by: StreamVectors) -> StreamVectors:
        return StreamVectors(norm(by.attention), change(by.attention_gate), norm(by.mlp), change(by.mlp_gate))

    return ModelVectors(
        tuple(DoubleVectors(stream(by.text), stream(by.image)) for by in vectors.double),
        tuple(SingleVectors(norm(by.norm), change(by.gate)) for by in vectors.single),
        norm(vectors.out),
    )


def rows_of(vectors: ModelVectors, rows: slice) -> ModelVectors:
    """Some rows of every vector."""
    return each_vector(vectors, lambda vector: vector[rows])


def vectors_of(vectors: ModelVectors) -> list[torch.Tensor]:
    """All vectors, in the order of `each_vector`."""
    found: list[torch.Tensor] = []
    each_vector(vectors, lambda vector: found.append(vector) or vector)  # type: ignore[func-returns-value]
    return found


def out_vectors(norm: AdaLN, activated: torch.Tensor) -> Modulation:
    """The vectors of the norm after the last block."""
    scale, shift = norm(activated)
    return Modulation(scale, shift)
