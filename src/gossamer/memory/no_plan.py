"""The error for budgets that nothing fits: what is short, by how much, and the smallest that would do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gossamer.errors import InvalidOptionError
from gossamer.memory.byte_sizes import show_bytes
from gossamer.memory.request import Plan, PlanRequest, Refused


def no_plan(request: PlanRequest, found: Sequence[Plan], refused: Sequence[Refused]) -> InvalidOptionError:
    """Name the smallest GPU among the plans that the host can hold, and the smallest host among those that fit on the
    GPU; else the disk."""
    budget = request.budget
    what = f"{request.subject.spec.name} does not fit."
    if not found:
        return InvalidOptionError(
            what, f"--offload {request.offload} allows no placement of this model.", "Use --offload auto."
        )
    on_host = [way for way in found if budget.host_free is None or way.host_bytes <= budget.host_free]
    on_gpu = [way for way in found if way.peak_gpu_bytes <= budget.gpu_free]
    if any(way in on_host for way in on_gpu):
        return InvalidOptionError(
            what,
            f"Its files take {show_bytes(found[0].disk_bytes)} on disk, and {show_bytes(budget.disk or 0)} are free.",
            "Free some space, or choose a quantised file of the model.",
        )
    short = [_short_of_gpu(request, on_host)] if on_host else []
    short += [_short_of_host(request, on_gpu or found)] if on_gpu or not on_host else []
    return InvalidOptionError(
        what,
        " ".join(each.why for each in short),
        f"It works from {' on, or from '.join(each.budget for each in short)} on{_other_ways(request)}.",
    )


@dataclass(frozen=True)
class _Short:
    """What is short, and the budget that would do."""

    why: str
    budget: str


def _short_of_gpu(request: PlanRequest, ways: Sequence[Plan]) -> _Short:
    budget, least = request.budget, min(ways, key=lambda way: way.peak_gpu_bytes)
    needed = budget.gpu_for(least.peak_gpu_bytes)
    return _Short(
        f"There are {show_bytes(budget.gpu)} of GPU memory. The smallest plan takes {show_bytes(least.peak_gpu_bytes)} "
        f"for tensors ({_describe(least)}) and {show_bytes(needed - least.peak_gpu_bytes)} for the driver and gaps.",
        f"--vram {_ceiling(needed)}",
    )


def _short_of_host(request: PlanRequest, ways: Sequence[Plan]) -> _Short:
    budget, least = request.budget, min(ways, key=lambda way: way.host_bytes)
    return _Short(
        f"There are {show_bytes(budget.host or 0)} of host memory. The smallest plan keeps "
        f"{show_bytes(least.host_bytes)} there ({_describe(least)}); {show_bytes(budget.host_reserve)} are left to the "
        "system.",
        f"--ram {_ceiling(least.host_bytes + budget.host_reserve)}",
    )


def _describe(way: Plan) -> str:
    return f"{way.storage}, {way.placement.resident_blocks} of {way.blocks} blocks resident"


def _ceiling(size: int) -> str:
    """In GB, rounded up so that the planner agrees."""
    return f"{math.ceil(size / 1e7) / 100:.2f}GB"


def _other_ways(request: PlanRequest) -> str:
    ways = []
    if request.offload not in ("auto", "sequential"):
        ways.append("with --offload auto")
    if request.storage is not None:
        ways.append("with a smaller --storage")
    if request.job.pixels * request.job.batch > 512 * 512:
        ways.append("with a smaller --size or --batch")
    return f"; or {', '.join(ways)}" if ways else ""
