"""Loads the parts of a model one by one, each from the stream of its weights, straight into its storage formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer.checkpoints.checkpoint import Component
from gossamer.errors import FileDamagedError, InvalidOptionError
from gossamer.formats import plain
from gossamer.kernels.detect import detect
from gossamer.layers import Buffers
from gossamer.memory.placement import Placement
from gossamer.models.execute import execute
from gossamer.models.fill import STORED, Stream, Target, fill
from gossamer.models.flux_spec import MODULATION, MODULATION_STORAGE, SENSITIVE, is_modulation
from gossamer.models.swap import QuantizeReport, weight_bytes
from gossamer.pipeline.folder import read_config
from gossamer.pipeline.landing import landing
from gossamer.pipeline.model import Model
from gossamer.pipeline.quiet import quiet_loading


@dataclass(frozen=True)
class StorageChoice:
    """Storage formats of the transformer and of the text encoders, the transformer's linears to leave as stored, and
    the type that its products are wished in (see `kernels.choice`), and whether its attention is wished exact."""

    transformer: str
    text: str
    skip: tuple[str, ...] = ()
    compute: str = "auto"
    attention: str = "auto"


@dataclass(frozen=True)
class Components:
    """The parts of a FLUX pipeline by their diffusers names, and what packing the transformer did."""

    parts: Mapping[str, Any]
    report: QuantizeReport


@dataclass(frozen=True)
class PipelineKinds:
    """diffusers' pipeline classes: without and with a control picture."""

    text: Any
    control: Any


def pipeline_kinds() -> PipelineKinds:
    """Import diffusers' pipelines, without the notices of what they could import besides."""
    with quiet_loading():
        from diffusers import FluxControlPipeline, FluxPipeline
    return PipelineKinds(FluxPipeline, FluxControlPipeline)


def load_components(
    model: Model, storage: StorageChoice, device: torch.device, placement: Placement | None = None
) -> Components:
    """Every part for a device, without kernels under it yet: float32 for a CPU, bfloat16 elsewhere; linears in their
    storage formats. What a placement does not keep on the device stays on the host.
    """
    pipeline_kinds()  # imported now, so that the time of the first picture is that of painting

    def target(part: str, formats: Mapping[str, str]) -> Target:
        land = landing(part, device, placement, model.spec)
        return Target(formats, compute_type(device), land.device, land.on_host)

    with quiet_loading():
        parts = _load_small(model.homes)
        parts["vae"] = _load_model(model, "vae", target("vae", {}))[0]
        for name in ("text_encoder", "text_encoder_2"):
            parts[name] = _load_model(model, name, target(name, {"*": storage.text}))[0]
        weights = model.weights["transformer"]
        own = target("transformer", stored_plan(storage, weights))
        parts["transformer"], report = load_weights(model.config, weights, own)
    return Components(parts, report)


def load_weights(config: Mapping[str, Any], weights: Component, target: Target) -> tuple[Any, QuantizeReport]:
    """A transformer with its weights, without kernels under it yet."""
    from gossamer.models.flux import FluxTransformer

    known = signature(FluxTransformer.__init__).parameters
    with torch.device("meta"):
        transformer = FluxTransformer(**{name: value for name, value in config.items() if name in known})
    return transformer, fill(transformer, weights.stream(), target, _place(weights))


def compute_type(device: torch.device) -> torch.dtype:
    """The type of everything that is not packed."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def execute_parts(parts: Mapping[str, Any], storage: StorageChoice, device: torch.device, keeps_merged: bool) -> None:
    """Put kernels and libraries under the linears that are packed, for the device that they run on.

    On a CPU the reference is as fast as anything, so it stays unless a compute type is wished. `keeps_merged` spends
    memory on merged copies of weights that need no decoding, while adapters are attached. Parts of a pipeline run one
    after the other, so that their decoded weights go through the same buffer.
    """
    from gossamer.models.flux import prepare

    if device.type == "cpu" and storage.compute == "auto":
        return
    capability, buffers = detect(device), Buffers()
    for name in ("text_encoder", "text_encoder_2"):
        if name in parts:
            execute(parts[name], capability, buffers=buffers)
    prepare(
        parts["transformer"], storage.compute, capability, keeps_merged, attention=storage.attention, buffers=buffers
    )


def has_room_for_copies(transformer: Any, device: torch.device) -> bool:
    """Whether half of the memory that is free beside the weights holds another copy of them."""
    return device.type == "cuda" and 2 * weight_bytes(transformer) < torch.cuda.mem_get_info(device)[0]


def storage_plan(storage: StorageChoice, stored: str, modulation: str = MODULATION_STORAGE) -> dict[str, str]:
    """Format by pattern of layer name; the first pattern that fits counts.

    What is skipped, and the sensitive layers of a quantised model, stay as stored; its modulation is in a format of its
    own.
    """
    skipped = dict.fromkeys(storage.skip, stored)
    if storage.transformer in (*plain.DTYPES, STORED):
        return {**skipped, "*": storage.transformer}
    return {**skipped, **dict.fromkeys(SENSITIVE, stored), MODULATION: modulation, "*": storage.transformer}


def stored_plan(storage: StorageChoice, weights: Component) -> dict[str, str]:
    """The plan for weights from files. Modulation that is quantised there stays as it is: nothing would be gained."""
    kinds = weights.storage().items()
    found = {kind for name, kind in kinds if is_modulation(name.removesuffix(".weight"))}
    return storage_plan(storage, STORED, MODULATION_STORAGE if found <= set(plain.DTYPES) else STORED)


def plain_name(dtype: torch.dtype) -> str:
    """The plain storage format of a floating-point type."""
    names = {known: name for name, known in plain.DTYPES.items()}
    if dtype not in names:
        raise InvalidOptionError(
            f"The model's weights are {dtype}.",
            f"Gossamer packs weights of {', '.join(names.values())}.",
            "Load the model in bfloat16 first.",
        )
    return names[dtype]


def pick_device(name: str) -> torch.device:
    """The device called `name`; 'auto' is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidOptionError(
            f"There is no device called {name!r}.", "Devices are cpu, cuda and cuda:N.", "Use 'auto' or 'cpu'."
        ) from error
    usable = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(device.type, 0)
    if (device.index or 0) >= usable:
        raise InvalidOptionError(
            f"The device {name!r} cannot be used here.",
            f"This machine offers cpu{''.join(f', cuda:{index}' for index in range(torch.cuda.device_count()))}.",
            "Use 'auto' or 'cpu'.",
        )
    return device


def _load_small(homes: Mapping[str, Path]) -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from transformers import CLIPTokenizer, T5TokenizerFast  # type: ignore[attr-defined]

    kinds = {"scheduler": FlowMatchEulerDiscreteScheduler, "tokenizer": CLIPTokenizer, "tokenizer_2": T5TokenizerFast}
    return {name: _from_folder(homes[name], kind) for name, kind in kinds.items()}


def _load_model(model: Model, name: str, target: Target) -> tuple[Any, QuantizeReport]:
    """A part with every tensor of its files used and every tensor of its own found."""
    with torch.device("meta"):
        module = _build(model.homes[name], name)
    weights = model.weights[name]
    return module, fill(module, _named_as_in(module, weights.stream()), target, _place(weights))


def _build(home: Path, name: str) -> Any:
    """A text encoder or an autoencoder as its config describes it, without values."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    config = {key: value for key, value in read_config(home).items() if key != "quantization_config"}
    try:
        if name == "vae":
            return AutoencoderKL.from_config(config)
        if name == "text_encoder":
            return CLIPTextModel(CLIPTextConfig.from_dict(config))
        return T5EncoderModel(T5Config.from_dict(config))
    except (ValueError, KeyError, TypeError) as error:
        raise _unusable(home, name, error) from error


def _named_as_in(module: nn.Module, stream: Stream) -> Stream:
    """The names of files as the installed library calls them: transformers 5 has no `text_model.` in CLIP."""
    shorter = not hasattr(module, "text_model")
    return ((name.removeprefix("text_model.") if shorter else name, value) for name, value in stream)


def _place(weights: Component) -> str:
    return f"{str(weights.source.files[0])!r}"


def _from_folder(path: Path, kind: Any) -> Any:
    try:
        return kind.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unusable(path, kind.__name__, error) from error


def _unusable(path: Path, kind: str, error: Exception) -> FileDamagedError:
    return FileDamagedError(
        f"{str(path)!r} cannot be loaded as a {kind}.",
        f"The library says: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}",
        "Download the model again, or choose the folder of a FLUX.1 model.",
    )
