"""Low-rank terms of many layers stacked at once, as the decode kernels take them.

    up      (n, rows, R)        n matrices of one kind, each one layer or several that are decoded as one
    down    (n, bands * R, in)  ranks padded with zeros; a layer of several bands has its `down` once for each
    scale   (n, bands * R)      follows the scales of the terms, in place
    power   (n, bands * R)      of each rank of `down`, as `low_rank.powers` gives it
    lift    (n, rows)           float32: no value of all scaled terms is larger in its row, by Cauchy and Schwarz

A FLUX adapter has 500 terms in a dozen shapes. Stacked layer by layer they cost 25 operations each, which is a tenth of
a second of a host; stacked by shape it is some hundred operations in all. The terms then lie in the stacks: nothing is
held twice.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

from gossamer.kernels.low_rank import StackedTerms, common_type, padded_rank, powers
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
        self._heights = [layer[0].out_features for layer in first.layers]
        self._up, self._down = self._empty()
        self._take_over()
        self._power = powers(self._down)
        self._bounds = self._bounded()
        self._index = self._places().to(self._up.device)
        self._scale = torch.empty(len(self._wanted), len(self._index), dtype=torch.float32, device=self._up.device)
        self._lift = torch.empty(self._up.shape[:2], dtype=torch.float32, device=self._up.device)

    def stacks(self) -> list[Stack]:
        """One for each that was wanted. They hold the batch, and it does not hold them: that would be a cycle, whose
        memory is free only when Python next looks for cycles."""
        parts = zip(self._up, self._down, self._scale, self._power, strict=True)
        slices = zip(self._wanted, parts, self._lift, strict=True)
        return [Stack(of, StackedTerms(*each, self._columns.ranks), lift, self) for of, each, lift in slices]

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

    def _empty(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for all factors, side by side, zeros where they are padded."""
        first, width = self._wanted[0], self._columns.width
        factors = [(term.up, term.down) for layer in first.layers for term in layer]
        up, down = factors[0]
        made = partial(torch.zeros, dtype=common_type(factors), device=up.device)
        count, rows, ranks = len(self._wanted), sum(self._heights), sum(first.bands) * width
        return made(count, rows, width), made(count, ranks, down.shape[1])

    def _take_over(self) -> None:
        """Write all factors into the stacks, and make those of the same type views of them.

        What the factors of one place were before is free before those of the next are written, so little is there
        twice. No term must be left out that shares its memory with one that is not.
        """
        first, width, row, band = self._wanted[0], self._columns.width, 0, 0
        for place, (bands, height) in enumerate(zip(first.bands, self._heights, strict=True)):
            for number, columns in enumerate(self._columns.slices()):
                terms = [of.layers[place][number] for of in self._wanted]
                starts = range(band + columns.start, band + bands * width, width)
                up = self._up[:, row : row + height, columns]
                down, *others = [self._down[:, start : start + terms[0].rank] for start in starts]
                _write([term.up for term in terms], up)
                _write([term.down for term in terms], down)
                for other in others:
                    other.copy_(down)
                if terms[0].up.dtype == terms[0].down.dtype == up.dtype:
                    _hand_out(terms, up, down)
            row, band = row + height, band + bands * width

    def _bounded(self) -> torch.Tensor:
        """(n, rows, terms): norm of a row of `up` times the largest norm of a column of `down`."""
        up, down, bounds = self._up, self._down, []
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


@dataclass(frozen=True)
class _Columns:
    """Where the terms are among the ranks of a stack."""

    ranks: tuple[int, ...]
    width: int

    def slices(self) -> list[slice]:
        """The columns of each term."""
        return [slice(sum(self.ranks[:place]), sum(self.ranks[: place + 1])) for place in range(len(self.ranks))]


def stack(wanted: Sequence[Wanted]) -> list[Stack]:
    """The stacks of all, made in one batch for each kind."""
    kinds: dict[Hashable, list[Wanted]] = {}
    for each in wanted:
        kinds.setdefault(each.kind(), []).append(each)
    return [made for same in kinds.values() for made in Batch(same).stacks()]


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


def _write(matrices: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """Stack matrices into `out`, in its type."""
    if out.is_contiguous():
        torch.stack(list(matrices), out=out)
    else:
        out.copy_(torch.stack(list(matrices)))  # CUDA would write into strided memory by one kernel a matrix


def _hand_out(terms: Sequence[LowRank], up: torch.Tensor, down: torch.Tensor) -> None:
    """Give the factors (n, rows, rank) and (n, rank, in) to terms, all at once."""
    for term, own_up, own_down in zip(terms, up.unbind(), down.unbind(), strict=True):
        term.up, term.down = own_up, own_down


def _beside(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def _sent(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor of the host on a device; from pinned memory, since any other copy waits for all work before it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
