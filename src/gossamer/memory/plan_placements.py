"""Where the blocks of a model in given formats may be: the placements among which the planner chooses.

Blocks that stay and a larger buffer for the others compete for the same memory. Which is worth more follows from the
timeline of a step, so every number of slots is tried with as many resident blocks as fit, and with fewer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from gossamer.kernels.choice import Choice
from gossamer.memory.diffusers_names import Offload
from gossamer.memory.footprint import Setting, gpu_bytes, host_bytes
from gossamer.memory.offload_carousel import Arrangement
from gossamer.memory.offload_timeline import slots_worth_trying
from gossamer.memory.placement import Placement
from gossamer.memory.request import PlanRequest
from gossamer.memory.roofline import Machine, streamed_seconds


@dataclass(frozen=True)
class Way:
    """A model in given formats on a card, whose placement is still open; `computing` is in seconds a step."""

    request: PlanRequest
    choice: Choice
    machine: Machine
    setting: Setting
    computing: float

    @property
    def blocks(self) -> int:
        """How many the transformer has."""
        return len(self.setting.weights.blocks)


def placements(way: Way, base: Placement, offload: Offload) -> Iterator[Placement]:
    """All blocks resident, none in the smallest buffer and in the fastest, and the fastest of all that fit."""
    whole = replace(base, resident_blocks=way.blocks)
    none = (base, _fastest(way, [[base], *([each] for each in _buffers(way, base) if _fits(way, each))]))
    some = () if _fits(way, whole) else (_fastest(way, _fitting(way, base)),)
    for placement in dict.fromkeys((whole, *some, *none)):
        count = placement.resident_blocks
        if offload.allows(placement, way.blocks) and (placement.pinned or count < way.blocks):
            yield placement
            # a last resort: what the pre-pass needs on the host is more than there is
            if count == way.blocks and placement.text == "resident" and too_much_host(way, placement):
                yield replace(placement, modulation="resident")


def _buffers(way: Way, base: Placement) -> list[Placement]:
    """With every number of slots that makes a difference, fitting or not."""
    return [replace(base, slots=slots) for slots in slots_worth_trying(way.setting.weights.blocks)]


def _fitting(way: Way, base: Placement) -> Iterator[list[Placement]]:
    """For each number of slots the placements that fit, most resident blocks first; `base` where nothing fits."""
    for buffer in _buffers(way, base):
        most = _most_resident(way, buffer)
        yield [replace(buffer, resident_blocks=count) for count in range(most, -1, -1)] or [base]


def _fastest(way: Way, groups: Iterable[Sequence[Placement]]) -> Placement:
    """The first of the fastest. In a group every placement moves more bytes than the one before it."""
    best_seconds, fastest = math.inf, None
    for group in groups:
        for placement in group:
            if fastest is not None and _least_step(way, placement) >= best_seconds:
                break
            seconds = step_of(way, placement)
            if seconds < best_seconds:
                best_seconds, fastest = seconds, placement
    assert fastest is not None
    return fastest


def _most_resident(way: Way, buffer: Placement) -> int:
    """The most blocks that fit on the GPU beside the slots for the others, -1 where none do; bytes grow with each."""
    low, high = -1, way.blocks - 1
    while low < high:
        middle = (low + high + 1) // 2
        if _fits(way, replace(buffer, resident_blocks=middle)):
            low = middle
        else:
            high = middle - 1
    return low


# what a placement takes -----------------------------------------------------------------------------------------------


def step_of(way: Way, placement: Placement) -> float:
    """Seconds of a step."""
    blocks = way.setting.weights.blocks
    return streamed_seconds(way.machine, way.computing, blocks, Arrangement.of(placement, way.blocks), placement.pinned)


def _least_step(way: Way, placement: Placement) -> float:
    """What a step takes at least: its computing, or its copies."""
    streamed = Arrangement.of(placement, way.blocks).streamed(dict(enumerate(way.setting.weights.blocks)))
    return max(way.computing, sum(streamed.values()) / way.machine.bus)


def _fits(way: Way, placement: Placement) -> bool:
    return _peak(way, placement) <= way.request.budget.gpu_free


def _peak(way: Way, placement: Placement) -> int:
    return max(sum(parts.values()) for parts in gpu_bytes(way.setting, placement).values())


def too_much_host(way: Way, placement: Placement) -> bool:
    """Whether the process would take more of the host than there is."""
    return host_bytes(way.setting, placement) > host_free(way.request)


def host_free(request: PlanRequest) -> float:
    """Bytes of the host for the process, without end where nobody limits them."""
    return math.inf if request.budget.host_free is None else request.budget.host_free
