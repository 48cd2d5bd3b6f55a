"""The plan of a load: which formats and which placement fit the memory that was promised, or that is there.

    told how much (`vram`)    the planner chooses formats and placement for that budget, and the budget is a promise
    told nothing              everything stays on the GPU as it is stored, where that fits into what is free; else the
                              planner chooses for what is free
    on a CPU                  there is nothing to place, and no plan

What was named (a storage format, an offload) is not chosen again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from gossamer.adapters.adapter import Adapter
from gossamer.adapters.terms import rank_of
from gossamer.errors import InvalidOptionError, WrongModelError
from gossamer.kernels.detect import detect
from gossamer.memory import fidelity
from gossamer.memory.adapter_cost import AdapterCost
from gossamer.memory.budget import GPU_RESERVE, HOST_RESERVE, Budget
from gossamer.memory.byte_sizes import show_bytes
from gossamer.memory.card import Card
from gossamer.memory.cards import card_of
from gossamer.memory.gpu_memory import unused_bytes
from gossamer.memory.model_specs import ClipSpec, ModelSpec, T5Spec, VaeSpec
from gossamer.memory.offload_host import available_host_bytes
from gossamer.memory.picture import Job
from gossamer.memory.plan import plan, smaller, smallest
from gossamer.memory.request import Plan, Planning, PlanRequest
from gossamer.memory.subject import Subject, local_subject
from gossamer.pipeline.folder import read_config
from gossamer.pipeline.model import TRANSFORMER, Model
from gossamer.pipeline.options import AUTO, STORED, LoadOptions, PaintOptions

GUIDED_STEPS, UNGUIDED_STEPS = 20, 4  # what the makers of dev and of schnell recommend


@dataclass(frozen=True)
class NoPlan:
    """Nothing is placed. `why` is told where there is something to tell: a GPU, and no plan for it."""

    why: str | None = None

    def said(self) -> tuple[str, ...]:
        """What is said before loading."""
        return () if self.why is None else (self.why,)

    def as_json(self) -> dict[str, Any]:
        """Nothing, as JSON values."""
        return {}


@dataclass(frozen=True)
class Fit:
    """What was asked of the planner, its answer, and the plan in force, which is a smaller one after memory ran out.

    `limit` is what this process may take of the GPU, where that was promised.
    """

    request: PlanRequest
    planning: Planning
    chosen: Plan
    limit: int | None = None

    @property
    def spare_bytes(self) -> int:
        """Of the GPU, beside the plan."""
        return self.request.budget.gpu_free - self.chosen.peak_gpu_bytes

    @property
    def leaves_formats(self) -> tuple[bool, bool]:
        """Whether transformer and text encoders stay as their files store them."""
        subject = self.request.subject
        return self.chosen.storage == subject.stored, self.chosen.text_storage == subject.spec.stored

    def smaller(self, gpu_free: int | None) -> Fit:
        """The next smaller plan for the same pictures, when so much of the GPU could be had; else an error."""
        budget = self.request.budget
        room = budget.gpu_free if gpu_free is None else min(budget.gpu_free, gpu_free)
        found = smaller(self.request, self.chosen, room)
        if found is None:
            raise self._nothing_smaller(room)
        return replace(self, chosen=found)

    def _nothing_smaller(self, room: int) -> InvalidOptionError:
        least = smallest(self.request, self.chosen)
        needed = show_bytes(self.request.budget.gpu_for(least.peak_gpu_bytes))
        return InvalidOptionError(
            "The GPU has too little memory left.",
            f"It ran out with {show_bytes(room)} for tensors in reach, and no plan with these formats takes clearly "
            f"less. The smallest ({least.placement.resident_blocks} of {least.blocks} blocks resident) takes "
            f"{show_bytes(least.peak_gpu_bytes)}.",
            f"It works with {needed} of the GPU, the driver's part included: close what else uses it, give more with "
            "--vram, or choose a smaller --storage or --size.",
        )

    def as_json(self) -> dict[str, Any]:
        """Everything that was planned, as JSON values."""
        return {"plan": self.planning.as_json()}

    def said(self) -> tuple[str, str]:
        """The plan in two lines."""
        way, budget = self.chosen, self.request.budget
        return (
            f"Plan: {way.summary}.",
            f"Predicted: {show_bytes(way.peak_gpu_bytes)} of the {show_bytes(budget.gpu_free)} that the GPU has for "
            f"tensors, {show_bytes(way.host_bytes)} of host memory.",
        )


def fit(
    options: LoadOptions,
    model: Model,
    device: torch.device,
    paint: PaintOptions | None = None,
    adapters: Iterable[Adapter] = (),
) -> Fit | NoPlan:
    """The plan for painting like `paint`, by default at the model's own size.

    Raises where nothing fits, naming the smallest budget that would. A model or a card that cannot be planned for runs
    without a plan, if nothing was asked of one.
    """
    fidelity.least(options.least_fidelity)
    if device.type != "cuda":
        _require_nothing_named(options, device)
        return NoPlan()
    try:
        subject, card = subject_of(model, options.model), card_here(device)
    except (InvalidOptionError, WrongModelError) as error:
        if options.vram is not None or options.ram is not None or options.offload != "auto":
            raise
        return NoPlan(f"No plan: {error.what} {error.why} Everything stays on the GPU.")
    request = PlanRequest(
        subject=subject,
        card=card,
        budget=_budget(options, unused_bytes(device) or 0),
        job=_job(model, subject, paint),
        adapters=tuple(cost_of(adapter) for adapter in adapters),
        storage=None if options.storage == AUTO else options.storage,
        text_storage=None if options.text_storage == AUTO else options.text_storage,
        compute=options.compute,
        least_fidelity=options.least_fidelity,
        offload=options.offload,
        attention=options.attention,
    )
    return fit_request(request, is_promise=options.vram is not None)


def fit_request(request: PlanRequest, is_promise: bool) -> Fit:
    """The plan that is carried out for a request. A budget that nobody named is no reason to change formats."""
    found = None if is_promise else _as_it_is(request)
    planning = found or plan(request)
    return Fit(request, planning, planning.chosen, request.budget.gpu_limit if is_promise else None)


def _as_it_is(request: PlanRequest) -> Planning | None:
    """Everything resident in the formats that were named or stored; None where that does not fit or was not wanted."""
    if request.offload != "auto":
        return None
    stored = replace(
        request, storage=request.storage or STORED, text_storage=request.text_storage or STORED, offload="none"
    )
    try:
        return plan(stored)
    except InvalidOptionError:
        return None  # whatever else is wrong with the request is wrong with the plan that is made then


# what a plan is made from ---------------------------------------------------------------------------------------------


def subject_of(model: Model, name: str) -> Subject:
    """A model that is on this machine."""
    spec = ModelSpec(
        name=name,
        transformer=model.spec,
        t5=T5Spec.from_config(read_config(model.homes["text_encoder_2"])),
        clip=ClipSpec.from_config(read_config(model.homes["text_encoder"])),
        vae=VaeSpec.from_config(read_config(model.homes["vae"])),
        text_tokens=model.profile.max_sequence_length,
        steps=GUIDED_STEPS if model.spec.guidance_embeds else UNGUIDED_STEPS,
        side=model.profile.picture_side,
    )
    return local_subject(spec, model.weights[TRANSFORMER], model.weights.values())


def card_here(device: torch.device) -> Card:
    """The card of a CUDA device."""
    return card_of(detect(device), torch.cuda.get_device_properties(device).multi_processor_count)


def cost_of(adapter: Adapter) -> AdapterCost:
    """Of an adapter that was read."""
    terms = [*adapter.terms.values(), *(term for own in adapter.text.values() for term in own.values())]
    ranks = [rank for rank in map(rank_of, terms) if rank is not None]
    return AdapterCost(adapter.spelling, sum(term.nbytes for term in terms), max(ranks, default=0))


def _budget(options: LoadOptions, free: int) -> Budget:
    """What is promised, as far as it is there; the driver's part of that may be taken already."""
    return Budget(
        gpu=free if options.vram is None else min(options.vram, free + GPU_RESERVE),
        host=available_host_bytes() if options.ram is None else options.ram,
        host_reserve=0 if options.ram is None else HOST_RESERVE,
    )


def _job(model: Model, subject: Subject, paint: PaintOptions | None) -> Job:
    side, tokens = model.profile.picture_side, model.profile.max_sequence_length
    if paint is None:
        return Job(side, side, 1, subject.spec.steps, tokens)
    width, height = (side, side) if paint.size is None else (paint.size.width, paint.size.height)
    return Job(width, height, 1, paint.steps, paint.max_sequence_length or tokens)


def _require_nothing_named(options: LoadOptions, device: torch.device) -> None:
    named = [
        flag
        for flag, is_named in (
            ("--vram", options.vram is not None),
            ("--ram", options.ram is not None),
            ("--offload", options.offload != "auto"),
        )
        if is_named
    ]
    if named:
        raise InvalidOptionError(
            f"{' and '.join(named)} cannot be used on the device '{device}'.",
            "A plan divides a model between a GPU and its host; here everything is in the same memory.",
            f"Leave {' and '.join(named)} out, or run on an NVIDIA GPU with --device cuda.",
        )
