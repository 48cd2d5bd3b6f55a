"""Blocks that take turns in device memory, copied there ahead of their use.

Each block has one range of a buffer for good (see `offload_layout.ring`), so its weights always come to the same
address. A copy into a range waits, on the device, until the blocks that had bytes there were used; a block waits until
its own bytes are there. Blocks that stay have memory of their own and are copied once.

    block i     arrive: its copy is waited for      compute      depart: the end of its use is marked
    copies      everything that the schedule expects, soonest first, as far as ranges are free of what comes sooner

A step can be recorded with its copies, see `offload_recording`. What such a step finds on the device it leaves there
at its end, so that it can follow itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

from gossamer.errors import GossamerError
from gossamer.memory.offload_copier import Copier, Mark
from gossamer.memory.offload_feed import Arrival, Feed
from gossamer.memory.offload_layout import Range, lasting, overlap, ring
from gossamer.memory.offload_schedule import Schedule
from gossamer.memory.offload_station import Station
from gossamer.memory.placement import Placement, spread


@dataclass(frozen=True)
class Arrangement:
    """Which blocks stay on the device, and how many others its buffer is for."""

    resident: frozenset[int]
    slots: int

    @classmethod
    def of(cls, placement: Placement, count: int) -> Arrangement:
        """Of a transformer's `count` blocks, as a placement says."""
        return cls(spread(count, placement.resident_blocks), placement.slots)

    def streamed(self, sizes: Mapping[int, int]) -> dict[int, int]:
        """The sizes of those that do not stay."""
        return {index: size for index, size in sizes.items() if index not in self.resident}

    def buffer_bytes(self, sizes: Mapping[int, int]) -> int:
        """Of the buffer that the others share: `slots` of the largest, or all of them where that is less."""
        streamed = self.streamed(sizes).values()
        return min(self.slots * max(streamed, default=0), sum(streamed))

    def device_bytes(self, sizes: Mapping[int, int]) -> int:
        """Of the buffer and of the blocks that stay."""
        return self.buffer_bytes(sizes) + sum(size for index, size in sizes.items() if index in self.resident)

    def ranges(self, sizes: Mapping[int, int]) -> dict[int, Range]:
        """Where in the buffer each block that does not stay has its bytes."""
        streamed = self.streamed(sizes)
        return dict(zip(streamed, ring(list(streamed.values()), self.buffer_bytes(sizes)), strict=True))


@dataclass(eq=False)
class Held:
    """A block whose bytes are in its place, or on their way; `arrival` until it was waited for."""

    arrival: Arrival | None
    used: Mark = None
    in_use: bool = False


class Carousel:
    """The device memory of stations, by the index of their blocks; it opens when the first one is asked for.

    Blocks without a station are none of its business. It closes when the schedule expects no more of its own.
    """

    def __init__(
        self,
        stations: Mapping[int, Station],
        arrangement: Arrangement,
        schedule: Schedule,
        copier: Copier,
        feed: Feed,
    ) -> None:
        self._stations = dict(stations)
        self._sizes = {index: station.nbytes for index, station in self._stations.items()}
        self._arrangement = arrangement
        self._schedule = schedule
        self._copier = copier
        self._feed = feed
        self._ranges = arrangement.ranges(self._sizes)
        self._memory: dict[int, torch.Tensor] = {}
        self._free_from: Mark = None
        self._held: dict[int, Held] = {}
        self.lasting = lasting(self._ranges) | (self._stations.keys() - self._ranges.keys())
        self._recorded = False

    @property
    def device_bytes(self) -> int:
        """Device memory that it takes while it is open."""
        return self._arrangement.device_bytes(self._sizes)

    @property
    def streamed_bytes(self) -> int:
        """Of all blocks that do not stay; none where the buffer holds them all."""
        streamed = sum(self._sizes[index] for index in self._ranges)
        return 0 if streamed == self._arrangement.buffer_bytes(self._sizes) else streamed

    # what the seam calls ----------------------------------------------------------------------------------------------

    def arrive(self, index: int) -> None:
        """Have a block's bytes on the device before anything that is queued from now on."""
        if index not in self._stations:
            return
        if not self.is_open:
            self._open()
        if not self._waited_for(index):  # what failed while nobody needed it is tried again, now that it is needed
            self._start(index)
            held = self._held.pop(index)  # and is not held if it fails again
            assert held.arrival is not None
            held.arrival.hold()
            self._held[index] = Held(None)
        held = self._held[index]
        held.in_use = True
        self._stations[index].slot.filled = True
        self._prefetch(index)

    def _waited_for(self, index: int) -> bool:
        """Wait for a copy that was begun ahead; whether there was one and it succeeded."""
        held = self._held.get(index)
        if held is None or held.arrival is None:
            return held is not None
        try:
            held.arrival.hold()
        except GossamerError:
            del self._held[index]
            return False
        held.arrival = None
        return True

    def depart(self, index: int) -> None:
        """All uses of the block were queued; nothing happens for one that could not arrive."""
        held = self._held.get(index)
        if held is None or not held.in_use:
            return
        held.in_use = False
        if index in self._ranges:
            self._stations[index].slot.filled = False
            held.used = self._copier.reached()
        if next(self._expected(index), None) is None:
            self.close()
        else:
            self._prefetch(index)

    # recorded steps ---------------------------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether it has its memory."""
        return bool(self._memory)

    def obstacle(self) -> str | None:
        """Why a recorded step cannot be repeated with its copies, or None."""
        return self._feed.obstacle if self._ranges else None

    def rest(self) -> frozenset[int]:
        """Have work that is queued from now on begin after all copies so far; which blocks are there then."""
        return frozenset(index for index in list(self._held) if self._waited_for(index))

    @contextmanager
    def recorded(self, before: frozenset[int]) -> Iterator[set[int]]:
        """Inside, blocks arrive and depart in a step that is recorded, of which only `before` are there at first.

        The set that it hands out has those in it, at the end, that are there then. Nothing has happened afterwards.
        """
        after: set[int] = set()
        kept = self._held, self._free_from
        self.have(before)
        self._recorded = True
        try:
            yield after
            after |= self.rest()
        finally:
            self._held, self._free_from = kept
            self._recorded = False

    def have(self, blocks: frozenset[int]) -> None:
        """Take it that the bytes of these blocks, and of no others, are there when all that was queued is done."""
        self._held = {index: Held(None) for index in blocks}
        self._free_from = self._copier.reached()

    # memory -----------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give the device memory back, once all copies into it are done."""
        for held in self._held.values():
            if held.arrival is not None:
                with suppress(GossamerError):  # nobody will read what could not be fetched
                    held.arrival.hold()
        self._held.clear()
        for station in self._stations.values():
            station.vacate()
        self._memory.clear()

    def _open(self) -> None:
        """Take the memory. Copies begin when the device is done with what had the memory before."""
        device = next(iter(self._stations.values())).slot.device
        with torch.inference_mode(False):
            shared = torch.empty(self._arrangement.buffer_bytes(self._sizes), dtype=torch.uint8, device=device)
            for index, size in self._sizes.items():
                place = self._ranges.get(index)
                own = torch.empty(size, dtype=torch.uint8, device=device) if place is None else shared[slice(*place)]
                self._memory[index] = own
        for index, station in self._stations.items():
            station.occupy(self._memory[index])
        self._free_from = self._copier.reached()

    # copies -----------------------------------------------------------------------------------------------------------

    def _expected(self, index: int) -> Iterator[int]:
        return (expected for expected in self._schedule(index) if expected in self._stations)

    def _prefetch(self, index: int) -> None:
        """Begin the copies that are expected next, up to the first that has to wait for a block still to be used."""
        if len(self._held) == len(self._stations):
            return
        sooner: set[int] = set()
        for expected in self._expected(index):
            if expected not in self._held:
                # a recorded step ends when all of its copies have: what could only begin at its end is left to the next
                if self._recorded and expected <= index and expected not in self.lasting:
                    return
                if any(other in sooner or self._held[other].in_use for other in self._in_the_way(expected)):
                    return
                self._start(expected)
            sooner.add(expected)

    def _start(self, index: int) -> None:
        """Begin a block's copy. What lies in its range is lost, once it was used."""
        after = [self._free_from]
        for other in self._in_the_way(index):
            used = self._held.pop(other).used
            if used is not None:
                after.append(used)
        self._held[index] = Held(self._feed.start(self._stations[index].home, self._memory[index], after))

    def _in_the_way(self, index: int) -> list[int]:
        """Blocks with bytes in the range of this one."""
        place = self._ranges.get(index, (0, 0))
        return [other for other in self._held if overlap(place, self._ranges.get(other, (0, 0)))]
