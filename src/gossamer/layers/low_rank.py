"""One low-rank term of a linear layer: scale * up @ down, and a bias that comes with it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch.nn import functional as F

from gossamer.layers.strength import Strength
from gossamer.layers.term import Term


@dataclass(eq=False)
class LowRank(Term):
    """delta = up @ down: `down` is (rank, in), `up` is (out, rank)."""

    tensor_fields: ClassVar[tuple[str, ...]] = ("down", "up", "bias")
    name: str
    down: torch.Tensor
    up: torch.Tensor
    multiplier: float = 1.0
    bias: torch.Tensor | None = None
    strength: Strength = field(default_factory=Strength)

    def __post_init__(self) -> None:
        sound = self.down.dim() == 2 and self.up.dim() == 2 and self.down.shape[0] == self.up.shape[1]
        self._require(
            sound,
            lambda: (
                f"down is {tuple(self.down.shape)} and up is {tuple(self.up.shape)}; "
                "they have to be (rank, in) and (out, rank) with one rank."
            ),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        """Rows of down, columns of up."""
        return self.down.shape[0]

    def widened(self, in_features: int) -> LowRank:
        """Zero columns behind `down`, or fewer of them."""
        return replace(self, down=F.pad(self.down, (0, in_features - self.in_features)))

    def delta(self, base: torch.Tensor) -> torch.Tensor:
        """up @ down in float32."""
        return self.up.float() @ self.down.float()

    def add_to_weight(self, weight: torch.Tensor, base: torch.Tensor) -> None:
        """Add scale * up @ down to a float32 weight (out, in), in place and without a matrix in between."""
        weight.addmm_(self.up.float(), self.down.float(), alpha=self.scale)
