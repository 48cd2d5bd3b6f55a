"""How long a step takes whose blocks come from the host: the order of copies and computing, worked out block by block.

    a copy     begins when the copy before it has ended, and the blocks that had bytes in its range were used
    a block    begins when the block before it has ended, and its own copy
    the end    is that of the last block, or of the last copy for the next step, whichever comes later

Blocks take equal parts of the computing: in FLUX.1 a double block of two streams and a single one of all tokens have as
many operations, though the double one has twice the bytes. So copies wait in one half of a step and the computing in
the other, unless the buffer takes up what arrives early.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from gossamer.memory.offload_carousel import Arrangement
from gossamer.memory.offload_layout import Range, lasting, overlap


@lru_cache(maxsize=4096)  # a plan weighs hundreds of arrangements, each with every placement of the other parts
def step_with_copies(sizes: tuple[int, ...], arrangement: Arrangement, rate: float, computing: float) -> float:
    """Seconds of a step that follows its like; `sizes` in bytes, `rate` in bytes a second, `computing` in seconds."""
    ranges = arrangement.ranges(dict(enumerate(sizes)))
    if not ranges:
        return computing
    there = lasting(ranges)
    behind = _behind(ranges)
    used: dict[int, float] = {}
    now = copied = 0.0
    for index in range(len(sizes)):
        if index in ranges and index not in there:
            copied = max(copied, used.get(behind[index], 0.0)) + sizes[index] / rate
            now = max(now, copied)
        now += computing / len(sizes)
        used[index] = now
    for index in sorted(there):
        last = _last_in(ranges[index], ranges)
        if last != index:  # else it has a range of its own
            copied = max(copied, used[last]) + sizes[index] / rate
    return max(now, copied)


def _behind(ranges: dict[int, Range]) -> dict[int, int]:
    """For each block the last one before it that has bytes in its range; -1 for none."""
    order = list(ranges)
    return {
        index: next((other for other in reversed(order[:place]) if overlap(ranges[other], ranges[index])), -1)
        for place, index in enumerate(order)
    }


def _last_in(place: Range, ranges: dict[int, Range]) -> int:
    """The last block of a step that has bytes in a range."""
    return max(index for index, other in ranges.items() if overlap(place, other))


def slots_worth_trying(sizes: Sequence[int]) -> tuple[int, ...]:
    """Numbers of slots between which the time of a step may differ; more than these hold half of a step's bytes."""
    whole = sum(sizes) // max(sizes)
    return tuple(count for count in (2, 3, 4, 5, 6, 8, 10, 12) if count == 2 or 2 * count <= whole)
