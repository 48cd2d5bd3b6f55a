"""Why a plan is, or is not, the chosen one, in words; and what is refused whatever the budget is."""

from __future__ import annotations

from gossamer.formats.gguf import BLOCK_TYPES
from gossamer.memory import fidelity
from gossamer.memory.byte_sizes import show_bytes
from gossamer.memory.diffusers_names import Offload, gguf_note
from gossamer.memory.model_specs import ModelSpec
from gossamer.memory.request import Plan, PlanRequest, Refused
from gossamer.memory.work import modulation_weights


def explained(way: Plan, chosen: Plan, request: PlanRequest) -> tuple[str, ...]:
    """What speaks for the chosen plan, or against another."""
    if way is chosen or way == chosen:
        return _for_chosen(way, request)
    return _too_large(way, request) or _not_better(way, chosen)


def _for_chosen(way: Plan, request: PlanRequest) -> tuple[str, ...]:
    free = request.budget.gpu_free
    placed = {
        "resident": f"all {way.blocks} blocks stay on the GPU",
        "partial": f"{way.placement.resident_blocks} of {way.blocks} blocks stay on the GPU, the others are streamed",
        "streamed": f"all {way.blocks} blocks are streamed",
    }[way.kind]
    source = "pinned host memory" if way.placement.pinned else "the mapped file"
    lines = [
        f"{show_bytes(way.peak_gpu_bytes)} at most, while the GPU has {show_bytes(free)} for tensors",
        placed + ("" if way.kind == "resident" else f", from {source}"),
        f"of the plans that fit and are at most 5 % slower than the fastest, the most faithful: "
        f"{fidelity.show(way.fidelity)}",
    ]
    if way.placement.text != "resident":
        how = "come whole" if way.placement.text == "evicted" else "come layer by layer"
        lines.append(f"text encoders {how} when a prompt is read, and leave before the transformer comes")
    if way.placement.modulation == "resident":
        lines.append("the modulation's weights stay on the GPU, because the host has no room for them")
    if way.placement.vae == "tiled":
        lines.append("the picture is decoded in strips of rows, which takes a third of the memory of decoding it whole")
    return tuple(lines)


def _too_large(way: Plan, request: PlanRequest) -> tuple[str, ...]:
    """What it lacks; nothing where it fits."""
    lines = []
    budget = request.budget
    if way.peak_gpu_bytes > budget.gpu_free:
        over = show_bytes(way.peak_gpu_bytes - budget.gpu_free)
        lines.append(
            f"needs {show_bytes(way.peak_gpu_bytes)} on the GPU, {over} more than there is ({way.worst_phase})"
        )
    if budget.host_free is not None and way.host_bytes > budget.host_free:
        over = show_bytes(way.host_bytes - budget.host_free)
        lines.append(f"needs {show_bytes(way.host_bytes)} of host memory, {over} more than there is")
    if budget.disk is not None and way.disk_bytes > budget.disk:
        lines.append(f"needs {show_bytes(way.disk_bytes)} on disk, and {show_bytes(budget.disk)} are free")
    return tuple(lines)


def _not_better(way: Plan, chosen: Plan) -> tuple[str, ...]:
    change = way.total_seconds / chosen.total_seconds - 1
    speed = f"{abs(change):.0%} {'slower' if change > 0 else 'faster'}" if abs(change) >= 0.005 else "as fast"
    return (f"{speed} in all, {fidelity.show(way.fidelity)} against {fidelity.show(chosen.fidelity)}",)


def refused_always(chosen: Plan, request: PlanRequest) -> tuple[Refused, ...]:
    """What no plan does, with the reason in figures."""
    weights = request.subject.transformer(chosen.storage)
    refused = []
    if chosen.placement.modulation == "prepass":
        refused.append(
            Refused(
                "modulation weights on the GPU while denoising",
                f"{show_bytes(weights.modulation)} more, for the same vectors.",
                "The pre-pass: all steps' vectors are computed before the first step, and the weights leave.",
            )
        )
    if chosen.storage != request.subject.stored:
        refused.append(
            Refused(
                f"streaming {chosen.storage} weights from disk",
                f"The files hold {request.subject.stored}; what is packed on loading exists in memory only.",
                f"A file that holds {chosen.storage} already, given as MODEL.",
            )
        )
    return tuple(refused)


def notes(chosen: Plan, request: PlanRequest, offload: Offload) -> tuple[str, ...]:
    """What a reader has to know about the whole answer."""
    spec: ModelSpec = request.subject.spec
    said = [
        f"Predicted, not measured: {spec.name} on {request.card.name} ({request.card.source}).",
        f"Of the GPU {show_bytes(request.budget.gpu - request.budget.gpu_free)} are left to the driver, its libraries "
        "and gaps between tensors.",
        f"The modulation's {modulation_weights(spec.transformer) / 1e9:.2f} billion weights are read once a run.",
    ]
    if offload.name != "auto":
        said.append(f"--offload {offload.name}: {offload.explanation}.")
    fixed = request.subject.fixed
    if fixed is not None and chosen.storage != fixed.storage:
        said.append(f"The file holds {fixed.storage}; packing it as {chosen.storage} rounds its weights a second time.")
    gguf = gguf_note(offload, chosen.storage, chosen.storage in BLOCK_TYPES)
    return (*said, gguf[:1].upper() + gguf[1:] + ".") if gguf else tuple(said)
