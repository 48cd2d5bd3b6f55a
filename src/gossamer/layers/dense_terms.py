"""The kinds of adapter that are not low-rank. Each is exact, and costs a merged copy of the weight while attached.

    Kronecker    left (x) right, or some rows of it                      LoKr
    Hadamard     (up @ down) * (other_up @ other_down)                   LoHa
    Difference   a matrix of the weight's own size                       what "extracts" write as .diff
    Decomposed   magnitude * (base + inner) / |base + inner| - base      DoRA, the inner term is of any other kind

|.| is the norm of each row of a weight, or of each column, as the magnitude is (out, 1) or (1, in).
Formulas: LyCORIS (Yeh et al., 2023), FedPara (Hyeon-Woo et al., 2022), DoRA (Liu et al., 2024).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch.nn import functional as F

from gossamer.layers.strength import Strength
from gossamer.layers.term import Term


@dataclass(eq=False)
class Kronecker(Term):
    """delta = kron(left, right): (a, b) and (c, d) make (a c, b d).

    `kept` are ranges of its rows where the layer is one part of a larger one; none stands for all rows.
    """

    tensor_fields: ClassVar[tuple[str, ...]] = ("left", "right", "bias")
    name: str
    left: torch.Tensor
    right: torch.Tensor
    multiplier: float = 1.0
    bias: torch.Tensor | None = None
    kept: tuple[tuple[int, int], ...] = ()
    strength: Strength = field(default_factory=Strength)

    def __post_init__(self) -> None:
        self._require(
            self.left.dim() == 2 and self.right.dim() == 2,
            lambda: (
                f"left is {tuple(self.left.shape)} and right is {tuple(self.right.shape)}; both have to be matrices."
            ),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        whole = self.left.shape[0] * self.right.shape[0]
        rows = sum(stop - start for start, stop in self.kept) if self.kept else whole
        return rows, self.left.shape[1] * self.right.shape[1]

    def widened(self, in_features: int) -> Term:
        """A Kronecker product with more columns is none; the matrix itself has them."""
        if in_features == self.in_features:
            return self
        whole = Difference(self.name, self.delta(self.left), self.multiplier, self.bias, self.strength)
        return whole.widened(in_features)

    def delta(self, base: torch.Tensor) -> torch.Tensor:
        """Its rows of kron(left, right), in float32."""
        if not self.kept:
            return torch.kron(self.left.float(), self.right.float())
        pieces = [self._rows(start, stop) for start, stop in self.kept]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        """A range of rows; only the rows of `left` that reach into it are multiplied out."""
        height = self.right.shape[0]
        first, last = start // height, -(-stop // height)
        product = torch.kron(self.left[first:last].float(), self.right.float())
        return product[start - first * height : stop - first * height]


@dataclass(eq=False)
class Hadamard(Term):
    """delta = (up @ down) * (other_up @ other_down), element by element; ups are (out, rank), downs (rank, in)."""

    tensor_fields: ClassVar[tuple[str, ...]] = ("up", "down", "other_up", "other_down", "bias")
    name: str
    up: torch.Tensor
    down: torch.Tensor
    other_up: torch.Tensor
    other_down: torch.Tensor
    multiplier: float = 1.0
    bias: torch.Tensor | None = None
    strength: Strength = field(default_factory=Strength)

    def __post_init__(self) -> None:
        pairs = ((self.up, self.down), (self.other_up, self.other_down))
        matrices = all(up.dim() == down.dim() == 2 and up.shape[1] == down.shape[0] for up, down in pairs)
        alike = self.up.shape[:1] == self.other_up.shape[:1] and self.down.shape[1:] == self.other_down.shape[1:]
        self._require(
            matrices and alike,
            lambda: (
                f"The factors are {[tuple(part.shape) for pair in pairs for part in pair]}; both products have to "
                "be of one shape."
            ),
        )

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

    tensor_fields: ClassVar[tuple[str, ...]] = ("matrix", "bias")
    name: str
    matrix: torch.Tensor
    multiplier: float = 1.0
    bias: torch.Tensor | None = None
    strength: Strength = field(default_factory=Strength)

    def __post_init__(self) -> None:
        self._require(self.matrix.dim() == 2, lambda: f"The difference is {tuple(self.matrix.shape)}, not a matrix.")

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
    """delta = magnitude * (base + inner) / |base + inner| - base, where the inner term acts at its own scale.

    `scale` interpolates between the base and the whole. `norm` (1, in), where it is given, stands for |base + inner|:
    columns that run through other layers too cannot be measured here.
    """

    tensor_fields: ClassVar[tuple[str, ...]] = ("magnitude", "bias", "norm")
    name: str
    inner: Term
    magnitude: torch.Tensor
    multiplier: float = 1.0
    bias: torch.Tensor | None = None
    norm: torch.Tensor | None = None
    strength: Strength = field(default_factory=Strength)

    def __post_init__(self) -> None:
        fitting = ((self.inner.out_features, 1), (1, self.inner.in_features))
        sound = tuple(self.magnitude.shape) in fitting and self.inner.bias is None
        self._require(
            sound and (self.norm is None or self.norm.shape == self.magnitude.shape),
            lambda: (
                f"The magnitude is {tuple(self.magnitude.shape)} for a change of {self.inner.shape}; it has to be "
                "(out, 1) or (1, in), the norm of the same shape, and the inner term without a bias."
            ),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.inner.shape

    def holders(self) -> tuple[Term, ...]:
        """This and the inner term."""
        return (self, *self.inner.holders())

    def widened(self, in_features: int) -> Decomposed:
        """Zero columns for the inner term; columns of a weight that are zero stay zero whatever their magnitude."""
        extra = (0, in_features - self.in_features)
        inner, magnitude, norm = self.inner.widened(in_features), self.magnitude, self.norm
        if magnitude.shape[1] != 1:
            magnitude = F.pad(magnitude, extra)
            norm = None if norm is None else F.pad(norm, extra)
        return replace(self, inner=inner, magnitude=magnitude, norm=norm)

    def delta(self, base: torch.Tensor) -> torch.Tensor:
        """In float32; a row or column of zeros stays as it is."""
        whole = self.whole(base)
        along = 1 if self.magnitude.shape[1] == 1 else 0
        norm = whole.norm(dim=along, keepdim=True) if self.norm is None else self.norm
        factor = torch.where(norm > 0, self.magnitude.float() / norm, 1.0)
        return whole.mul_(factor).sub_(base)

    def whole(self, base: torch.Tensor) -> torch.Tensor:
        """base + inner, in float32: what is scaled to the magnitudes."""
        whole = base.clone()
        self.inner.add_to_weight(whole, base)
        return whole
