"""Low-rank terms of many layers stacked at once, as the decode kernels take them.

    up      (n, rows, R)        n matrices of one kind, each one layer or several that are decoded as one
    down    (n, bands * R, in)  ranks padded with zeros; a layer of several bands has its `down` once for each
    scale   (n, bands * R)      follows the scales of the terms, in place
    lift    (n, rows)           float32: no value of all scaled terms is larger in its row, by Cauchy and Schwarz

A FLUX adapter has 500 terms in a dozen shapes. Stacked layer by layer they cost 25 operations each, which is a tenth of
a second of a host; stacked by shape it is some hundred operations in all. The terms then lie in the stacks: nothing is
held twice.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from gossamer.kernels.low_rank import StackedTerms, common_type, padded_rank
from gossamer.layers.low_rank import LowRank
from gossamer.layers.strength import Shares


@dataclass(frozen=True, eq=False)
class Wanted:
    """The terms of layers that are decoded as one matrix: those of each layer, and how many bands of rows it fills."""

    layers: tuple[tuple[LowRank, ...], ...]
    bands: tuple[int, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks of the terms, which are the same in every layer."""
        return tuple(term.rank for term in self.layers[0])

    def same(self, other: Wanted) -> bool:
        """Whether both are the same terms in the same places."""
        return self.layers == other.layers and self.bands == other.bands  # a LowRank equals itself only

    def kind(self) -> Hashable:
        """Equal for what may be stacked together."""
        factors = [(term.up, term.down) for layer in self.layers for term in layer]
        shapes = [(up.shape, down.shape, up.dtype, down.dtype) for up, down in factors]
        return self.bands, len(self.layers), tuple(shapes), factors[0][0].device


@dataclass(frozen=True, eq=False)
class Stack:
    """What a `Wanted` became: slices of a batch."""

    wanted: Wanted
    terms: StackedTerms
    lift: torch.Tensor
    batch: Batch


class Batch:
    """Stacks of one kind; their scales are there after `show`."""

    def __init__(self, wanted: Sequence[Wanted]) -> None:
        self._wanted = tuple(wanted)
        self._shares = self._shared()
        first = self._wanted[0]
        self._columns = _Columns(first.ranks, padded_rank(sum(first.ranks)))
        up, down = self._stacked()
        self._heights = [layer[0].out_features for layer in first.layers]
        self._bounds = self._bounded(up, down)
        self._index = self._places().to(up.device)
        self._scale = torch.empty(len(self._wanted), len(self._index), dtype=torch.float32, device=up.device)
        self._lift = torch.empty(up.shape[:2], dtype=torch.float32, device=up.device)
        self._adopt(up, down)
        slices = zip(self._wanted, up, down, self._scale, self._lift, strict=True)
        self.stacks = [
            Stack(of, StackedTerms(a, b, scale, first.ranks), lift, self) for of, a, b, scale, lift in slices
        ]

    @property
    def device(self) -> torch.device:
        """Where the stacks are."""
        return self._scale.device

    def scales(self) -> torch.Tensor:
        """The scales as the terms have them now: float32 (n, layers, terms), on the host."""
        if not self._shares.hold():
            self._shares = self._shared()
        return self._shares.scales().view(len(self._wanted), len(self._heights), -1)

    def _shared(self) -> Shares:
        return Shares.of([term for of in self._wanted for layer in of.layers for term in layer])

    def show(self, scales: torch.Tensor) -> None:
        """Take these scales, which are on the device by now, in place."""
        flat = F.pad(scales.flatten(1), (0, 1))  # the padding reads the zero at the end
        torch.index_select(flat, 1, self._index, out=self._scale)
        start = 0
        for place, height in enumerate(self._heights):
            rows = slice(start, start + height)
            torch.sum(self._bounds[:, rows] * scales[:, place, None].abs(), dim=2, out=self._lift[:, rows])
            start += height

    def _stacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All factors, side by side and padded."""
        first, width = self._wanted[0], self._columns.width
        dtype = common_type([(term.up, term.down) for layer in first.layers for term in layer])
        ups, downs = [], []
        for place, bands in enumerate(first.bands):
            terms = [[of.layers[place][number] for of in self._wanted] for number in range(len(first.ranks))]
            up = _beside([torch.stack([term.up for term in same]).to(dtype) for same in terms], 2)
            down = _beside([torch.stack([term.down for term in same]).to(dtype) for same in terms], 1)
            ups.append(F.pad(up, (0, width - up.shape[2])) if up.shape[2] < width else up)
            padded = F.pad(down, (0, 0, 0, width - down.shape[1])) if down.shape[1] < width else down
            downs += [padded] * bands
        return _beside(ups, 1), _beside(downs, 1)

    def _bounded(self, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        """(n, rows, terms): norm of a row of `up` times the largest norm of a column of `down`."""
        bounds = []
        for columns in self._columns.slices():
            rows = torch.linalg.vector_norm(up[:, :, columns], dim=2, dtype=torch.float32)
            largest, stop = [], 0
            for bands, height in zip(self._wanted[0].bands, self._heights, strict=True):
                own = down[:, stop + columns.start : stop + columns.stop]
                norm = torch.linalg.vector_norm(own, dim=1, dtype=torch.float32).amax(dim=1, keepdim=True)
                largest.append(norm.expand(-1, height))
                stop += bands * self._columns.width
            bounds.append(rows * _beside(largest, 1))
        return torch.stack(bounds, dim=2)

    def _places(self) -> torch.Tensor:
        """For each rank of each band the place of its term among those of all layers, or the place behind the last."""
        terms, layers = len(self._columns.ranks), len(self._wanted[0].layers)
        places = []
        for layer, bands in enumerate(self._wanted[0].bands):
            own = [layer * terms + number for number, rank in enumerate(self._columns.ranks) for _ in range(rank)]
            places += (own + [layers * terms] * (self._columns.width - len(own))) * bands
        return torch.tensor(places)

    def _adopt(self, up: torch.Tensor, down: torch.Tensor) -> None:
        """Make the factors of every term views of the stacks, where their type is the same.

        What they were before is free then, so no term must be left out that shares its memory with one that is not.
        """
        first, row, band = self._wanted[0], 0, 0
        for place, (bands, height) in enumerate(zip(first.bands, self._heights, strict=True)):
            for number, columns in enumerate(self._columns.slices()):
                term = first.layers[place][number]
                if term.up.dtype == up.dtype and term.down.dtype == up.dtype:
                    own_up = up[:, row : row + height, columns]
                    own_down = down[:, band + columns.start : band + columns.stop]
                    self._hand_out(place, number, own_up, own_down)
            row, band = row + height, band + bands * self._columns.width

    def _hand_out(self, place: int, number: int, up: torch.Tensor, down: torch.Tensor) -> None:
        """Give the factors (n, rows, rank) and (n, rank, in) to the terms of one place, all at once."""
        for of, own_up, own_down in zip(self._wanted, up.unbind(), down.unbind(), strict=True):
            term = of.layers[place][number]
            term.up, term.down = own_up, own_down


@dataclass(frozen=True)
class _Columns:
    """Where the terms are among the ranks of a stack."""

    ranks: tuple[int, ...]
    width: int

    def slices(self) -> list[slice]:
        """The columns of each term."""
        return [slice(sum(self.ranks[:place]), sum(self.ranks[: place + 1])) for place in range(len(self.ranks))]


def stack(wanted: Sequence[Wanted]) -> list[Batch]:
    """Batches of all, one for each kind."""
    kinds: dict[Hashable, list[Wanted]] = {}
    for each in wanted:
        kinds.setdefault(each.kind(), []).append(each)
    return [Batch(same) for same in kinds.values()]


def refresh(batches: Iterable[Batch]) -> None:
    """Show the scales of all terms as they are now, in place; one copy from the host to each device."""
    devices: dict[torch.device, list[Batch]] = {}
    for batch in batches:
        devices.setdefault(batch.device, []).append(batch)
    for device, here in devices.items():
        scales = [batch.scales() for batch in here]
        sent = _sent(torch.cat([own.flatten() for own in scales]), device).split([own.numel() for own in scales])
        for batch, own, values in zip(here, scales, sent, strict=True):
            batch.show(values.view(own.shape))


def _beside(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def _sent(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor of the host on a device; from pinned memory, since any other copy waits for all work before it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
