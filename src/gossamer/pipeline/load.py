"""The ways to a Pipeline, by name or from an existing diffusers pipeline as it is; and to a transformer alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gossamer.errors import AdapterError, WrongModelError
from gossamer.formats import find_packing_format
from gossamer.kernels.wishes import require_attention_wish, require_wish
from gossamer.memory.gpu_memory import capped, reset_peak
from gossamer.models.fill import Target
from gossamer.models.flux_spec import FluxSpec
from gossamer.models.swap import linear_layers, quantize, weight_bytes
from gossamer.pipeline.components import (
    StorageChoice,
    compute_type,
    execute_parts,
    has_room_for_copies,
    load_components,
    load_weights,
    pick_device,
    plain_name,
    storage_plan,
    stored_plan,
)
from gossamer.pipeline.fit import Fit, NoPlan
from gossamer.pipeline.folder import COMPONENTS, PIPELINES, Profile, max_sequence_length
from gossamer.pipeline.model import open_transformer
from gossamer.pipeline.options import STORED, LoadOptions, make
from gossamer.pipeline.painter import Assembly, Pipeline
from gossamer.pipeline.prepare import Identity, Prepared, prepare, require_patterns
from gossamer.pipeline.residence import NoResidence, Residence, Tell, surviving, warn


def load(model: str | Path | None = None, **options: Any) -> Pipeline:
    """Load a model: by default the embedded one, else a diffusers folder or a hub id.

    The options are the fields of LoadOptions: storage, text_storage, skip, loras, device, vram, ram, offload,
    least_fidelity. None means the default. With `vram="6GB"` the pipeline keeps to that memory, now and in every
    picture; without, it takes what is free if it has to. Smaller plans that running out of memory led to are told as
    warnings.
    """
    return assemble(prepare(make(LoadOptions, {"model": model, **options})))


def assemble(prepared: Prepared, tell: Tell = warn) -> Pipeline:
    """Load what was prepared, by its plan, or by a smaller one where the GPU turns out to have less memory."""
    fitted, device = prepared.fit, prepared.device
    if isinstance(fitted, NoPlan):
        return _assembled(prepared, lambda parts: NoResidence(), None)
    files = [file for weights in prepared.model.weights.values() for file in weights.source.mapped]

    def load_by(fit: Fit) -> Pipeline:
        return _assembled(prepared, lambda parts: Residence(parts, fit, device, files, tell), fit)

    reset_peak(device)
    with capped(device, fitted.limit):
        return surviving(load_by, fitted, device, tell)


def _assembled(
    prepared: Prepared, place: Callable[[Mapping[str, Any]], Residence | NoResidence], fit: Fit | None
) -> Pipeline:
    """Load, place, attach the adapters, and fuse those that are to be fused."""
    device, placement = prepared.device, None if fit is None else fit.chosen.placement
    components = load_components(prepared.model, prepared.storage, device, placement)
    parts, transformer = components.parts, components.parts["transformer"]
    residence = place(parts)
    roomy = has_room_for_copies(transformer, device) if fit is None else weight_bytes(transformer) < fit.spare_bytes
    execute_parts(parts, prepared.storage, device, roomy)
    pipeline = Pipeline(
        Assembly(
            parts,
            components.report,
            prepared.storage,
            prepared.identity,
            prepared.model.profile,
            device,
            residence,
        )
    )
    for named in prepared.adapters:
        pipeline.attach_named(replace(named, fused=False))
    fused = [named.name for named in prepared.adapters if named.fused]
    if fused:
        pipeline.fuse(fused)
    return pipeline


def load_transformer(
    path: str | Path,
    storage: str = STORED,
    skip: Iterable[str] = (),
    device: str = "auto",
    compute: str = "auto",
    attention: str = "auto",
) -> Any:
    """The transformer of a file or folder alone: a drop-in for diffusers' FluxTransformer2DModel, on its device.

    It is for pipelines that Gossamer does not have, such as FLUX.1-Fill's. `storage`, `skip`, `device`, `compute` and
    `attention` are as in `load`. A file of a model whose heads are not FLUX.1's needs its config: give the folder then.
    """
    wished = storage if storage == STORED else find_packing_format(storage).name
    wishes = require_wish(compute), require_attention_wish(attention)
    choice = StorageChoice(wished, STORED, tuple(skip), *wishes)
    chosen = pick_device(device)
    config, weights = open_transformer(Path(path).expanduser())
    require_patterns(choice.skip, FluxSpec.from_config(config))
    target = Target(stored_plan(choice, weights), compute_type(chosen), chosen)
    transformer, _ = load_weights(config, weights, target)
    execute_parts({"transformer": transformer}, choice, chosen, has_room_for_copies(transformer, chosen))
    return transformer


def optimize(
    pipe: Any,
    storage: str = "nf4",
    skip: Iterable[str] = (),
    text_storage: str | None = None,
    compute: str = "auto",
    attention: str = "auto",
) -> Pipeline:
    """Take a diffusers FluxPipeline as it is: put our transformer into it and pack its linears, in place.

    `pipe` shares its components with the result and goes on working; move it to its device first. The text encoders'
    weights stay as they are, uncopied, unless `text_storage` names a format; adapters act on them either way. `compute`
    is the type of the products, `attention` "auto" or "exact" (`gossamer doctor` explains both). What the pipeline was
    made from is not known, so its pictures cannot be rerun.
    """
    if type(pipe).__name__ not in PIPELINES:
        raise WrongModelError(
            f"A {type(pipe).__name__} cannot be optimised.",
            f"Gossamer takes diffusers' {' and '.join(PIPELINES)}.",
            "Build one of them from the same components first.",
        )
    if getattr(pipe.transformer, "peft_config", None):
        raise AdapterError(
            "The pipeline has adapters attached by PEFT.",
            "They wrap the linears that are to be packed, and would multiply with packed weights apart from them.",
            "Call unload_lora_weights() first, then attach the files to the result with attach().",
        )
    own = plain_name(pipe.transformer.dtype)
    text_own = plain_name(pipe.text_encoder_2.dtype)
    chosen, text = (find_packing_format(name).name for name in (storage, text_storage or text_own))
    wishes = require_wish(compute), require_attention_wish(attention)
    choice = StorageChoice(chosen, text, tuple(skip), *wishes)
    # before packing: a layer's weight is only freed at once where no other model holds the layer
    pipe.transformer = _our_transformer(pipe.transformer)
    report = quantize(pipe.transformer, storage_plan(choice, own))
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        if text_storage or not linear_layers(encoder):  # one that was quantised before stays what it is
            quantize(encoder, choice.text if text_storage else {})
    parts = {name: pipe.components[name] for name in COMPONENTS}
    device = pipe.transformer.device
    execute_parts(parts, choice, device, has_room_for_copies(pipe.transformer, device))
    source = str(getattr(pipe, "name_or_path", "") or type(pipe).__name__)
    profile = Profile(pipe.vae.config.sample_size, max_sequence_length(Path(source)))
    return Pipeline(Assembly(parts, report, choice, Identity(source, None, None), profile, device))


def _our_transformer(transformer: Any) -> Any:
    from gossamer.models.flux import FluxTransformer, from_diffusers

    return transformer if isinstance(transformer, FluxTransformer) else from_diffusers(transformer)
