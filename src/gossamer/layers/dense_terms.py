"""The kinds of adapter that are not low-rank. Each is exact, and costs a merged copy of the weight while attached.

    Kronecker    left (x) right                                          LoKr
    Hadamard     (up @ down) * (other_up @ other_down)                   LoHa
    Difference   a matrix of the weight's own size                       what "extracts" write as .diff
    Decomposed   magnitude * (base + d) / |base + d| - base              DoRA, d = multiplier * up @ down

|.| is the norm of each row of a weight, or of each column, as the magnitude is (out, 1) or (1, in).
Formulas: LyCORIS (Yeh et al., 2023), FedPara (Hyeon-Woo et al., 2022), DoRA (Liu et al., 2024).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from gossamer.layers.term import Term


@dataclass(eq=False)
class Kronecker(Term):
    """delta = kron(left, right): (a, b) and (c, d) make (a c, b d)."""

    name: str
    left: torch.Tensor
    right: torch.Tensor
    scale: float = 1.0
    bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        shapes = f"left is {tuple(self.left.shape)} and right is {tuple(self.right.shape)}; both have to be matrices."
        self._require(self.left.dim() == 2 and self.right.dim() == 2, shapes)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.left.shape[0] * self.right.shape[0], self.left.shape[1] * self.right.shape[1]

    def widened(self, in_features: int) -> Term:
        """A Kronecker product with more columns is none; the matrix itself has them."""
        if in_features == self.in_features:
            return self
        return Difference(self.name, self.delta(self.left), self.scale, self.bias).widened(in_features)

    def delta(self, base: torch.Tensor) -> torch.Tensor:
        """kron(left, right) in float32."""
        return torch.kron(self.left.float(), self.right.float())


@dataclass(eq=False)
class Hadamard(Term):
    """delta = (up @ down) * (other_up @ other_down), element by element; ups are (out, rank), downs (rank, in)."""

    name: str
    up: torch.Tensor
    down: torch.Tensor
    other_up: torch.Tensor
    other_down: torch.Tensor
    scale: float = 1.0
    bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        pairs = ((self.up, self.down), (self.other_up, self.other_down))
        matrices = all(up.dim() == down.dim() == 2 and up.shape[1] == down.shape[0] for up, down in pairs)
        alike = self.up.shape[:1] == self.other_up.shape[:1] and self.down.shape[1:] == self.other_down.shape[1:]
        shapes = [tuple(part.shape) for pair in pairs for part in pair]
        self._require(matrices and alike, f"The factors are {shapes}; both products have to be of one shape.")

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.up.shape[0], self.down.shape[1]

    def widened(self, in_features: int) -> Hadamard:
        """Zero columns behind both downs, or fewer of them."""
        extra = (0, in_features - self.in_features)
        return replace(self, down=F.pad(self.down, extra), other_down=F.pad(self.other_down, extra))

    def delta(self, base: torch.Tensor) -> torch.Tensor:
        """The product of both products, in float32."""
        return (self.up.float() @ self.down.float()).mul_(self.other_up.float() @ self.other_down.float())


@dataclass(eq=False)
class Difference(Term):
    """delta = matrix (out, in)."""

    name: str
    matrix: torch.Tensor
    scale: float = 1.0
    bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self._require(self.matrix.dim() == 2, f"The difference is {tuple(self.matrix.shape)}, not a matrix.")

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def widened(self, in_features: int) -> Difference:
        """Zero columns behind the matrix, or fewer of them."""
        return replace(self, matrix=F.pad(self.matrix, (0, in_features - self.in_features)))

    def delta(self, base: torch.Tensor) -> torch.Tensor:
        """The matrix in float32."""
        return self.matrix.float()


@dataclass(eq=False)
class Decomposed(Term):
    """delta = magnitude * (base + multiplier * up @ down) / |base + multiplier * up @ down| - base.

    The multiplier, alpha / rank, acts inside; `scale` interpolates between the base and the whole.
    """

    name: str
    down: torch.Tensor
    up: torch.Tensor
    magnitude: torch.Tensor
    multiplier: float = 1.0
    scale: float = 1.0
    bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        matrices = self.down.dim() == 2 and self.up.dim() == 2 and self.down.shape[0] == self.up.shape[1]
        rows = matrices and tuple(self.magnitude.shape) in ((self.up.shape[0], 1), (1, self.down.shape[1]))
        parts = (self.down, self.up, self.magnitude)
        self._require(
            rows,
            f"down, up and magnitude are {[tuple(part.shape) for part in parts]}; they have to be (rank, in), "
            "(out, rank), and (out, 1) or (1, in).",
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.up.shape[0], self.down.shape[1]

    def widened(self, in_features: int) -> Decomposed:
        """Zero columns behind `down`; columns of a weight that are zero stay zero whatever their magnitude."""
        extra = (0, in_features - self.in_features)
        magnitude = self.magnitude if self.magnitude.shape[1] == 1 else F.pad(self.magnitude, extra)
        return replace(self, down=F.pad(self.down, extra), magnitude=magnitude)

    def delta(self, base: torch.Tensor) -> torch.Tensor:
        """In float32; a row or column of zeros stays as it is."""
        whole = torch.addmm(base, self.up.float(), self.down.float(), alpha=self.multiplier)
        along = 1 if self.magnitude.shape[1] == 1 else 0
        norm = whole.norm(dim=along, keepdim=True)
        factor = torch.where(norm > 0, self.magnitude.float() / norm, 1.0)
        return whole.mul_(factor).sub_(base)
