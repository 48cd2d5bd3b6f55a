"""What every step of the recipe shares: time boxes, several GPUs, averaged weights, optimisers, a log."""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Team:
    """The processes of one training run, one GPU each."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0


def join_team() -> Team:
    """Reads torchrun's environment; a plain `python` run is a team of one."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if not torch.cuda.is_available():
        return Team(0, 1, torch.device("cpu"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True
    # cuDNN's attention fails in the backward pass at head width 32 on an H200 with torch 2.11: NaN gradients at step 0
    torch.backends.cuda.enable_cudnn_sdp(False)
    if size > 1:
        dist.init_process_group("nccl", device_id=device)
    return Team(int(os.environ.get("RANK", "0")), size, device)


def share_gradients(parameters: list[nn.Parameter], team: Team) -> Tensor:
    """Averages gradients over the team in one flat buffer and returns their global norm."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if team.size > 1:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, op=dist.ReduceOp.AVG)
        torch._foreach_copy_(
            gradients,
            [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in gradients]), gradients, strict=True)],
        )
    return torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)


def same_everywhere(value: float, team: Team) -> float:
    """Rank 0's value, on every rank."""
    if team.size == 1:
        return value
    box = torch.tensor([value], dtype=torch.float64, device=team.device)
    dist.broadcast(box, 0)
    return float(box.item())


class Average:
    """An exponential moving average of a module's parameters, with a warm-up of its horizon."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.live = list(module.parameters())
        self.mean = [parameter.detach().clone() for parameter in self.live]

    def update(self) -> None:
        """Takes one step towards the live parameters."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.mean, [parameter.detach() for parameter in self.live], 1 - decay)

    def store(self) -> None:
        """Puts the average into the module for good."""
        with torch.no_grad():
            torch._foreach_copy_([parameter.detach() for parameter in self.live], self.mean)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices (B, m, n) by a quintic Newton-Schulz iteration (Jordan et al., 2024, "Muon")."""
    x = matrices.bfloat16()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon:
    """Muon for hidden matrices and convolutions, equal shapes batched; updates of AdamW's size (Liu et al., 2025)."""

    def __init__(self, matrices: Iterable[nn.Parameter], momentum: float = 0.95, decay: float = 0.01) -> None:
        groups = defaultdict(list)
        for matrix in matrices:
            groups[matrix.shape].append(matrix)
        self.groups = [(group, [torch.zeros_like(matrix) for matrix in group]) for group in groups.values()]
        self.momentum = momentum
        self.decay = decay

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update with learning rate `rate`."""
        for group, buffers in self.groups:
            gradients = [matrix.grad for matrix in group]
            torch._foreach_lerp_(buffers, gradients, 1 - self.momentum)
            nesterov = torch._foreach_lerp(gradients, buffers, self.momentum)
            flat = torch.stack(nesterov).flatten(2)  # a convolution is a matrix of (out, in * kernel)
            update = orthogonalize(flat) * (0.2 * max(flat.shape[1:]) ** 0.5)
            torch._foreach_mul_(group, 1 - rate * self.decay)
            torch._foreach_add_(group, [part.view_as(group[0]) for part in update], alpha=-rate)


class Optimizer:
    """Muon for the parameters that `hidden` accepts and AdamW for the rest, or AdamW for all."""

    def __init__(self, module: nn.Module, kind: str, hidden: Callable[[str, nn.Parameter], bool]) -> None:
        named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
        matrices = [p for name, p in named if kind == "muon" and hidden(name, p)]
        chosen = {id(p) for p in matrices}
        rest = [p for _, p in named if id(p) not in chosen]
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0, fused=rest[0].is_cuda)

    def step(self, rate: float) -> None:
        """One update of both."""
        self.muon.step(rate)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()


@dataclass(frozen=True)
class TimeBox:
    """A phase of training that lasts `seconds` after its first 2 * `settle` steps, of which the second half is timed.

    The learning rate rises over `warmup` steps to `peak`, stays there for the share `hold`, then falls to zero.
    """

    seconds: float
    peak: float
    warmup: int = 200
    hold: float = 0.45
    settle: int = 40

    def rate(self, step: int, done: float) -> float:
        """The learning rate of a step that comes after the share `done` of all steps."""
        rise = min(1.0, (step + 1) / self.warmup)
        fall = 1.0 if done < self.hold else max(0.0, (1.0 - done) / (1.0 - self.hold))
        return self.peak * rise * fall


@dataclass(frozen=True)
class Step:
    """One step of a phase: its number, learning rate and the share done before it; once known, seconds and steps."""

    number: int
    rate: float
    done: float
    left: float | None
    total: int | None


def time_boxed(box: TimeBox, team: Team) -> Iterator[Step]:
    """The steps of a phase; how many there are is fixed from the measured speed, the same on every rank."""
    total, began, each = math.inf, 0.0, None
    for number in itertools.count():
        if number == box.settle:
            began = now(team)
        if number == 2 * box.settle:
            each = max((now(team) - began) / box.settle, 1e-6)
            total = number + int(same_everywhere(box.seconds / each, team))
        if number >= total:
            return
        left, steps = (None, None) if each is None else (round((total - number) * each, 1), int(total))
        yield Step(number, box.rate(number, number / total), number / total, left, steps)


def now(team: Team) -> float:
    """Seconds on a clock that sees the device's finished work, not its queue."""
    if team.device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic()


def require_finite(loss: Tensor, step: int) -> float:
    """The loss as a number; a run that has gone wrong ends here instead of using up its time."""
    value = float(loss.item())
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value} at step {step}")
    return value


class Log:
    """A line of JSON an entry, with seconds since the start; only the leading process writes."""

    def __init__(self, path: Path, team: Team) -> None:
        self.team = team
        self.start = time.monotonic()
        self.file = path.open("a", buffering=1) if team.leads else None

    def write(self, **entry: object) -> None:
        """Adds an entry."""
        if self.file is None:
            return
        line = json.dumps({"seconds": round(time.monotonic() - self.start, 1), **entry})
        self.file.write(line + "\n")
        print(line, flush=True)


def batches(count: int, size: int, generator: torch.Generator, device: torch.device) -> Iterator[Tensor]:
    """Endless shuffled index batches over `count` examples."""
    while True:
        order = torch.randperm(count, generator=generator, device=device)
        yield from order[: count - count % size].view(-1, size)
