"""What the layers of one model tell each other: that something changed, and what follows from it for all of them.

Changes are of two kinds. A change of structure (an adapter comes or goes, a scale becomes 0 or leaves it, a layer
moves) makes operands anew. A change of scales alone is written into the tensors that are there, so that whatever reads
them, such as a captured graph, goes on. Either is done for all products of the model at once, by the first to notice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch

from gossamer.kernels.decode_reference import LARGEST_CODE
from gossamer.layers.stacks import Batch, Stack, Wanted, refresh, stack
from gossamer.layers.strength import Strength

Lift = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # row scale, the base's, what terms add; rows of one part


class Product(Protocol):
    """What makes an operand from layers."""

    def wanted(self) -> Sequence[Wanted] | None:
        """The stacks that a new operand needs, or None where none is to be made."""

    def forget(self) -> None:
        """Drop the operand, so that its memory is free before the next one is made."""

    def remake(self, stacks: Sequence[Stack]) -> None:
        """Make the operand anew from these stacks; lifts and kept weights are not written yet."""

    def lifts(self) -> Iterable[Lift]:
        """The row scales that follow from the scales of terms."""

    def rewrite(self) -> None:
        """Write whatever else follows from the scales, in place."""

    def remerge(self) -> None:
        """Where the operand is a merged copy of scales that have changed since, write it again, in place."""

    def strengths(self) -> Iterable[Strength]:
        """Those of all terms of the layers."""


class ModelTerms:
    """The products of a model, the stacks that they use, and two counts of changes."""

    def __init__(self) -> None:
        self.structure = 0
        self.scales = 0
        self.shown = 0  # the count of scales that all tensors show
        self._stacks: WeakKeyDictionary[Product, Sequence[Stack]] = WeakKeyDictionary()

    def follow(self, product: Product) -> None:
        """Keep a product up to date from now on."""
        self._stacks.setdefault(product, ())

    def leave(self, product: Product) -> None:
        """Be done with a product."""
        self._stacks.pop(product, None)

    def renew(self) -> None:
        """Make all operands anew whose layers changed in structure, their terms stacked together."""
        stale = [(product, wanted) for product in self._stacks if (wanted := product.wanted()) is not None]
        for product, wanted in stale:
            product.forget()
            self._stacks[product] = [known for want in wanted if (known := self._known(product, want)) is not None]
        try:
            self._remake(stale)
        except BaseException:
            for product, _ in stale:
                product.forget()  # what was made is not written yet
            raise

    def _remake(self, stale: Sequence[tuple[Product, Sequence[Wanted]]]) -> None:
        missing = [want for product, wanted in stale for want in wanted if self._known(product, want) is None]
        made = {made.wanted: made for made in stack(missing)}
        for product, wanted in stale:
            stacks = [self._known(product, want) or made[want] for want in wanted]
            self._stacks[product] = stacks
            product.remake(stacks)
        for strength in {strength for product, _ in stale for strength in product.strengths()}:
            strength.watchers.add(self)
        refresh(_batches([self._stacks[product] for product, _ in stale]))  # those that were here already, too
        self._write([product for product, _ in stale])

    def refresh(self) -> None:
        """Show the scales as they are now, in the tensors that are there."""
        count = self.scales
        refresh(_batches(self._stacks.values()))
        self._write([product for product, stacks in self._stacks.items() if stacks])
        for product in [product for product, stacks in self._stacks.items() if not stacks]:
            product.remerge()
        self.shown = count

    def _write(self, products: Sequence[Product]) -> None:
        lifts = [lift for product in products for lift in product.lifts()]
        if lifts:
            scales, bases, added = zip(*lifts, strict=True)
            torch._foreach_copy_(scales, bases)
            torch._foreach_add_(scales, added, alpha=1.0 / LARGEST_CODE[torch.float8_e4m3fn])
        for product in products:
            product.rewrite()

    def _known(self, product: Product, wanted: Wanted) -> Stack | None:
        return next((known for known in self._stacks[product] if known.wanted.same(wanted)), None)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelTerms:
        """A copy of a model has products of its own."""
        copied = memo[id(self)] = ModelTerms()
        return copied


def _batches(stacks: Iterable[Sequence[Stack]]) -> list[Batch]:
    """The batches that stacks are slices of."""
    return list({id(one.batch): one.batch for each in stacks for one in each}.values())
