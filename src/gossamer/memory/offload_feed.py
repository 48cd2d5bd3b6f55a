"""How the bytes of a block get from their home to the device: straight, or through a small pinned buffer.

A straight copy is queued at once. A staged one is read, piece by piece, by a thread of its own into the next buffer of
a ring, and copied from there, so that the disk and the bus work at the same time as the device computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from gossamer.memory.offload_copier import Copier, Mark
from gossamer.memory.offload_home import Home, Pinned, Scattered
from gossamer.memory.offload_host import host_bytes

RING_BUFFERS = 3  # one is read into, one is copied from, one waits
RING_BUFFER_BYTES = 16 << 20


class Arrival(Protocol):
    """A copy under way."""

    def hold(self) -> None:
        """Let what is queued from now on begin when all bytes are there; errors of reading are raised here."""


class Feed(Protocol):
    """Begins copies of whole blocks, in the order of the calls."""

    @property
    def obstacle(self) -> str | None:
        """Why copies cannot be recorded, and repeated by the device alone, or None."""

    def start(self, home: Home, target: torch.Tensor, after: Sequence[Mark]) -> Arrival:
        """Begin to copy a home's bytes into device memory once `after` has passed."""

    def close(self) -> None:
        """End what runs beside the caller."""


@dataclass(frozen=True, eq=False)
class Queued:
    """A copy that was queued."""

    copier: Copier
    end: Mark

    def hold(self) -> None:
        """Work waits on the device."""
        self.copier.hold(self.end)


class StraightFeed:
    """For pinned homes."""

    obstacle = None

    def __init__(self, copier: Copier) -> None:
        self._copier = copier

    def start(self, home: Home, target: torch.Tensor, after: Sequence[Mark]) -> Arrival:
        """Queue the one copy."""
        if not isinstance(home, Pinned):
            raise TypeError("only pinned bytes are copied straight")
        return Queued(self._copier, self._copier.copy(home.memory, target, after))

    def close(self) -> None:
        """Nothing runs."""


@dataclass(frozen=True, eq=False)
class Promised:
    """A copy that another thread queues."""

    copier: Copier
    end: Future[Mark]

    def hold(self) -> None:
        """The caller waits until the copy is queued, then work waits on the device."""
        self.copier.hold(self.end.result())


class StagedFeed:
    """For bytes that a device does not read by itself."""

    obstacle = "the host takes part in bringing the weights of blocks"

    def __init__(self, copier: Copier, device: torch.device, buffer_bytes: int = RING_BUFFER_BYTES) -> None:
        self._copier = copier
        self._ring = [host_bytes(buffer_bytes, device) for _ in range(RING_BUFFERS)]
        self._free: list[Mark | None] = [None] * RING_BUFFERS  # when each buffer may be written again
        self._next = 0
        self._reader = ThreadPoolExecutor(1, "gossamer-reader")

    def start(self, home: Home, target: torch.Tensor, after: Sequence[Mark]) -> Arrival:
        """Have the thread read and queue."""
        if not isinstance(home, Scattered):
            raise TypeError("pinned bytes need no staging")
        return Promised(self._copier, self._reader.submit(self._feed, home, target, tuple(after)))

    def close(self) -> None:
        """Wait for the thread; what it was to read after its current block is left out."""
        self._reader.shutdown(wait=True, cancel_futures=True)

    @torch.no_grad()
    def _feed(self, home: Scattered, target: torch.Tensor, after: Sequence[Mark]) -> Mark:
        end: Mark = None
        step = self._ring[0].numel()
        for start in range(0, home.nbytes, step):
            stop = min(start + step, home.nbytes)
            end = self._piece(home, start, stop, target, after)
        return end

    def _piece(self, home: Scattered, start: int, stop: int, target: torch.Tensor, after: Sequence[Mark]) -> Mark:
        place, self._next = self._next, (self._next + 1) % len(self._ring)
        if self._free[place] is not None:
            self._copier.wait(self._free[place])
        buffer = self._ring[place][: stop - start]
        home.read(start, stop, buffer)
        end = self._free[place] = self._copier.copy(buffer, target[start:stop], after)
        return end


def feed_of(copier: Copier, device: torch.device, pinned: bool) -> Feed:
    """The feed of homes that are all pinned, or all not."""
    return StraightFeed(copier) if pinned else StagedFeed(copier, device)
