"""One step recorded with its copies, as a CUDA graph takes it, and repeated without the host.

    before    blocks that the recorded step finds on the device; what else is there it takes for free
    after     blocks that it leaves there, all of `before` among them, so that it can follow itself

The copies are a branch of what is recorded: it leaves the computing at the beginning and comes back to it at the end.
Marks of the recording mean nothing outside of it, nor those from before inside: before a recording and a repetition the
computing waits for all copies so far, and copies after a repetition wait for its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gossamer.memory.offload_carousel import Carousel


class Recording:
    """Of one step with the copies of a carousel, which has to be open."""

    def __init__(self, carousel: Carousel) -> None:
        self._carousel = carousel
        self._before = carousel.rest() & carousel.lasting
        self._after = self._before

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Inside, all blocks of a step arrive and depart in order. Afterwards the carousel is as if they had not."""
        with self._carousel.recorded(self._before) as after:
            yield
        self._after = frozenset(after)
        if not self._before <= self._after:
            raise RuntimeError(f"a step that begins with blocks {set(self._before)} ends with {set(self._after)} only")

    def possible(self) -> bool:
        """Whether the blocks that the step begins with are there; work that is queued next finds them."""
        return self._carousel.is_open and self._before <= self._carousel.rest()

    def repeated(self) -> None:
        """The step was queued."""
        self._carousel.have(self._after)
