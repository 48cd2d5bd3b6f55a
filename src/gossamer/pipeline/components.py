"""Loads the parts of a model folder one by one, each checked for totality and packed before the next one comes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer.errors import FileDamagedError, InvalidOptionError
from gossamer.formats import plain
from gossamer.kernels.detect import detect
from gossamer.models.execute import execute
from gossamer.models.flux_spec import SENSITIVE
from gossamer.models.swap import QuantizeReport, quantize, weight_bytes
from gossamer.pipeline.folder import ModelFolder
from gossamer.pipeline.quiet import quiet_loading


@dataclass(frozen=True)
class StorageChoice:
    """Storage formats of the transformer and of the text encoders, the transformer's linears to leave as stored, and
    the type that its products are wished in (see `kernels.choice`)."""

    transformer: str
    text: str
    skip: tuple[str, ...] = ()
    compute: str = "auto"


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


def load_components(folder: ModelFolder, storage: StorageChoice, device: torch.device) -> Components:
    """Every part on its device: float32 on a CPU, bfloat16 elsewhere; linears in their storage formats."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    pipeline_kinds()  # imported now, so that the time of the first picture is that of painting
    with quiet_loading():
        from gossamer.models.flux import from_diffusers

        parts = _load_small(folder.path)
        parts["vae"] = _load_model(folder.path, "vae", dtype).to(device)
        for name in ("text_encoder", "text_encoder_2"):
            encoder = _load_model(folder.path, name, dtype)
            quantize(encoder, storage.text, compute=dtype)
            parts[name] = encoder.to(device)
        transformer: Any = from_diffusers(_load_model(folder.path, "transformer", dtype))
        report = quantize(transformer, storage_plan(storage, folder.stored["transformer"]), compute=dtype)
        parts["transformer"] = transformer.to(device)
    execute_parts(parts, storage.compute)
    return Components(parts, report)


def execute_parts(parts: Mapping[str, Any], compute: str) -> None:
    """Put kernels and libraries under the linears that are packed, on the device that they are on.

    On a CPU the reference is as fast as anything, so it stays unless a compute type is wished. Merged copies of weights
    that need no decoding are kept where half of the free memory holds them.
    """
    from gossamer.models.flux import prepare

    transformer = parts["transformer"]
    device = transformer.device
    if device.type == "cpu" and compute == "auto":
        return
    capability = detect(device)
    for name in ("text_encoder", "text_encoder_2"):
        execute(parts[name], capability)
    roomy = device.type == "cuda" and 2 * weight_bytes(transformer) < torch.cuda.mem_get_info(device)[0]
    prepare(transformer, compute, capability, keeps_merged=roomy)


def storage_plan(storage: StorageChoice, stored: str) -> dict[str, str]:
    """Format by pattern of layer name: what is skipped, and the sensitive layers of a quantised model, as stored."""
    sensitive = () if storage.transformer in plain.DTYPES else SENSITIVE
    return {**dict.fromkeys((*storage.skip, *sensitive), stored), "*": storage.transformer}


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


def _load_small(path: Path) -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from transformers import CLIPTokenizer, T5TokenizerFast  # type: ignore[attr-defined]

    kinds = {"scheduler": FlowMatchEulerDiscreteScheduler, "tokenizer": CLIPTokenizer, "tokenizer_2": T5TokenizerFast}
    return {name: _load(path / name, kind, {}) for name, kind in kinds.items()}


def _load_model(path: Path, name: str, dtype: torch.dtype) -> nn.Module:
    """A model with every tensor of its files used and every tensor of its own found."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextModel, T5EncoderModel

    own = {"torch_dtype": dtype}
    kind, dtype_option = {
        "vae": (AutoencoderKL, own),
        "transformer": (FluxTransformer2DModel, own),
        "text_encoder": (CLIPTextModel, {"dtype": dtype}),
        "text_encoder_2": (T5EncoderModel, {"dtype": dtype}),
    }[name]
    # sizes that do not fit are reported below instead of raised by the libraries, each in its own way
    options = {**dtype_option, "use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = _load(path / name, kind, options)
    faults = [
        f"{key.replace('_', ' ')}: {', '.join(sorted(map(str, info[key]))[:5])}"
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        if info.get(key)
    ]
    if faults:
        raise FileDamagedError(
            f"The weights in {str(path / name)!r} do not fit the model that its config describes.",
            "; ".join(faults) + ".",
            "Download the model again, or choose the folder of a FLUX.1 model.",
        )
    ready: nn.Module = model.eval().requires_grad_(False)
    return ready


def _load(path: Path, kind: Any, options: dict[str, Any]) -> Any:
    try:
        return kind.from_pretrained(path, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileDamagedError(
            f"{str(path)!r} cannot be loaded as a {kind.__name__}.",
            f"The library says: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}",
            "Download the model again, or choose the folder of a FLUX.1 model.",
        ) from error
