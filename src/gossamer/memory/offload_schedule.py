"""Which blocks are expected next: what the prefetch asks before it copies.

A step cache that will leave blocks out gives a schedule of its own, and what it leaves out is not copied. A schedule
may be wrong: a block that was not expected is copied when it is asked for, and waited for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Protocol


class Schedule(Protocol):
    """What follows a block."""

    def __call__(self, index: int, /) -> Iterable[int]:
        """Blocks that will be asked for after block `index`, soonest first; nothing after what is not known yet."""


@dataclass(frozen=True)
class Cyclic:
    """Every block in order, step after step: behind the last one comes the first one of the next step."""

    count: int

    def __call__(self, index: int, /) -> Iterable[int]:
        """All of them, in the order in which they come; the block itself is the last."""
        return chain(range(index + 1, self.count), range(index + 1))


@dataclass(frozen=True)
class Once:
    """Every block in order, and then no more."""

    count: int

    def __call__(self, index: int, /) -> Iterable[int]:
        """Those behind."""
        return range(index + 1, self.count)
