"""Who copies bytes into device memory, and what waits for what: on CUDA a stream beside the computing one.

    copier.copy(source, target, after)   begin a copy once `after` has passed; a mark of its end
    copier.reached()                     a mark of the end of all work that was queued so far
    copier.hold(mark)                    work queued from now on begins after the mark
    copier.wait(mark)                    the host itself waits for it

On a CPU work is done when a call returns, so there marks have passed already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

Mark = Any  # a CUDA event, or what another copier takes for one


class Copier(Protocol):
    """Copies of one device, begun in the order of the calls."""

    def copy(self, source: torch.Tensor, target: torch.Tensor, after: Sequence[Mark] = ()) -> Mark:
        """Copy bytes (uint8, one-dimensional, of equal length) once every mark of `after` has passed."""

    def reached(self) -> Mark:
        """The end of the work that the calling thread queued on the device so far."""

    def hold(self, mark: Mark) -> None:
        """Let what the calling thread queues from now on begin after the mark."""

    def wait(self, mark: Mark) -> None:
        """Return when the mark has passed."""


class HostCopier:
    """Copies at once, for a CPU as the device."""

    def copy(self, source: torch.Tensor, target: torch.Tensor, after: Sequence[Mark] = ()) -> Mark:
        """Copy now."""
        with torch.no_grad():
            target.copy_(source)

    def reached(self) -> Mark:
        """It has passed."""

    def hold(self, mark: Mark) -> None:
        """It has passed."""

    def wait(self, mark: Mark) -> None:
        """It has passed."""


class CudaCopier:
    """Copies on a stream of its own; the source has to be pinned, or the host waits for every copy."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def copy(self, source: torch.Tensor, target: torch.Tensor, after: Sequence[Mark] = ()) -> Mark:
        """Queue the copy behind `after`."""
        with torch.no_grad(), torch.cuda.stream(self._stream):
            for mark in after:
                self._stream.wait_event(mark)
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def reached(self) -> Mark:
        """An event on the current stream."""
        return torch.cuda.current_stream(self._device).record_event()

    def hold(self, mark: Mark) -> None:
        """The current stream waits for the event, the host does not."""
        torch.cuda.current_stream(self._device).wait_event(mark)

    def wait(self, mark: Mark) -> None:
        """The host waits for the event."""
        mark.synchronize()


def copier_of(device: torch.device) -> Copier:
    """The copier of a device."""
    return CudaCopier(device) if device.type == "cuda" else HostCopier()
