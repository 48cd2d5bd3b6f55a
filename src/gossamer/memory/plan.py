"""The planner: from a model, a card and budgets to a ranked list of ways to run it. A pure function; nothing is loaded.

    candidates   every storage format x text storage x text placement x VAE placement, with all blocks resident, with
                 none, and with as many, beside as large a buffer for the others, as make a step fastest
    chosen       of those that fit, the most faithful one that is at most 5 % slower than the fastest

Predictions are good to some ten per cent at best, so a difference of 5 % is no reason for coarser weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product

from gossamer.errors import InvalidOptionError
from gossamer.formats import find_format, packing_names
from gossamer.kernels.choice import Choice, choose
from gossamer.memory import fidelity
from gossamer.memory.diffusers_names import Offload, find_offload
from gossamer.memory.efficiency import Factors, factors, read_measured
from gossamer.memory.footprint import Setting, gpu_bytes, host_bytes, setting
from gossamer.memory.model_cost import t5_linears
from gossamer.memory.no_plan import no_plan
from gossamer.memory.placement import Placement, TextPlacement, VaePlacement
from gossamer.memory.plan_placements import Way, host_free, placements, step_of, too_much_host
from gossamer.memory.reasons import explained, notes, refused_always
from gossamer.memory.request import Plan, Planning, PlanRequest, Refused
from gossamer.memory.roofline import (
    Machine,
    prepass_seconds,
    step_seconds,
    text_seconds,
    vae_seconds,
)

AS_FAST = 1.05  # times of the fastest that count as equal
SMALLER = 0.9  # of what ran out of memory is what the next smaller plan may take
TEXT_STORAGES = ("Q8_0", "nf4")  # beside the type of the files
TEXT_PLACEMENTS: tuple[TextPlacement, ...] = ("resident", "evicted", "streamed")
VAE_PLACEMENTS: tuple[VaePlacement, ...] = ("whole", "tiled")


def plan(request: PlanRequest) -> Planning:
    """Every way to run the model, the best first. Raises where nothing fits, naming the smallest budget that would."""
    offload = find_offload(request.offload)
    found, refused = _found(request, offload)
    fitting = [way for way in found if way.fits]
    if not fitting:
        raise no_plan(request, found, refused)
    chosen = best(fitting)
    shown = [chosen, *(way for way in _shown(found) if way != chosen)]
    plans = sorted(shown[1:], key=lambda way: (not way.fits, way.total_seconds if way.fits else way.peak_gpu_bytes))
    plans = [replace(way, reasons=explained(way, chosen, request)) for way in (chosen, *plans)]
    return Planning(
        plans[0], tuple(plans), (*refused, *refused_always(chosen, request)), notes(chosen, request, offload)
    )


def smaller(request: PlanRequest, than: Plan, gpu_free: int) -> Plan | None:
    """The best plan of the same formats for so many bytes that takes clearly less than one that did not fit after all.

    Formats stay, because pictures depend on them. None where no such plan is left.
    """
    budget = request.budget
    gpu = budget.gpu_for(min(gpu_free, int(SMALLER * than.peak_gpu_bytes)))
    same = replace(_of_formats(request, than), budget=replace(budget, gpu=gpu))
    fitting = [way for way in _found(same, find_offload(same.offload))[0] if way.fits]
    return best(fitting) if fitting else None


def smallest(request: PlanRequest, than: Plan) -> Plan:
    """The plan of the same formats that takes least of the GPU; it may be the given one."""
    same = _of_formats(request, than)
    found = [way for way in _found(same, find_offload(same.offload))[0] if way.host_bytes <= host_free(same)]
    return min((*found, than), key=lambda way: way.peak_gpu_bytes)


def _of_formats(request: PlanRequest, of: Plan) -> PlanRequest:
    return replace(request, storage=of.storage, text_storage=of.text_storage)


def _found(request: PlanRequest, offload: Offload) -> tuple[list[Plan], list[Refused]]:
    """Every way to run the model, fitting or not, and what is refused before anything is counted."""
    runnable, refused = _storages(request)
    reached = factors(read_measured())
    return [way for choice in runnable for way in _ways(request, choice, offload, reached)], refused


def best(fitting: Sequence[Plan]) -> Plan:
    """The most faithful of those about as fast as the fastest; among equals the better text encoders decide.

    Of ways that take equally long, to a thousandth, the one whose steps need the bus least.
    """
    fastest = min(way.total_seconds for way in fitting)
    near = [way for way in fitting if way.total_seconds <= AS_FAST * fastest]

    def worth(way: Plan) -> tuple[float, float, float, int, int]:
        text, seconds = fidelity.fidelity(way.text_storage) or 0.0, round(way.total_seconds / fastest, 3)
        return way.fidelity or 0.0, text, -seconds, way.placement.resident_blocks, -way.host_bytes

    return max(near, key=worth)


def _shown(found: Iterable[Plan]) -> Iterator[Plan]:
    """The best of each storage format and kind of placement, or the smallest where none fits."""
    groups: dict[tuple[str, str], list[Plan]] = {}
    for way in found:
        groups.setdefault((way.storage, way.kind), []).append(way)
    for group in groups.values():
        fitting = [way for way in group if way.fits]
        yield best(fitting) if fitting else min(group, key=lambda way: (way.peak_gpu_bytes, way.host_bytes))


# what may run ---------------------------------------------------------------------------------------------------------


def _storages(request: PlanRequest) -> tuple[list[Choice], list[Refused]]:
    """The formats that the card can run and the user accepts, each with its choice of backends."""
    floor = fidelity.least(request.least_fidelity)
    runnable, refused = [], []
    for storage in _wanted(request):
        reason = _unfaithful(request, storage, floor)
        if reason is not None:
            refused.append(reason)
            continue
        try:
            head_dim = request.subject.spec.transformer.attention_head_dim
            choice = choose(
                request.card.capability, storage, request.compute, head_dim=head_dim, attention=request.attention
            )
        except InvalidOptionError as error:
            if request.storage is not None:
                raise
            refused.append(Refused(f"{storage} weights", error.why, error.next_step))
            continue
        runnable.append(choice)
    if not runnable:
        raise InvalidOptionError(
            f"No storage format is left to plan {request.subject.spec.name} with.",
            " ".join(f"{each.what}: {each.why}" for each in refused[:4]),
            refused[0].instead,
        )
    return runnable, refused


def _wanted(request: PlanRequest) -> list[str]:
    """The format that was asked for, or that of a quantised file, or all whose fidelity is known."""
    wanted = None if request.storage in (None, "stored") else find_format(str(request.storage)).name
    if request.storage == "stored" or (request.subject.fixed is not None and wanted in (None, request.subject.stored)):
        return [request.subject.stored]
    if wanted is None:
        return [name for name in fidelity.PSNR if name != "fp32"]
    if wanted not in packing_names():
        raise InvalidOptionError(
            f"{wanted} cannot be planned for this model.",
            "Gossamer reads that format from files that hold it, and packs nothing into it.",
            f"Give such a file as MODEL, or one of {', '.join(packing_names())} as --storage.",
        )
    return [wanted]


def _unfaithful(request: PlanRequest, storage: str, floor: float) -> Refused | None:
    """Why the format is below what the user accepts; what was named on purpose is accepted."""
    if request.storage is not None or request.subject.fixed is not None:
        return None
    known = fidelity.fidelity(storage)
    if known is not None and known >= floor:
        return None
    return Refused(
        f"{storage} weights",
        f"{fidelity.show(known)} against the embedded model's float32 pictures; {request.least_fidelity!r} asks for "
        f"{fidelity.show(floor)}.",
        f"Accept it with --least-fidelity {storage}, or ask for it with --storage {storage}.",
    )


# ways -----------------------------------------------------------------------------------------------------------------


def _ways(request: PlanRequest, choice: Choice, offload: Offload, reached: Factors) -> Iterator[Plan]:
    """Every plan with one storage format."""
    machine = Machine(request.card, reached, choice.compute, choice.activations, choice.attention)
    weights = request.subject.transformer(choice.storage)
    spec = request.subject.spec.transformer
    computing = step_seconds(machine, spec, request.job, weights, request.rank, modulation_resident=False)
    for text_storage in _text_storages(request):
        of = setting(
            request.subject,
            request.job,
            (choice.storage, text_storage),
            (choice.compute, choice.activations),
            sum(adapter.gpu_bytes for adapter in request.adapters),
        )
        way = Way(request, choice, machine, of, computing)
        for text, vae, pinned in product(TEXT_PLACEMENTS, VAE_PLACEMENTS, _pinned(request, choice)):
            for placement in placements(way, Placement(0, pinned=pinned, text=text, vae=vae), offload):
                yield _plan(way, placement)


def _text_storages(request: PlanRequest) -> tuple[str, ...]:
    stored = request.subject.spec.stored
    if request.text_storage not in (None, "stored"):
        return (find_format(str(request.text_storage)).name,)
    if request.text_storage == "stored":
        return (stored,)
    floor = fidelity.least(request.least_fidelity)
    return (stored, *(name for name in TEXT_STORAGES if (fidelity.fidelity(name) or 0.0) >= floor))


def _pinned(request: PlanRequest, choice: Choice) -> tuple[bool, ...]:
    """Weights can stay in their file only in the file's own format."""
    return (True, False) if choice.storage == request.subject.stored else (True,)


def _plan(way: Way, placement: Placement) -> Plan:
    request, of = way.request, way.setting
    on_gpu, on_host = gpu_bytes(of, placement), host_bytes(of, placement)
    step, total = _seconds(way, placement)
    peak = max(sum(parts.values()) for parts in on_gpu.values())
    disk = 0 if request.subject.is_here else request.subject.disk_bytes
    fits = peak <= request.budget.gpu_free and not too_much_host(way, placement)
    fits = fits and (request.budget.disk is None or disk <= request.budget.disk)
    products = way.choice.compute if way.choice.compute in ("fp8", "int8") else way.choice.storage
    return Plan(
        storage=way.choice.storage,
        text_storage=of.text_storage,
        vae_storage=request.subject.spec.stored,
        compute=way.choice.compute,
        activations=way.choice.activations,
        attention=way.choice.attention,
        cache="off",
        placement=placement,
        blocks=way.blocks,
        gpu_bytes=on_gpu,
        host_bytes=on_host,
        disk_bytes=disk,
        step_seconds=step,
        total_seconds=total,
        fidelity=fidelity.combined(way.choice.storage, of.text_storage, products),
        fits=fits,
    )


def _seconds(way: Way, placement: Placement) -> tuple[float, float]:
    """A step, and everything from the prompt to the first pictures, all weights on the host to begin with."""
    request, of, machine = way.request, way.setting, way.machine
    spec, job = request.subject.spec, request.job
    blocks = of.weights.blocks
    step = step_of(way, placement)
    moved = of.text_total + sum(blocks) + of.weights.rest  # once, wherever they stay afterwards
    total = text_seconds(machine, spec.t5, job, _t5_weights(of), moved)
    total += prepass_seconds(machine, spec.transformer, of.weights, placement.modulation == "resident")
    return step, total + job.steps * step + vae_seconds(machine, spec.vae, job, placement.vae)


def _t5_weights(of: Setting) -> int:
    spec = of.subject.spec.t5
    return spec.layers * sum(math.prod(shape) for shape in t5_linears(spec))
