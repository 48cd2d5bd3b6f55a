"""The two ways to a Pipeline: load a model by name, or take an existing diffusers pipeline as it is."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gossamer.errors import AdapterError, WrongModelError
from gossamer.formats import find_packing_format
from gossamer.kernels.wishes import require_wish
from gossamer.models.swap import quantize
from gossamer.pipeline.components import StorageChoice, execute_parts, load_components, plain_name, storage_plan
from gossamer.pipeline.folder import COMPONENTS, PIPELINES, Profile, max_sequence_length
from gossamer.pipeline.options import LoadOptions, make
from gossamer.pipeline.painter import Assembly, Pipeline
from gossamer.pipeline.prepare import Identity, Prepared, prepare


def load(model: str | Path | None = None, **options: Any) -> Pipeline:
    """Load a model: by default the embedded one, else a diffusers folder or a hub id.

    The options are the fields of LoadOptions: storage, text_storage, skip, loras, device. None means the default.
    """
    return assemble(prepare(make(LoadOptions, {"model": model, **options})))


def assemble(prepared: Prepared) -> Pipeline:
    """Load what was prepared and attach its adapters."""
    components = load_components(prepared.folder, prepared.storage, prepared.device)
    profile = prepared.folder.profile
    pipeline = Pipeline(Assembly(components.parts, components.report, prepared.storage, prepared.identity, profile))
    for named in prepared.adapters:
        pipeline.attach_named(named)
    return pipeline


def optimize(
    pipe: Any,
    storage: str = "nf4",
    skip: Iterable[str] = (),
    text_storage: str | None = None,
    compute: str = "auto",
) -> Pipeline:
    """Take a diffusers FluxPipeline as it is: put our transformer into it and pack its linears, in place.

    `pipe` shares its components with the result and goes on working; move it to its device first. The text encoders
    are packed only if `text_storage` names a format. `compute` is the type of the products (`gossamer doctor` explains
    it). What the pipeline was made from is not known, so its pictures cannot be rerun.
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
    choice = StorageChoice(chosen, text, tuple(skip), require_wish(compute))
    # before packing: a layer's weight is only freed at once where no other model holds the layer
    pipe.transformer = _our_transformer(pipe.transformer)
    report = quantize(pipe.transformer, storage_plan(choice, own))
    for encoder in (pipe.text_encoder, pipe.text_encoder_2) if text_storage else ():
        quantize(encoder, choice.text)
    parts = {name: pipe.components[name] for name in COMPONENTS}
    execute_parts(parts, choice.compute)
    source = str(getattr(pipe, "name_or_path", "") or type(pipe).__name__)
    profile = Profile(pipe.vae.config.sample_size, max_sequence_length(Path(source)))
    return Pipeline(Assembly(parts, report, choice, Identity(source, None), profile))


def _our_transformer(transformer: Any) -> Any:
    from gossamer.models.flux import FluxTransformer, from_diffusers

    return transformer if isinstance(transformer, FluxTransformer) else from_diffusers(transformer)
