"""How the stored weights of a block lie in one run of bytes, so that one copy moves them all.

groups    weights that run as one product lie side by side, role by role, where their format can be joined
offsets   whatever else begins at a multiple of ALIGNMENT bytes, as decode kernels and products like it
ring      each block has one range of a buffer for good
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import cast

import torch

from gossamer.layers import LinearGroup, QuantLinear, StoredWeight
from gossamer.layers.join import joinable

ALIGNMENT = 256


@dataclass(frozen=True, eq=False)
class Piece:
    """One tensor of a stored weight: its bytes (uint8) where they are now, and where they go."""

    stored: StoredWeight
    role: str
    tensor: torch.Tensor
    offset: int

    @property
    def nbytes(self) -> int:
        """Length."""
        return self.tensor.numel() * self.tensor.itemsize

    @property
    def source(self) -> torch.Tensor:
        """The bytes, one-dimensional."""
        return self.tensor.reshape(-1).view(torch.uint8)

    def part_of(self, memory: torch.Tensor) -> torch.Tensor:
        """The bytes of this piece in memory that holds all."""
        return memory[self.offset : self.offset + self.nbytes]

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """The tensor in memory that holds all."""
        return self.part_of(memory).view(self.tensor.dtype).view(self.tensor.shape)


@dataclass(frozen=True, eq=False)
class Layout:
    """Where everything lies in `nbytes` bytes, a multiple of ALIGNMENT."""

    pieces: tuple[Piece, ...]
    nbytes: int

    def views(self, memory: torch.Tensor) -> dict[StoredWeight, dict[str, torch.Tensor]]:
        """The tensors of each stored weight in memory that holds the bytes."""
        found: dict[StoredWeight, dict[str, torch.Tensor]] = {}
        for piece in self.pieces:
            found.setdefault(piece.stored, {})[piece.role] = piece.view(memory)
        return found

    @torch.no_grad()
    def gather(self, memory: torch.Tensor) -> None:
        """Copy all bytes into memory."""
        for piece in self.pieces:
            piece.part_of(memory).copy_(piece.source)


def lay_out(weights: Sequence[StoredWeight], groups: Iterable[LinearGroup]) -> Layout:
    """The layout of these weights; groups with other layers among them are not looked at."""
    pieces: list[Piece] = []
    offset = 0
    for run in _runs(weights, groups):
        for stored, role in run:
            piece = Piece(stored, role, stored.tensor(role).detach().contiguous(), offset)
            pieces.append(piece)
            offset += piece.nbytes
        offset = aligned(offset)
    return Layout(tuple(pieces), offset)


def aligned(count: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-count // ALIGNMENT) * ALIGNMENT


Range = tuple[int, int]  # start and stop, in bytes


def ring(sizes: Sequence[int], capacity: int) -> list[Range]:
    """Where in a buffer each block lies: one behind the other in laps, each from the front.

    Laps are about equally long. So the last blocks of a step lie near the end of the buffer, and the first ones of the
    next step can come to its front while the last ones are still used.
    """
    least = max(1, -(-sum(sizes) // max(1, capacity)))
    tried = (_in_laps(sizes, laps) for laps in count(least))  # with enough of them each block has one to itself
    return next(ranges for ranges in tried if max((stop for _, stop in ranges), default=0) <= capacity)


def _in_laps(sizes: Sequence[int], laps: int) -> list[Range]:
    """A block belongs to the lap that its middle is in."""
    ranges: list[Range] = []
    whole, before, position, lap = sum(sizes), 0, 0, 0
    for size in sizes:
        own = (2 * before + size) * laps // (2 * whole)
        position, lap = (position, lap) if own == lap else (0, own)
        ranges.append((position, position + size))
        before, position = before + size, position + size
    return ranges


def overlap(one: Range, other: Range) -> bool:
    """Whether two ranges have bytes in common."""
    return one[0] < other[1] and other[0] < one[1]


def lasting(ranges: Mapping[int, Range]) -> frozenset[int]:
    """Blocks that are in their ranges at the end of any step in order once they were there at its beginning.

    Those in a range of their own, and the first ones as far as they can come while the last one is still used.
    """
    order = list(ranges)
    alone = {
        index for index in order if not any(overlap(ranges[index], ranges[other]) for other in order if other != index)
    }
    ahead: list[int] = []
    for index in order[:-1]:
        if any(overlap(ranges[index], ranges[other]) for other in (*ahead, order[-1])):
            break
        ahead.append(index)
    return frozenset(alone.union(ahead))


Run = list[tuple[StoredWeight, str]]


def _runs(weights: Sequence[StoredWeight], groups: Iterable[LinearGroup]) -> Iterator[Run]:
    """Tensors that lie side by side, one run after the other."""
    left = dict.fromkeys(weights)
    for group in groups:
        joined = _joined(group, left)
        for role in joined[0].roles if joined else ():
            yield [(stored, role) for stored in joined]
        for stored in joined:
            del left[stored]
    for stored in left:
        yield from ([(stored, role)] for role in stored.roles)


def _joined(group: LinearGroup, left: dict[StoredWeight, None]) -> list[StoredWeight]:
    """The weights of a group that can be joined; none where it cannot."""
    layers = group.layers
    if len(layers) == 1 or not all(isinstance(layer, QuantLinear) and layer.stored in left for layer in layers):
        return []
    linears = cast(Sequence[QuantLinear], layers)
    return [layer.stored for layer in linears] if joinable(linears) else []
