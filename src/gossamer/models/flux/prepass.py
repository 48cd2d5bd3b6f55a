"""Modulation pre-pass: the adaLN vectors of all steps of a run at once, before its first block.

Nothing in a block changes them: they follow from the timesteps, the guidance and the pooled prompt, all known when a
run begins. So 27 % of FLUX.1's weights are read once a run and not once a step. Results are those of the plain way up
to the order of a sum, because the same linears see one row a step either way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from gossamer.layers import QuantLinear
from gossamer.models.flux.modulation import AdaLN, Conditions, ModelVectors, modulate, rows_of
from gossamer.models.flux.transformer import FluxTransformer


class Scheduler(Protocol):
    """What is read of a diffusers scheduler: all timesteps of the run, and how many steps are done."""

    timesteps: torch.Tensor
    step_index: int | None
    begin_index: int | None


@dataclass(frozen=True, eq=False)
class Run:
    """The vectors of all steps, step by step, and what they were made from."""

    made_from: tuple[Any, ...]
    vectors: ModelVectors
    batch: int

    def at(self, step: int) -> ModelVectors:
        """Those of one step, (batch, width) each."""
        return rows_of(self.vectors, slice(step * self.batch, (step + 1) * self.batch))


class Prepass:
    """A modulator that computes a whole run at its first step. Each branch of the guidance has a run of its own."""

    def __init__(self, model: FluxTransformer, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._norms = [part for part in model.modules() if isinstance(part, AdaLN)]
        self._runs: dict[str | None, Run] = {}

    def __call__(self, model: FluxTransformer, given: Conditions) -> ModelVectors:
        """The vectors of the step that the scheduler is at."""
        made_from = (self._scheduler.timesteps, given.guidance, given.pooled, given.dtype, self._revisions())
        run = self._runs.get(given.branch)
        if run is None or not _same(run.made_from, made_from):
            self._runs.pop(given.branch, None)
            batch = given.pooled.shape[0]
            run = self._runs[given.branch] = Run(made_from, modulate(model, self.whole_run(given)), batch)
        return run.at(self._step())

    def _revisions(self) -> tuple[int, ...]:
        """What changes when an adapter on a modulation linear comes, goes or changes its scale."""
        linears: list[nn.Module] = [norm.linear for norm in self._norms]
        return tuple(linear.revision for linear in linears if isinstance(linear, QuantLinear))

    def _step(self) -> int:
        """The index of the current timestep; schedulers count from their first step on."""
        done = self._scheduler.step_index
        return done if done is not None else self._scheduler.begin_index or 0

    def whole_run(self, given: Conditions) -> Conditions:
        """The conditions of all steps as one batch, timesteps rounded as diffusers' pipelines round them."""
        timesteps, batch = self._scheduler.timesteps, given.pooled.shape[0]
        steps = len(timesteps)
        rounded = timesteps.to(given.pooled.device).to(given.dtype) / 1000
        return Conditions(
            rounded.repeat_interleave(batch),
            None if given.guidance is None else given.guidance.expand(batch).repeat(steps),
            given.pooled.repeat(steps, 1),
            given.dtype,
            given.branch,
        )


@contextmanager
def prepass(model: FluxTransformer, scheduler: Scheduler) -> Iterator[None]:
    """Inside, a diffusers pipeline over `model` and `scheduler` computes its modulation once a run."""
    before, model.modulator = model.modulator, Prepass(model, scheduler)
    try:
        yield
    finally:
        model.modulator = before


def _same(made_from: tuple[Any, ...], asked: tuple[Any, ...]) -> bool:
    """Whether all parts are the same objects, and the revisions equal."""
    *parts, revisions = made_from
    *wanted, now = asked
    return all(part is other for part, other in zip(parts, wanted, strict=True)) and revisions == now
