"""Where the components of a pipeline are while it paints: a plan carried out, and a smaller one when memory runs out.

    residence = Residence(parts, fit, device, files)      # the plan's placement is carried out
    residence.run(paint)                                  # again with the next smaller plan where memory ran out
    with residence.lifted(): ...                          # plain components for a while, to change their weights

Running out of memory is caught in one place, `surviving`, for loading and painting alike. Placements do not change
pixels, so nobody who looks at a picture can tell which plan it was painted by.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from gossamer.memory.byte_sizes import show_bytes
from gossamer.memory.gpu_memory import capped, free_bytes, is_out_of_memory, peak_bytes, release
from gossamer.memory.request import Plan
from gossamer.pipeline.fit import Fit

if TYPE_CHECKING:
    from gossamer.memory.offload import Offload
    from gossamer.memory.offload_home import MappedFile

Result = TypeVar("Result")
Tell = Callable[[str], None]


def warn(text: str) -> None:
    """How a program is told that asked for nothing else."""
    warnings.warn(text, stacklevel=2)


def surviving(action: Callable[[Fit], Result], fit: Fit, device: torch.device, tell: Tell = warn) -> Result:
    """What an action returns with a fit, or with the next smaller one whenever the device runs out of memory.

    Where no smaller one is left, an error says what would be enough.
    """
    while True:
        try:
            return action(fit)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # no more of the error: it holds the frames that it passed, and with them what they had on the device
        release(device)
        before, fit = fit.chosen, fit.smaller(_room(fit, device))
        tell(
            f"The GPU ran out of memory with a plan for {show_bytes(before.peak_gpu_bytes)}; going on with one for "
            f"{show_bytes(fit.chosen.peak_gpu_bytes)}. {fit.said()[0]}"
        )


def _room(fit: Fit, device: torch.device) -> int | None:
    """What tensors could have now; others may have taken some of it since the plan was made."""
    free = free_bytes(device)
    limits = [limit for limit in (fit.limit, free) if limit is not None]
    return min(limits, default=None)


class NoResidence:
    """Components that are on their device for good."""

    plan: Plan | None = None
    peak_bytes: int | None = None

    def run(self, action: Callable[[], Result]) -> Result:
        """Just do it."""
        return action()

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """They are plain already."""
        yield


class Residence:
    """Components placed as a plan says. Making one carries the plan out; the components may be on the host before."""

    def __init__(
        self,
        parts: Mapping[str, Any],
        fit: Fit,
        device: torch.device,
        files: Sequence[MappedFile] = (),
        tell: Tell = warn,
    ) -> None:
        self._parts, self._device, self._files, self._tell = parts, device, tuple(files), tell
        self._fit = fit
        self._handle: Offload | None = None
        self.place(fit)

    @property
    def plan(self) -> Plan | None:
        """The plan in force."""
        return self._fit.chosen

    @property
    def peak_bytes(self) -> int | None:
        """Most that tensors took of the GPU since loading began."""
        return peak_bytes(self._device)

    def run(self, action: Callable[[], Result]) -> Result:
        """What an action returns that uses the components, within the memory that was promised."""

        def placed(fit: Fit) -> Result:
            self.place(fit)
            return action()

        with capped(self._device, self._fit.limit):
            return surviving(placed, self._fit, self._device, self._tell)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Inside, nothing is streamed: all weights are on the device if they fit there, else on the host."""
        assert self._handle is not None
        streamed = sum(part.host_bytes for part in self._handle.parts.values())
        with capped(self._device, self._fit.limit):
            if self._fit.chosen.kind == "resident" and streamed <= self._fit.spare_bytes:
                self._handle.settle()
            else:
                self._handle.withdraw()
            self._handle = None
            try:
                yield
            finally:
                surviving(self.place, self._fit, self._device, self._tell)

    def place(self, fit: Fit) -> None:
        """Carry a fit out, unless it is in force."""
        from gossamer.memory.offload import offload

        handle, before, placement = self._handle, self._fit, fit.chosen.placement
        self._fit = fit
        if handle is not None and fit is before:
            return
        if handle is not None and handle.can_become(placement):
            self._handle = handle.rearranged(placement)
            return
        self.withdraw()
        self._handle = offload(self._parts, placement, self._device, self._files)

    def withdraw(self) -> None:
        """Have all components on the host, until the next picture places them again."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            handle.withdraw()
            release(self._device)
