"""The whole pipeline of `fits` on random weights: FLUX.1 transformer, T5, CLIP and VAE, made on the GPU part by part.

Sizes are those of a `ModelSpec`, by default FLUX.1-dev's with T5-XXL and CLIP-L. Tokenizers and the scheduler are the
embedded model's: what they do takes no time, and no weights of a hub are needed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from flux_step_cases import build_ours
from gossamer.bench.random_flux import Workload, random_tensor
from gossamer.demo.embedded import model_folder
from gossamer.memory.model_specs import DEV, ClipSpec, ModelSpec, T5Spec, VaeSpec
from gossamer.memory.subject import Subject, known_subject
from gossamer.models.swap import quantize
from gossamer.pipeline.components import StorageChoice, execute_parts
from gossamer.pipeline.folder import INDEX_FILE, SETTINGS_FILE, Profile
from gossamer.pipeline.painter import Assembly, Pipeline
from gossamer.pipeline.prepare import Identity
from gossamer.pipeline.residence import NoResidence, Residence

TEXT_STORAGE = "nf4"
PROMPT = "a picture that is painted to be measured"
SMALL = replace(
    DEV,
    name="three small blocks",
    t5=T5Spec(layers=2, width=256, heads=4, head_size=64, hidden=512, vocabulary=1000),
    clip=ClipSpec(layers=2, width=64, heads=2, hidden=128, vocabulary=1000),
    vae=VaeSpec(channels=(32, 64), layers=1, latent=16),
    text_tokens=32,
)
END_OF_TEXT = 918  # of the embedded model's CLIP tokenizer


@dataclass(frozen=True)
class Model:
    """Its sizes, and one step of its transformer."""

    spec: ModelSpec
    work: Workload

    @property
    def subject(self) -> Subject:
        """As the planner sees it: plain weights that are here, so that nothing has to be downloaded."""
        return replace(known_subject(self.spec), is_here=True)


def build_shared(model: Model) -> dict[str, Any]:
    """Everything but the transformer, text encoders in TEXT_STORAGE."""
    parts = small_parts()
    for name, module in other_parts(model):
        parts[name] = module
        if name != "vae":
            quantize(module, TEXT_STORAGE)
    return parts


def small_parts() -> dict[str, Any]:
    """Scheduler and tokenizers."""
    folder = model_folder()
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "tokenizer_2": T5TokenizerFast.from_pretrained(folder / "tokenizer_2"),
    }


def write_base(model: Model, folder: Path) -> None:
    """Everything but the transformer as a diffusers folder, text encoders and VAE in bf16."""
    source = model_folder()
    for name in ("scheduler", "tokenizer", "tokenizer_2"):
        shutil.copytree(source / name, folder / name)
    shutil.copy(source / INDEX_FILE, folder)
    (folder / SETTINGS_FILE).write_text(json.dumps({"max_sequence_length": model.spec.text_tokens}), "utf-8")
    for name, module in other_parts(model):
        module.save_pretrained(folder / name)


def other_parts(model: Model) -> Iterator[tuple[str, Any]]:
    """VAE and text encoders with their values, one after the other."""
    with torch.device("meta"):
        skeletons = {
            "vae": _vae(model.spec.vae, model.work.side),
            "text_encoder": _clip(model.spec.clip),
            "text_encoder_2": _t5(model.spec.t5),
        }
    for name, module in skeletons.items():
        yield name, _filled(module, model.work)


def build(model: Model, storage: str, shared: Mapping[str, Any]) -> dict[str, Any]:
    """All parts with a transformer in a storage format, and kernels under them."""
    transformer = build_ours(model.work, storage, "auto")
    parts = {**shared, "transformer": transformer}
    execute_parts(parts, StorageChoice(storage, TEXT_STORAGE), model.work.device, keeps_merged=False)
    return parts


def pipeline_of(model: Model, parts: Mapping[str, Any], storage: str, residence: Residence | NoResidence) -> Pipeline:
    """A pipeline over the parts; what they were made from is no file."""
    profile = Profile(model.work.side, model.spec.text_tokens)
    choice = StorageChoice(storage, TEXT_STORAGE)
    identity = Identity("random weights", None, None)
    report = quantize(nn.Sequential(nn.Linear(1, 1)), "bf16")  # of no interest here
    return Pipeline(Assembly(parts, report, choice, identity, profile, model.work.device, residence))


def _t5(spec: T5Spec) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=spec.vocabulary,
            d_model=spec.width,
            d_kv=spec.head_size,
            d_ff=spec.hidden,
            num_layers=spec.layers,
            num_heads=spec.heads,
            feed_forward_proj="gated-gelu",
        )
    )


def _clip(spec: ClipSpec) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=spec.vocabulary,
            hidden_size=spec.width,
            intermediate_size=spec.hidden,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads,
            bos_token_id=END_OF_TEXT - 1,
            eos_token_id=END_OF_TEXT,
        )
    )


def _vae(spec: VaeSpec, side: int) -> AutoencoderKL:
    levels = len(spec.channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=spec.channels,
        layers_per_block=spec.layers,
        latent_channels=spec.latent,
        sample_size=side,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )


def _filled(module: nn.Module, work: Workload) -> nn.Module:
    """A module on the meta device with values on the workload's, norm scales about 1."""
    shared = dict(module.named_parameters(remove_duplicate=False))
    first: dict[int, nn.Parameter] = {}
    for name, parameter in shared.items():
        if id(parameter) not in first:
            first[id(parameter)] = nn.Parameter(_values(name, parameter, work), requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, first[id(parameter)])
    for name, buffer in _counters(module):
        parent, _, child = name.rpartition(".")
        counted = torch.arange(buffer.shape[-1], device=work.device).expand(buffer.shape)
        module.get_submodule(parent).register_buffer(child, counted, persistent=False)
    return module.eval()


def _values(name: str, parameter: torch.Tensor, work: Workload) -> torch.Tensor:
    values = random_tensor(name, parameter.shape, work)
    is_scale = name.endswith("weight") and "norm" in name
    return values + 1 if is_scale else values


def _counters(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """CLIP's positions; nothing else here has buffers."""
    yield from ((name, buffer) for name, buffer in module.named_buffers() if buffer.is_meta)
