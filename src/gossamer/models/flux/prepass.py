"""Modulation pre-pass: the adaLN vectors of all steps of a run at once, before its first block.

Nothing in a block changes them: they follow from the timesteps, the guidance and the pooled prompt, all known when a
run begins. So 27 % of FLUX.1's weights are read once a run and not once a step. Results are those of the plain way up
to the order of a sum, because the same linears see one row a step either way.

Adapters on the modulation linears may have another strength in each step. Whoever changes it hands in the function that
does so; the steps are then grouped by the strengths that the linears have in them, and each group is one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from gossamer.layers import QuantLinear
from gossamer.models.flux.modulation import AdaLN, Conditions, ModelVectors, modulate, rows_of
from gossamer.models.flux.transformer import FluxTransformer

AtStep = Callable[[int], None]  # gives every adapter the strength that it has in a step, counted from 0
State = tuple[Any, ...]  # all that the modulation linears' weights follow from


def unchanging(step: int) -> None:
    """Strengths that are the same in every step."""


class Scheduler(Protocol):
    """What is read of a diffusers scheduler: all timesteps of the run, and how many steps are done."""

    timesteps: torch.Tensor
    step_index: int | None
    begin_index: int | None


@dataclass(frozen=True, eq=False)
class Group:
    """Steps in which the modulation linears are in one state, and their vectors, step by step."""

    state: State
    steps: tuple[int, ...]
    vectors: ModelVectors


@dataclass(frozen=True, eq=False)
class Run:
    """The vectors of all steps, and what they were made from besides the linears."""

    made_from: tuple[Any, ...]
    groups: tuple[Group, ...]
    batch: int

    def state(self, step: int) -> State:
        """The state of the linears that a step's vectors were made in."""
        return self._group(step).state

    def at(self, step: int) -> ModelVectors:
        """The vectors of one step, (batch, width) each."""
        group = self._group(step)
        place = group.steps.index(step)
        return rows_of(group.vectors, slice(place * self.batch, (place + 1) * self.batch))

    def _group(self, step: int) -> Group:
        return next(group for group in self.groups if step in group.steps)


class Prepass:
    """A modulator that computes a whole run at its first step. Each branch of the guidance has a run of its own."""

    def __init__(self, model: FluxTransformer, scheduler: Scheduler, at_step: AtStep = unchanging) -> None:
        self._scheduler = scheduler
        self._at_step = at_step
        self._norms = [part for part in model.modules() if isinstance(part, AdaLN)]
        self._runs: dict[str | None, Run] = {}

    def __call__(self, model: FluxTransformer, given: Conditions) -> ModelVectors:
        """The vectors of the step that the scheduler is at."""
        made_from, step = (self._scheduler.timesteps, given.guidance, given.pooled, given.dtype), self._step()
        run = self._runs.get(given.branch)
        if run is None or not _same(run.made_from, made_from) or run.state(step) != self._state():
            self._runs.pop(given.branch, None)
            groups = self._groups(model, given, step)
            run = self._runs[given.branch] = Run(made_from, groups, given.pooled.shape[0])
        return run.at(step)

    def _groups(self, model: FluxTransformer, given: Conditions, now: int) -> tuple[Group, ...]:
        """Every step of the run; strengths are those of the step `now` before and after."""
        terms = [term for linear in self._linears() for term in linear.adapters()]
        steps: dict[tuple[float, ...], list[int]] = {}
        try:
            for step in range(len(self._scheduler.timesteps)):
                self._at_step(step)
                steps.setdefault(tuple([term.scale for term in terms]), []).append(step)  # all that a step changes
            groups = []
            for own in steps.values():
                self._at_step(own[0])
                groups.append(Group(self._state(), tuple(own), modulate(model, self.conditions(given, own))))
        finally:
            self._at_step(now)
        return tuple(groups)

    def _state(self) -> State:
        """Each linear's weight, wherever its bytes are, how wide it is, and the strength of each of its terms."""
        linears = [(linear, linear.stored) for linear in self._linears()]
        return tuple(
            [
                (stored, stored.loads, linear.in_features, tuple([(term, term.scale) for term in linear.adapters()]))
                for linear, stored in linears
            ]
        )

    def _linears(self) -> list[QuantLinear]:
        linears: list[nn.Module] = [norm.linear for norm in self._norms]
        return [linear for linear in linears if isinstance(linear, QuantLinear)]

    def _step(self) -> int:
        """The index of the current timestep; schedulers count from their first step on."""
        done = self._scheduler.step_index
        return done if done is not None else self._scheduler.begin_index or 0

    def conditions(self, given: Conditions, steps: Sequence[int]) -> Conditions:
        """The conditions of some steps as one batch, timesteps rounded as diffusers' pipelines round them."""
        batch = given.pooled.shape[0]
        timesteps = self._scheduler.timesteps[list(steps)]
        rounded = timesteps.to(given.pooled.device).to(given.dtype) / 1000
        return Conditions(
            rounded.repeat_interleave(batch),
            None if given.guidance is None else given.guidance.expand(batch).repeat(len(steps)),
            given.pooled.repeat(len(steps), 1),
            given.dtype,
            given.branch,
        )


@contextmanager
def prepass(model: FluxTransformer, scheduler: Scheduler, at_step: AtStep = unchanging) -> Iterator[None]:
    """Inside, a diffusers pipeline over `model` and `scheduler` computes its modulation once a run.

    `at_step` gives adapters the strength of a step. The pipeline's loop has to call it too, before each step.
    """
    before, model.modulator = model.modulator, Prepass(model, scheduler, at_step)
    try:
        yield
    finally:
        model.modulator = before


def _same(made_from: tuple[Any, ...], asked: tuple[Any, ...]) -> bool:
    """Whether all parts are the same objects."""
    return all(part is other for part, other in zip(made_from, asked, strict=True))
