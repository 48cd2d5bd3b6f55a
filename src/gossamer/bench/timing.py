"""How long one step of a model takes, how long the first one, and how much memory it needs beyond the weights.

On a GPU every step lies between two CUDA events, and steps follow one another without waiting for the host, as they do
in a denoising loop. Elsewhere the host's clock measures.

    median, minimum, maximum   ms of the timed steps
    first_call_seconds         host clock around the very first call, its compilation included
    peak_bytes                 most that was allocated during the timed steps, less `weights_end`; None without a GPU
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from gossamer.errors import InvalidOptionError


@dataclass(frozen=True)
class Repeats:
    """Untimed steps after the first call, `warmup` and as many as `seconds` have room for, then timed ones."""

    warmup: int = 3
    timed: int = 10
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Timing:
    """What was measured, and the result of the first call."""

    median_ms: float
    min_ms: float
    max_ms: float
    first_call_seconds: float
    peak_bytes: int | None
    result: torch.Tensor


def measure(step: Callable[[], torch.Tensor], device: torch.device, repeats: Repeats, weights_end: int) -> Timing:
    """Time a step. `weights_end` is what was allocated when weights and inputs were in place and nothing had run."""
    wait(device)
    started = time.perf_counter()
    result = step()
    wait(device)
    first_call_seconds = time.perf_counter() - started
    _warm_up(step, device, repeats)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = _on_gpu(step, repeats.timed) if device.type == "cuda" else _on_host(step, repeats.timed)
    return Timing(
        median_ms=statistics.median(times),
        min_ms=min(times),
        max_ms=max(times),
        first_call_seconds=first_call_seconds,
        peak_bytes=torch.cuda.max_memory_allocated(device) - weights_end if device.type == "cuda" else None,
        result=result,
    )


def require_gpu(device: torch.device, why: str, purpose: str = "measure on") -> None:
    """Refuse a GPU that is not there, with the reason why it needs to be one."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidOptionError(
            f"There is no GPU to {purpose}.",
            why,
            "Try the benchmark itself with --quick, or run it on a machine with an NVIDIA GPU.",
        )


def allocated_bytes(device: torch.device) -> int:
    """What the CUDA allocator has handed out; 0 on other devices, where nobody counts."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def release_memory(device: torch.device) -> None:
    """Give back what the last model left: cycles, compiled graphs, workspaces of cuBLAS, cached blocks."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def wait(device: torch.device) -> None:
    """Until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _warm_up(step: Callable[[], object], device: torch.device, repeats: Repeats) -> None:
    """A chip that was idle is cool, and faster for some seconds than one at its limit of power."""
    started = time.perf_counter()
    for _ in range(repeats.warmup):
        step()
    wait(device)
    while time.perf_counter() - started < repeats.seconds:
        step()
        wait(device)


def _on_gpu(step: Callable[[], torch.Tensor], timed: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(timed + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(events)]


def _on_host(step: Callable[[], torch.Tensor], timed: int) -> list[float]:
    times = []
    for _ in range(timed):
        started = time.perf_counter()
        step()
        times.append((time.perf_counter() - started) * 1000)
    return times
