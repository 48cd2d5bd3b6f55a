"""How strongly an adapter acts: one number that all of its terms share, so that a change of it is one write.

    scale of a term = value of its strength * multiplier of its own

A term that is alone has a strength of its own, whose value is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakSet

import torch


class Watcher(Protocol):
    """What shows scales in tensors: a count of their changes."""

    scales: int


@dataclass(eq=False)
class Strength:
    """A number, those who show scales that follow from it, and a count of where it acts.

    `changes` counts every time that a term with this strength comes to a layer or leaves one, or a term takes this
    strength or another one. While it stays the same, this strength acts where it did.
    """

    value: float = 1.0
    changes: int = 0
    watchers: WeakSet[Watcher] = field(default_factory=WeakSet)

    def become(self, value: float) -> None:
        """Take another value. The watchers are told before, so that an interruption leaves nothing unnoticed."""
        self.tell()
        self.value = value

    def tell(self) -> None:
        """Have all watchers look again."""
        for watcher in self.watchers:
            watcher.scales += 1

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a model has watchers of its own."""
        return Strength, (self.value, self.changes)


class Sharing(Protocol):
    """What acts with a strength, times a multiplier."""

    strength: Strength
    multiplier: float


@dataclass(frozen=True, eq=False)
class Shares:
    """Many terms by their strengths, so that their scales are known without a look at each of them."""

    strengths: tuple[Strength, ...]
    changes: tuple[int, ...]  # the counts of these strengths when this was made
    which: torch.Tensor  # of the strengths, by term
    multipliers: torch.Tensor  # float64, by term

    @staticmethod
    def of(terms: Sequence[Sharing]) -> Shares:
        """The shares of terms, in their order."""
        places: dict[Strength, int] = {}
        which = [places.setdefault(term.strength, len(places)) for term in terms]
        multipliers = torch.tensor([term.multiplier for term in terms], dtype=torch.float64)
        changes = tuple([strength.changes for strength in places])
        return Shares(tuple(places), changes, torch.tensor(which, dtype=torch.int64), multipliers)

    def hold(self) -> bool:
        """Whether no term has taken another strength since."""
        return all(of.changes == then for of, then in zip(self.strengths, self.changes, strict=True))

    def scales(self) -> torch.Tensor:
        """The scales as they are now, float32 (terms,), on the host; each is rounded once."""
        values = torch.tensor([strength.value for strength in self.strengths], dtype=torch.float64)
        return values[self.which].mul_(self.multipliers).float()
