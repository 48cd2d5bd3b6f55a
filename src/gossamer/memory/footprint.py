"""Bytes that one way of running a model takes, phase by phase on the GPU, and on the host.

    text      the text encoders read the prompt
    denoise   the pre-pass of the modulation, or a step, whichever takes more
    decode    the VAE makes the picture

Text encoders that are resident make everything resident; else text encoders and transformer take turns. The VAE's
weights are few and stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gossamer.memory.activations import (
    CUBLAS_BYTES,
    captured_bytes,
    largest_operand_bytes,
    modulation_operand_bytes,
    step_bytes,
    t5_operand_bytes,
    t5_step_bytes,
    vae_peak_bytes,
    vectors_bytes,
)
from gossamer.memory.budget import HOST_BASE
from gossamer.memory.model_cost import EncoderBytes, TransformerBytes, clip_bytes, t5_bytes, vae_bytes
from gossamer.memory.offload_carousel import Arrangement
from gossamer.memory.offload_feed import RING_BUFFER_BYTES, RING_BUFFERS
from gossamer.memory.picture import Job
from gossamer.memory.placement import LAYER_SLOTS, Placement, spread
from gossamer.memory.subject import Subject

Phases = Mapping[str, Mapping[str, int]]
PHASES = ("text", "denoise", "decode")
STAGING_BYTES = RING_BUFFERS * RING_BUFFER_BYTES  # pinned, for what is read from a file


@dataclass(frozen=True)
class Setting:
    """A model in given formats, without a placement yet. `decodes`: some weights pass through the operand buffer."""

    subject: Subject
    job: Job
    weights: TransformerBytes
    t5: EncoderBytes
    clip: EncoderBytes
    compute: str
    activations: str
    adapter_bytes: int
    decodes: bool
    text_storage: str

    @property
    def text_total(self) -> int:
        """Weights of both text encoders."""
        return self.t5.total + self.clip.total


def setting(
    subject: Subject,
    job: Job,
    storages: tuple[str, str],
    types: tuple[str, str],
    adapter_bytes: int,
) -> Setting:
    """`storages` of the transformer and the text encoders; `types` of products and activations."""
    (storage, text), (compute, activations) = storages, types
    spec, stored = subject.spec, subject.spec.stored
    weights = subject.transformer(storage)
    decodes = bool(adapter_bytes) or any(name != compute for name in weights.storages)
    return Setting(
        subject=subject,
        job=job,
        weights=weights,
        t5=t5_bytes(spec.t5, text, stored),
        clip=clip_bytes(spec.clip, text, stored),
        compute=compute,
        activations=activations,
        adapter_bytes=adapter_bytes,
        decodes=decodes,
        text_storage=text,
    )


def gpu_bytes(of: Setting, placement: Placement) -> Phases:
    """Bytes by phase and by what takes them."""
    always = {"VAE": vae_bytes(of.subject.spec.vae), **_operands(of), "libraries": CUBLAS_BYTES}
    reading, step, picture = _text_activations(of), _step(of, placement), _picture(of, placement)
    transformer = _transformer(of, placement)
    kept, pool = _captured(of, placement)
    step = {**step, **kept}
    if placement.text == "resident":
        everything = {**transformer, "text encoders": of.text_total, **always}
        captured = {name: size + pool for name, size in kept.items()}
        phases = ({**captured, **reading}, step, {**captured, **picture})
        return {phase: {**everything, **own} for phase, own in zip(PHASES, phases, strict=True)}
    if placement.text == "evicted":
        encoders = max(of.t5.total, of.clip.total)
    else:
        encoders = max(LAYER_SLOTS * each.layer + each.rest for each in (of.t5, of.clip))
    return {
        "text": {"text encoders": encoders, **reading, **always},
        "denoise": {**transformer, **step, **always},
        "decode": {**always, **picture},
    }


def _captured(of: Setting, placement: Placement) -> tuple[dict[str, int], int]:
    """Steps are captured as CUDA graphs unless the host takes part in copies: what they keep beside a step's own
    tensors, and the memory of those, which is the graphs' until the transformer leaves.
    """
    if placement.resident_blocks < len(of.weights.blocks) and not placement.pinned:
        return {}, 0
    spec = of.subject.spec.transformer
    kept = {"captured steps": captured_bytes(spec, of.job, of.activations)}
    return kept, step_bytes(spec, of.job, of.activations, of.compute)


def _transformer(of: Setting, placement: Placement) -> dict[str, int]:
    blocks = of.weights.blocks
    arrangement = Arrangement.of(placement, len(blocks))
    sizes = dict(enumerate(blocks))
    slots = arrangement.buffer_bytes(sizes)
    parts = {"resident blocks": arrangement.device_bytes(sizes) - slots, "slots": slots, "embedders": of.weights.rest}
    if placement.modulation == "resident":
        parts["modulation"] = of.weights.modulation
    if of.adapter_bytes:
        parts["adapters"] = of.adapter_bytes
    return parts


def _step(of: Setting, placement: Placement) -> dict[str, int]:
    """Modulation linears pass through slots of their own in the pre-pass; they are gone before the first block."""
    spec, job = of.subject.spec.transformer, of.job
    vectors = vectors_bytes(spec, job, of.activations, job.steps)
    passing = min(LAYER_SLOTS * of.weights.largest_modulation, of.weights.modulation)
    prepass = {"modulation": passing, "activations": vectors} if placement.modulation == "prepass" else {}
    step = {"activations": step_bytes(spec, job, of.activations, of.compute) + vectors}
    return prepass if sum(prepass.values()) > sum(step.values()) else step


def _operands(of: Setting) -> dict[str, int]:
    """One buffer for all decoded weights, which stays; those of modulation and T5 have the activations' type."""
    spec = of.subject.spec.transformer
    size = largest_operand_bytes(spec, of.compute) if of.decodes else 0
    if of.weights.modulation_storage != of.activations:
        size = max(size, modulation_operand_bytes(spec, of.activations))
    if of.text_storage != of.activations:
        size = max(size, t5_operand_bytes(of.subject.spec.t5, of.activations))
    return {"decoded weights": size} if size else {}


def _text_activations(of: Setting) -> dict[str, int]:
    return {"activations": t5_step_bytes(of.subject.spec.t5, of.job, of.activations)}


def _picture(of: Setting, placement: Placement) -> dict[str, int]:
    return {"activations": vae_peak_bytes(of.subject.spec.vae, of.job, placement.vae, of.activations)}


def host_bytes(of: Setting, placement: Placement) -> int:
    """Memory of the process: everything that is not on the GPU at all times, as far as it is pinned or in no file.

    Pages of a mapped file that the system may drop at any time do not count. While a block, a layer or a linear of the
    modulation goes into pinned memory, its bytes are there twice.
    """
    turns = placement.text != "resident"
    blocks = of.weights.blocks
    staying = frozenset[int]() if turns else spread(len(blocks), placement.resident_blocks)
    leaving = [size for index, size in enumerate(blocks) if index not in staying]
    modulation = of.weights.modulation if turns or placement.modulation == "prepass" else 0
    transformer = sum(leaving) + modulation
    text = of.t5.layers + of.clip.layers if turns else 0
    passing = max((*leaving, of.weights.largest_modulation if modulation else 0, of.t5.layer if turns else 0))
    total = HOST_BASE + (of.weights.rest + of.t5.rest + of.clip.rest if turns else 0)
    total += transformer + passing if placement.pinned or of.weights.storage != of.subject.stored else STAGING_BYTES
    return total + (text if placement.pinned or of.text_storage != of.subject.spec.stored else 0)
