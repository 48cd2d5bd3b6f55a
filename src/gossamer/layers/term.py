"""What an adapter adds to one linear layer.

    W_eff = base + sum_i scale_i * delta_i,   b_eff = bias + sum_i scale_i * bias_i

`low_rank` is the kind that kernels add while they decode. The other kinds, in `dense_terms`, are as exact, but need a
merged copy of the weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch

from gossamer.errors import AdapterError
from gossamer.layers.moves import move_terms
from gossamer.layers.strength import Strength


class Term(ABC):
    """An adapter's share of one layer; kinds are dataclasses of their tensors, a name, a multiplier and a bias.

    `strength` is that of the adapter, which its terms share; times `multiplier` it is the `scale` of the term, which
    multiplies all of it and may change between any two calls; 0 is off. `bias` is (out,) or None. `tensor_fields` are
    the names of all fields that hold a tensor, or None.
    """

    tensor_fields: ClassVar[tuple[str, ...]]
    name: str
    multiplier: float
    bias: torch.Tensor | None
    strength: Strength

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight that this is added to."""

    @abstractmethod
    def delta(self, base: torch.Tensor) -> torch.Tensor:
        """What scale 1 adds to the float32 base weight (out, in); do not write into either."""

    @abstractmethod
    def widened(self, in_features: int) -> Term:
        """The same for a layer of another width: zero columns at the end are added, or taken away again."""

    def add_to_weight(self, weight: torch.Tensor, base: torch.Tensor) -> None:
        """Add scale * delta to a float32 weight (out, in), in place."""
        weight.add_(self.delta(base), alpha=self.scale)

    @property
    def scale(self) -> float:
        """What multiplies the term; set alone, it leaves the other terms of the adapter as they are."""
        return self.strength.value * self.multiplier

    @scale.setter
    def scale(self, scale: float) -> None:
        self.share(Strength(), scale)

    def share(self, strength: Strength, multiplier: float) -> None:
        """Act with this strength times a multiplier from now on; who showed the scale before shows it still."""
        before = self.strength
        strength.watchers.update(before.watchers)
        for one in (before, strength):
            one.changes += 1
            one.tell()
        self.strength, self.multiplier = strength, multiplier

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.shape[1]

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of everything that makes up this term."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors that make up this term."""
        values = [getattr(holder, name) for holder in self.holders() for name in holder.tensor_fields]
        return tuple([value for value in values if value is not None])

    def holders(self) -> tuple[Term, ...]:
        """This term, and those inside of it."""
        return (self,)

    def move(self, device: torch.device | str) -> None:
        """Put the tensors on a device, their types unchanged."""
        wanted = torch.device(device)
        if any(tensor.device != wanted for tensor in self.tensors()):
            move_terms([(self, wanted)])

    def scaled_bias(self) -> torch.Tensor:
        """scale * bias in float32 (out,); zeros where the adapter brings no bias."""
        if self.bias is None:
            return torch.zeros(self.out_features, dtype=torch.float32, device=self.tensors()[0].device)
        return self.scale * self.bias.float()

    def _require(self, sound: bool, why: Callable[[], str]) -> None:
        """Refuse parts that do not belong together; a full set has 500 terms, so words are made only when needed."""
        if not sound:
            raise self._unfit(why())
        if self.bias is not None and self.bias.shape != (self.out_features,):
            raise self._unfit(f"The bias is {tuple(self.bias.shape)}; the weight has {self.out_features} rows.")

    def _unfit(self, why: str) -> AdapterError:
        return AdapterError(
            f"Adapter {self.name!r} has parts that do not fit together.",
            why,
            "Check that all of them come from the same layer of the same file.",
        )
