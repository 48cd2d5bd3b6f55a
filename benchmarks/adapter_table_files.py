"""The files of `adapter_table`: every family in every spelling, for every module of FLUX.1-dev, and what each changes.

Namings and families are those of the tests, which are typed from descriptions of the formats and not from our parser.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gossamer.bench.random_flux import FLUX_DEV
from gossamer.models.flux_spec import FluxSpec, norm_shapes

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "adapters"))
import families
import wild

Tensors = dict[str, torch.Tensor]
Change = tuple[str, str, str]  # component, linear or parameter, and what of it: weight, magnitude, bias, norm

SPEC = FluxSpec.from_config(FLUX_DEV)
RANK = 2
LARGEST_COPY = 2e9  # bytes
TEXT = {"text_encoder": wild.clip(), "text_encoder_2": wild.t5()}


@dataclass(frozen=True)
class Row:
    """A file: its family, how its keys are spelled, an example key, its tensors, and the changes that it says."""

    family: str
    spelling: str
    make: Callable[[], tuple[Tensors, set[Change]]]
    control: bool = False


# files ----------------------------------------------------------------------------------------------------------------


def ones(*shape: int) -> torch.Tensor:
    """A tensor of any size in the memory of one value; zeros would do nothing, and may be left out."""
    return torch.ones(1, dtype=torch.bfloat16).expand(shape)


def in_memory(tensors: Tensors) -> Tensors:
    """Copies that may be written to, unless they are too large: 24 GB of differences."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return {key: tensor.contiguous() if size < LARGEST_COPY else tensor for key, tensor in tensors.items()}


def linears_of(own: str, shape: tuple[int, int]) -> list[str]:
    """The diffusers linears in a file's module."""
    return list(wild.placed(own, torch.empty(shape, device="meta")))


def low_rank(spelling: wild.Wild) -> tuple[Tensors, set[Change]]:
    modules = spelling.transformer(wild.FULL)
    shapes = {full: shape for full, (_, shape) in modules.items()} | spelling.text()
    tensors: Tensors = {}
    for name, (out_features, in_features) in shapes.items():
        tensors |= {name + spelling.down: ones(RANK, in_features), name + spelling.up: ones(out_features, RANK)}
        if spelling.alpha:
            tensors[name + ".alpha"] = torch.tensor(float(RANK))
    changes = {
        ("transformer", linear, "weight") for own, shape in modules.values() for linear in linears_of(own, shape)
    }
    if spelling.text():
        changes |= {(component, name, "weight") for component, of_one in TEXT.items() for name in of_one}
    return tensors, changes


@dataclass(frozen=True)
class OtherFamily:
    """One of the families of the tests behind a prefix, its tensors by shape made once and without memory."""

    family: Any
    prefix: str
    naming: Callable[[wild.Size], Mapping[str, tuple[int, int]]]
    underscores: bool

    def __call__(self) -> tuple[Tensors, set[Change]]:
        """The tensors and changes of a full-size file."""
        alphas = self.family.file((16, 16), torch.Generator())
        tensors, changes, made = Tensors(), set[Change](), dict[tuple[int, int], Any]()
        for own, shape in self.naming(wild.FULL).items():
            name = self.prefix + (own.replace(".", "_") if self.underscores else own)
            if shape not in made:
                with torch.device("meta"):
                    made[shape] = self.family.file(shape, None)
            for ending, value in made[shape].items():
                tensors[name + ending] = alphas[ending] if ending == ".alpha" else ones(*value.shape)
            kinds = ("weight", "magnitude") if isinstance(self.family, families.DoRA) else ("weight",)
            changes |= {("transformer", linear, kind) for linear in linears_of(own, shape) for kind in kinds}
        return tensors, changes


def norm_names() -> dict[str, str]:
    """BFL's names of norm scales, and diffusers' parameters."""
    streams = {("img", "query"): "norm_q", ("img", "key"): "norm_k"}
    streams |= {("txt", "query"): "norm_added_q", ("txt", "key"): "norm_added_k"}
    found = {
        f"double_blocks.{i}.{stream}_attn.norm.{part}_norm.scale": f"transformer_blocks.{i}.attn.{norm}.weight"
        for i in range(SPEC.num_layers)
        for (stream, part), norm in streams.items()
    }
    for i in range(SPEC.num_single_layers):
        for part, norm in (("query", "norm_q"), ("key", "norm_k")):
            found[f"single_blocks.{i}.norm.{part}_norm.scale"] = f"single_transformer_blocks.{i}.attn.{norm}.weight"
    assert set(found.values()) == set(norm_shapes(SPEC))
    return found


def control() -> tuple[Tensors, set[Change]]:
    """As FLUX.1-Canny-dev-lora: 128 input channels, a bias with every factor, all norm scales."""
    tensors, changes = Tensors(), set[Change]()
    for own, (out_features, in_features) in wild.bfl(wild.FULL).items():
        inputs = 128 if own == "img_in" else in_features
        tensors |= {f"{own}.lora_A.weight": ones(RANK, inputs), f"{own}.lora_B.weight": ones(out_features, RANK)}
        tensors[f"{own}.lora_B.bias"] = ones(out_features)
        placed = linears_of(own, (out_features, in_features))
        changes |= {("transformer", linear, kind) for linear in placed for kind in ("weight", "bias")}
    for bfl, norm in norm_names().items():
        tensors[bfl] = ones(SPEC.attention_head_dim)
        changes.add(("transformer", norm, "norm"))
    return tensors, changes


def extract() -> tuple[Tensors, set[Change]]:
    """As ComfyUI extracts a fine-tuned model: low-rank weights, differences of biases and norms."""
    tensors, changes = Tensors(), set[Change]()
    for own, (out_features, in_features) in wild.bfl(wild.FULL).items():
        stem = f"diffusion_model.{own}"
        tensors |= {
            f"{stem}.lora_down.weight": ones(RANK, in_features),
            f"{stem}.lora_up.weight": ones(out_features, RANK),
        }
        tensors[f"{stem}.diff_b"] = ones(out_features)
        placed = linears_of(own, (out_features, in_features))
        changes |= {("transformer", linear, kind) for linear in placed for kind in ("weight", "bias")}
    for bfl, norm in norm_names().items():
        tensors[f"diffusion_model.{bfl.removesuffix('.scale')}.diff"] = ones(SPEC.attention_head_dim)
        changes.add(("transformer", norm, "norm"))
    return tensors, changes


def norms_of_lycoris() -> tuple[Tensors, set[Change]]:
    names = norm_names().values()
    tensors = {f"lycoris_{name.removesuffix('.weight').replace('.', '_')}.w_norm": ones(128) for name in names}
    return tensors, {("transformer", name, "norm") for name in names}


def kontext(size: wild.Size) -> dict[str, tuple[int, int]]:
    """The modules that fal's trainer for Kontext changes: blocks and the last linear."""
    return {**wild.blocks_bfl(size), "final_layer.linear": wild.bfl(size)["final_layer.linear"]}


def with_embeddings() -> tuple[Tensors, set[Change]]:
    tensors, changes = low_rank(wild.SPELLINGS["OneTrainer, diffusers names"])
    return {**tensors, "bundle_emb.my_word.clip_l": ones(4, 768), "bundle_emb.my_word.t5": ones(4, 4096)}, changes


def rows() -> Iterator[Row]:
    for name, spelling in wild.SPELLINGS.items():
        yield Row("LoRA", name, lambda spelling=spelling: low_rank(spelling))  # type: ignore[misc]
    yield Row(
        "LoRA", "fal Kontext, as published", lambda: low_rank(replace(wild.SPELLINGS["fal Kontext"], naming=kontext))
    )
    yield Row("LoRA", "OneTrainer, with embeddings", with_embeddings)
    yield Row("Control LoRA", "BFL", control, control=True)
    yield Row("LoRA, biases, norms", "ComfyUI extract", extract)
    yield Row("norms", "LyCORIS", norms_of_lycoris)
    for family, of_one in OTHER_FAMILIES.items():
        for prefix in PREFIXES[of_one[0]]:
            yield Row(family, f"`{prefix}`", OtherFamily(of_one[1], prefix, *NAMINGS[prefix]))


NAMINGS = {
    "lycoris_": (wild.diffusers, True),
    "lora_unet_": (wild.bfl, True),
    "lora_transformer_": (wild.diffusers, True),
    "transformer.": (wild.diffusers, False),
    "diffusion_model.": (wild.bfl, False),
    "base_model.model.": (wild.diffusers, False),
}
LYCORIS = ("lycoris_", "transformer.", "diffusion_model.", "lora_unet_")
PREFIXES = {
    "lycoris": LYCORIS,
    "dora": ("lora_transformer_", "lora_unet_", "transformer."),
    "peft": ("base_model.model.", "transformer."),
}
OTHER_FAMILIES: Mapping[str, tuple[str, Any]] = {
    "LoKr, whole": ("lycoris", families.LoKr(16, right_factored=False)),
    "LoKr, factored": ("lycoris", families.LoKr(16)),
    "LoKr, with t2": ("lycoris", families.LoKr(16, with_core=True)),
    "LoHa": ("lycoris", families.LoHa()),
    "differences": ("lycoris", families.Full()),
    "DoRA, `.dora_scale` [out, 1]": ("dora", families.DoRA()),
    "DoRA, `.dora_scale` [1, in]": ("dora", families.DoRA(axis="columns")),
    "DoRA, `.lora_magnitude_vector`": ("peft", families.DoRA(families.PEFT, ".lora_magnitude_vector", "vector")),
    "DoRA, `.magnitude`": ("peft", families.DoRA(families.PEFT, ".magnitude", "vector")),
}
