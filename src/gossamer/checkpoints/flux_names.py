"""FLUX.1's two namings as data: Black Forest Labs' module names and the diffusers names, which are canonical here.

BFL fuses projections that diffusers keeps apart. Rows (output features) of a fused BFL module, W being the width:

    *_attn.qkv                      q, k, v                    W each
    linear1                         q, k, v, mlp               W, W, W, 4 W
    final_layer.adaLN_modulation.1  shift, scale               W each; diffusers' norm_out.linear is scale, shift

`linear2` reads attention then mlp, as diffusers' proj_out does, so its columns need no change. RMSNorm scales are
called `scale` by BFL and `weight` by diffusers. In the tables `{i}` is the number of a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A diffusers linear inside a BFL module: `rows` are the ranges of the module's rows that make it up, in order.

    No ranges means all rows as they are.
    """

    name: str
    rows: tuple[tuple[int, int], ...] = ()


EMBEDDERS: Mapping[str, str] = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
}
GUIDANCE_EMBEDDER: Mapping[str, str] = {
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
}
FINAL_LINEAR: Mapping[str, str] = {"final_layer.linear": "proj_out"}
FINAL_MODULATION = ("final_layer.adaLN_modulation.1", "norm_out.linear")

DOUBLE_LINEARS: Mapping[str, str] = {
    "double_blocks.{i}.img_mod.lin": "transformer_blocks.{i}.norm1.linear",
    "double_blocks.{i}.txt_mod.lin": "transformer_blocks.{i}.norm1_context.linear",
    "double_blocks.{i}.img_attn.proj": "transformer_blocks.{i}.attn.to_out.0",
    "double_blocks.{i}.txt_attn.proj": "transformer_blocks.{i}.attn.to_add_out",
    "double_blocks.{i}.img_mlp.0": "transformer_blocks.{i}.ff.net.0.proj",
    "double_blocks.{i}.img_mlp.2": "transformer_blocks.{i}.ff.net.2",
    "double_blocks.{i}.txt_mlp.0": "transformer_blocks.{i}.ff_context.net.0.proj",
    "double_blocks.{i}.txt_mlp.2": "transformer_blocks.{i}.ff_context.net.2",
}
SINGLE_LINEARS: Mapping[str, str] = {
    "single_blocks.{i}.modulation.lin": "single_transformer_blocks.{i}.norm.linear",
    "single_blocks.{i}.linear2": "single_transformer_blocks.{i}.proj_out",
}

# fused module: its parts from the first row on, each with its height in widths
DOUBLE_FUSED: Mapping[str, tuple[tuple[str, int], ...]] = {
    "double_blocks.{i}.img_attn.qkv": (
        ("transformer_blocks.{i}.attn.to_q", 1),
        ("transformer_blocks.{i}.attn.to_k", 1),
        ("transformer_blocks.{i}.attn.to_v", 1),
    ),
    "double_blocks.{i}.txt_attn.qkv": (
        ("transformer_blocks.{i}.attn.add_q_proj", 1),
        ("transformer_blocks.{i}.attn.add_k_proj", 1),
        ("transformer_blocks.{i}.attn.add_v_proj", 1),
    ),
}
SINGLE_FUSED: Mapping[str, tuple[tuple[str, int], ...]] = {
    "single_blocks.{i}.linear1": (
        ("single_transformer_blocks.{i}.attn.to_q", 1),
        ("single_transformer_blocks.{i}.attn.to_k", 1),
        ("single_transformer_blocks.{i}.attn.to_v", 1),
        ("single_transformer_blocks.{i}.proj_mlp", 4),
    ),
}

DOUBLE_NORMS: Mapping[str, str] = {
    "double_blocks.{i}.img_attn.norm.query_norm.scale": "transformer_blocks.{i}.attn.norm_q.weight",
    "double_blocks.{i}.img_attn.norm.key_norm.scale": "transformer_blocks.{i}.attn.norm_k.weight",
    "double_blocks.{i}.txt_attn.norm.query_norm.scale": "transformer_blocks.{i}.attn.norm_added_q.weight",
    "double_blocks.{i}.txt_attn.norm.key_norm.scale": "transformer_blocks.{i}.attn.norm_added_k.weight",
}
SINGLE_NORMS: Mapping[str, str] = {
    "single_blocks.{i}.norm.query_norm.scale": "single_transformer_blocks.{i}.attn.norm_q.weight",
    "single_blocks.{i}.norm.key_norm.scale": "single_transformer_blocks.{i}.attn.norm_k.weight",
}


# other trainers' names for modules of the tables above

# OneTrainer keeps fused modules apart and numbers their parts: `img_attn.qkv.0` is q; it calls `img_in` this
ONETRAINER_EMBEDDER: Mapping[str, str] = {"img_in.proj": "x_embedder"}

# XLabs names the processors of the attention, where 1 is the image's and 2 the text's stream; `linear1_qkv` is
# ComfyUI's name for the first three parts of linear1
XLABS_DOUBLE_FUSED: Mapping[str, tuple[tuple[str, int], ...]] = {
    "double_blocks.{i}.processor.qkv_lora1": DOUBLE_FUSED["double_blocks.{i}.img_attn.qkv"],
    "double_blocks.{i}.processor.qkv_lora2": DOUBLE_FUSED["double_blocks.{i}.txt_attn.qkv"],
}
XLABS_DOUBLE_LINEARS: Mapping[str, str] = {
    "double_blocks.{i}.processor.proj_lora1": DOUBLE_LINEARS["double_blocks.{i}.img_attn.proj"],
    "double_blocks.{i}.processor.proj_lora2": DOUBLE_LINEARS["double_blocks.{i}.txt_attn.proj"],
}
XLABS_SINGLE_FUSED: Mapping[str, tuple[tuple[str, int], ...]] = {
    "single_blocks.{i}.processor.qkv_lora": SINGLE_FUSED["single_blocks.{i}.linear1"][:3],
    "single_blocks.{i}.linear1_qkv": SINGLE_FUSED["single_blocks.{i}.linear1"][:3],
}
XLABS_SINGLE_LINEARS: Mapping[str, str] = {
    "single_blocks.{i}.processor.proj_lora": SINGLE_LINEARS["single_blocks.{i}.linear2"],
}


def bfl_linears(num_layers: int, num_single_layers: int, width: int, guidance: bool) -> dict[str, tuple[Part, ...]]:
    """Every BFL linear of a model of this size, and the diffusers linears that it holds."""
    plain = {**EMBEDDERS, **(GUIDANCE_EMBEDDER if guidance else {}), **FINAL_LINEAR}
    plain |= {**_numbered(DOUBLE_LINEARS, num_layers), **_numbered(SINGLE_LINEARS, num_single_layers)}
    bfl_modulation, modulation = FINAL_MODULATION
    return {
        **{bfl: (Part(name),) for bfl, name in plain.items()},
        **_fused(DOUBLE_FUSED, num_layers, width),
        **_fused(SINGLE_FUSED, num_single_layers, width),
        bfl_modulation: (Part(modulation, ((width, 2 * width), (0, width))),),
    }


def onetrainer_linears(num_layers: int, num_single_layers: int) -> dict[str, tuple[Part, ...]]:
    """The modules that only OneTrainer's version of the BFL names has: parts of fused modules by number."""
    pairs = [*_numbered_parts(DOUBLE_FUSED, num_layers), *_numbered_parts(SINGLE_FUSED, num_single_layers)]
    return {bfl: (Part(name),) for bfl, name in (*ONETRAINER_EMBEDDER.items(), *pairs)}


def xlabs_linears(num_layers: int, num_single_layers: int, width: int) -> dict[str, tuple[Part, ...]]:
    """The modules of XLabs' attention processors."""
    plain = _numbered(XLABS_DOUBLE_LINEARS, num_layers) | _numbered(XLABS_SINGLE_LINEARS, num_single_layers)
    return {
        **{xlabs: (Part(name),) for xlabs, name in plain.items()},
        **_fused(XLABS_DOUBLE_FUSED, num_layers, width),
        **_fused(XLABS_SINGLE_FUSED, num_single_layers, width),
    }


def bfl_norms(num_layers: int, num_single_layers: int) -> dict[str, str]:
    """Every BFL norm scale of a model of this depth, and the diffusers parameter that it is."""
    return {**_numbered(DOUBLE_NORMS, num_layers), **_numbered(SINGLE_NORMS, num_single_layers)}


def kohya_name(name: str) -> str:
    """How kohya's trainer and its followers spell a module, without their prefix such as `lora_unet_`."""
    return name.replace(".", "_")


def _numbered(table: Mapping[str, str], count: int) -> dict[str, str]:
    return {bfl.format(i=i): name.format(i=i) for i in range(count) for bfl, name in table.items()}


def _fused(table: Mapping[str, tuple[tuple[str, int], ...]], count: int, width: int) -> dict[str, tuple[Part, ...]]:
    return {bfl.format(i=i): _stack(parts, i, width) for i in range(count) for bfl, parts in table.items()}


def _numbered_parts(table: Mapping[str, tuple[tuple[str, int], ...]], count: int) -> list[tuple[str, str]]:
    return [
        (f"{bfl.format(i=i)}.{number}", name.format(i=i))
        for i in range(count)
        for bfl, parts in table.items()
        for number, (name, _) in enumerate(parts)
    ]


def _stack(parts: tuple[tuple[str, int], ...], i: int, width: int) -> tuple[Part, ...]:
    stacked, row = [], 0
    for name, height in parts:
        stacked.append(Part(name.format(i=i), ((row, row + height * width),)))
        row += height * width
    return tuple(stacked)
