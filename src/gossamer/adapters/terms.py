"""What an adapter adds to one linear, in one small type a family. Tensors keep the types that the file gave them.

    LowRankTerm      up @ down                                  LoRA
    KroneckerTerm    left (x) right, each whole or factored     LoKr
    HadamardTerm     (up @ down) * (other_up @ other_down)      LoHa
    DifferenceTerm   a matrix of the weight's own size          .diff of extracts, LyCORIS "full"
    DecomposedTerm   one of these, and a magnitude              DoRA
    BiasTerm         nothing for the weight                     .diff_b alone

Each of them times `multiplier` (alpha / rank) is added to the weight, and multiplier * bias (out,) to the bias.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace

import torch

from gossamer.adapters.rows import Rows, height_of, rows_of_rows, take_rows
from gossamer.errors import AdapterError


class LinearTerm(ABC):
    """An adapter's change of one linear."""

    multiplier: float
    bias: torch.Tensor | None

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """(out, in) of the weight that this is added to; (out,) where it changes the bias only."""

    @abstractmethod
    def rows(self, rows: Rows) -> LinearTerm:
        """What this is for a linear that has only those rows of the weight; exact."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(self))

    def _bias_rows(self, rows: Rows) -> torch.Tensor | None:
        return None if self.bias is None else take_rows(self.bias, rows)

    def _require(self, sound: bool, kind: str, needed: str) -> None:
        """Refuse parts that do not belong together."""
        if sound and (self.bias is None or tuple(self.bias.shape) == self.shape[:1]):
            return
        bias = "" if self.bias is None else f" and the bias is {tuple(self.bias.shape)}"
        found = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_of(self) if tensor is not self.bias)
        raise AdapterError(
            f"The factors of a {kind} term do not fit together.",
            f"They are {found or 'none'}{bias}; they have to be {needed}.",
            "Check that all of them come from the same layer of the same file.",
        )


@dataclass(frozen=True, eq=False)
class LowRankTerm(LinearTerm):
    """multiplier * up @ down: `down` is (rank, in), `up` is (out, rank)."""

    down: torch.Tensor
    up: torch.Tensor
    multiplier: float = 1.0
    bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        sound = self.down.dim() == 2 and self.up.dim() == 2 and self.down.shape[0] == self.up.shape[1]
        self._require(sound, "low-rank", "(rank, in) and (out, rank), and a bias (out,)")

    @property
    def rank(self) -> int:
        """Rows of down, columns of up."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.up.shape[0], self.down.shape[1]

    def rows(self, rows: Rows) -> LowRankTerm:
        """The same down and those rows of up."""
        return replace(self, up=take_rows(self.up, rows), bias=self._bias_rows(rows))


@dataclass(frozen=True, eq=False)
class Matrix:
    """A factor of a Kronecker product: `up` (rows, columns) alone, or up (rows, rank) @ down (rank, columns)."""

    up: torch.Tensor
    down: torch.Tensor | None = None

    @property
    def sound(self) -> bool:
        """Whether it is a matrix."""
        fitting = self.down is None or (self.down.dim() == 2 and self.down.shape[:1] == self.up.shape[1:])
        return self.up.dim() == 2 and fitting

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.up.shape[0], (self.up if self.down is None else self.down).shape[1]

    @property
    def rank(self) -> int | None:
        """Of two factors; None where it is whole."""
        return None if self.down is None else self.down.shape[0]

    def value(self) -> torch.Tensor:
        """The matrix in float32, or as it is where it is whole."""
        return self.up if self.down is None else self.up.float() @ self.down.float()


@dataclass(frozen=True, eq=False)
class KroneckerTerm(LinearTerm):
    """multiplier * kron(left, right), or those `kept` rows of it: what one part of a fused module gets.

    The rows of a part begin and end inside a block of `right` more often than not (a qkv of 9216 rows is 4 x 2304 or
    16 x 576, a part 3072), so the two factors are kept and the rows are taken when they are multiplied out.
    """

    left: Matrix
    right: Matrix
    multiplier: float = 1.0
    bias: torch.Tensor | None = None
    kept: Rows = ()

    def __post_init__(self) -> None:
        needed = "matrices, or pairs (rows, rank) and (rank, columns), and a bias (out,)"
        self._require(self.left.sound and self.right.sound, "LoKr", needed)

    @property
    def whole_height(self) -> int:
        """Rows of the Kronecker product itself."""
        return self.left.shape[0] * self.right.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return height_of(self.kept) if self.kept else self.whole_height, self.left.shape[1] * self.right.shape[1]

    def rows(self, rows: Rows) -> KroneckerTerm:
        """The same factors, other rows of their product."""
        return replace(self, kept=rows_of_rows(self._all_rows, rows), bias=self._bias_rows(rows))

    @property
    def is_whole(self) -> bool:
        """Whether it has every row of the product, in order."""
        return self._all_rows == ((0, self.whole_height),)

    @property
    def _all_rows(self) -> Rows:
        return self.kept or ((0, self.whole_height),)


@dataclass(frozen=True, eq=False)
class HadamardTerm(LinearTerm):
    """multiplier * (up @ down) * (other_up @ other_down), element by element; ups (out, rank), downs (rank, in)."""

    up: torch.Tensor
    down: torch.Tensor
    other_up: torch.Tensor
    other_down: torch.Tensor
    multiplier: float = 1.0
    bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        pairs = ((self.up, self.down), (self.other_up, self.other_down))
        sound = all(up.dim() == down.dim() == 2 and up.shape[1] == down.shape[0] for up, down in pairs)
        alike = self.up.shape[:1] == self.other_up.shape[:1] and self.down.shape[1:] == self.other_down.shape[1:]
        self._require(sound and alike, "LoHa", "two pairs (out, rank) and (rank, in), and a bias (out,)")

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.up.shape[0], self.down.shape[1]

    def rows(self, rows: Rows) -> HadamardTerm:
        """The same downs and those rows of both ups."""
        up, other_up = take_rows(self.up, rows), take_rows(self.other_up, rows)
        return replace(self, up=up, other_up=other_up, bias=self._bias_rows(rows))


@dataclass(frozen=True, eq=False)
class DifferenceTerm(LinearTerm):
    """multiplier * matrix (out, in)."""

    matrix: torch.Tensor
    multiplier: float = 1.0
    bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self._require(self.matrix.dim() == 2, "difference", "(out, in), and a bias (out,)")

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def rows(self, rows: Rows) -> DifferenceTerm:
        """Those rows."""
        return replace(self, matrix=take_rows(self.matrix, rows), bias=self._bias_rows(rows))


@dataclass(frozen=True, eq=False)
class DecomposedTerm(LinearTerm):
    """magnitude * (base + inner) / |base + inner| - base: DoRA over any of the kinds above.

    `magnitude` is (out, 1), then |.| is the norm of each row, or (1, in), then of each column. The inner term acts
    with its own multiplier and has no bias. Where the columns are those of a fused module, `whole` names all linears
    in it, and the norm runs over the rows of all of them.
    """

    inner: LinearTerm
    magnitude: torch.Tensor
    bias: torch.Tensor | None = None
    multiplier: float = field(default=1.0, init=False)  # alpha acts inside
    whole: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        fitting = ((self.inner.shape[0], 1), (1, *self.inner.shape[1:]))
        sound = self.inner.bias is None and tuple(self.magnitude.shape) in fitting and len(self.inner.shape) == 2
        self._require(sound, "DoRA", "those of its inner term, then a magnitude (out, 1) or (1, in)")

    @property
    def of_rows(self) -> bool:
        """Whether each output has a magnitude, rather than each input."""
        return self.magnitude.shape[1] == 1

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return self.inner.shape

    def rows(self, rows: Rows) -> DecomposedTerm:
        """Rows of the inner term and of magnitudes of rows; magnitudes of columns need `whole` beside it."""
        magnitude = take_rows(self.magnitude, rows) if self.of_rows else self.magnitude
        return replace(self, inner=self.inner.rows(rows), magnitude=magnitude, bias=self._bias_rows(rows))


@dataclass(frozen=True, eq=False)
class BiasTerm(LinearTerm):
    """multiplier * bias, and the weight as it is."""

    bias: torch.Tensor
    multiplier: float = 1.0

    def __post_init__(self) -> None:
        self._require(self.bias.dim() == 1, "bias", "a bias (out,)")

    @property
    def shape(self) -> tuple[int]:
        """(out,); it fits a linear of any number of inputs."""
        return (self.bias.numel(),)

    def rows(self, rows: Rows) -> BiasTerm:
        """Those values."""
        return replace(self, bias=take_rows(self.bias, rows))


def folded(term: LinearTerm) -> LinearTerm:
    """The same change with a multiplier of 1: it goes into one factor and the bias, in float32."""
    if term.multiplier == 1 or isinstance(term, DecomposedTerm):
        return term
    bias = None if term.bias is None else term.bias.float() * term.multiplier
    match term:
        case LowRankTerm():
            return LowRankTerm(term.down, term.up.float() * term.multiplier, 1.0, bias)
        case HadamardTerm():
            return replace(term, up=term.up.float() * term.multiplier, multiplier=1.0, bias=bias)
        case KroneckerTerm():
            left = replace(term.left, up=term.left.up.float() * term.multiplier)
            return replace(term, left=left, multiplier=1.0, bias=bias)
        case DifferenceTerm():
            return DifferenceTerm(term.matrix.float() * term.multiplier, 1.0, bias)
        case BiasTerm():
            return BiasTerm(term.bias.float() * term.multiplier)
    raise TypeError(f"no way to fold the multiplier of a {type(term).__name__}")


def rank_of(term: LinearTerm) -> int | None:
    """The rank that people know a term by; None for a kind that has none."""
    match term:
        case LowRankTerm() | HadamardTerm():
            return term.down.shape[0]
        case KroneckerTerm():
            return term.right.rank if term.right.rank is not None else term.left.rank
        case DecomposedTerm():
            return rank_of(term.inner)
    return None


def tensors_of(part: object) -> Iterator[torch.Tensor]:
    """Every tensor of a term, those of its parts included."""
    for known in fields(part):  # type: ignore[arg-type]
        value = getattr(part, known.name)
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (LinearTerm, Matrix)):
            yield from tensors_of(value)
