"""Linears of FLUX.1's two text encoders as data, under the module names of transformers, and what adapters call them.

    text_encoder     CLIP, CLIPTextModel    text_model.encoder.layers.{i}.   as its files, and transformers below 5, say
    text_encoder_2   T5, T5EncoderModel     encoder.block.{i}.

Sizes are symbols here, because an adapter's file does not state the encoder's sizes: equal symbols are equal numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

CLIP_ROOT = "text_model."  # transformers 5 has these modules without it
MOST_LAYERS = 64  # CLIP-L has 12, T5-XXL 24


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder: `layer` is the name of one layer, `linears` the symbols for (out, in) of the linears in it.

    `norms` are the norms of a layer, `last_norm` the one behind all layers, each with `norm_parameters`.
    """

    layer: str
    linears: Mapping[str, tuple[str, str]]
    norms: tuple[str, ...]
    last_norm: str
    norm_parameters: tuple[str, ...]
    optional_root: str = ""


TEXT_ENCODERS: Mapping[str, TextEncoder] = {
    "text_encoder": TextEncoder(
        CLIP_ROOT + "encoder.layers.{i}.",
        {
            "self_attn.q_proj": ("width", "width"),
            "self_attn.k_proj": ("width", "width"),
            "self_attn.v_proj": ("width", "width"),
            "self_attn.out_proj": ("width", "width"),
            "mlp.fc1": ("mlp width", "width"),
            "mlp.fc2": ("width", "mlp width"),
        },
        norms=("layer_norm1", "layer_norm2"),
        last_norm=CLIP_ROOT + "final_layer_norm",
        norm_parameters=("weight", "bias"),
        optional_root=CLIP_ROOT,
    ),
    "text_encoder_2": TextEncoder(
        "encoder.block.{i}.",
        {
            "layer.0.SelfAttention.q": ("attention width", "width"),
            "layer.0.SelfAttention.k": ("attention width", "width"),
            "layer.0.SelfAttention.v": ("attention width", "width"),
            "layer.0.SelfAttention.o": ("width", "attention width"),
            "layer.1.DenseReluDense.wi_0": ("mlp width", "width"),
            "layer.1.DenseReluDense.wi_1": ("mlp width", "width"),
            "layer.1.DenseReluDense.wo": ("width", "mlp width"),
        },
        norms=("layer.0.layer_norm", "layer.1.layer_norm"),
        last_norm="encoder.final_layer_norm",
        norm_parameters=("weight",),
    ),
}

# what stands in front of a text encoder's module, in files with dots and in files with underscores
DOTTED_PREFIXES: Mapping[str, str] = {
    "text_encoder.": "text_encoder",
    "text_encoders.clip_l.": "text_encoder",  # ComfyUI, followed by `transformer.`
    "clip_l.": "text_encoder",  # OneTrainer
    "text_encoder_2.": "text_encoder_2",
    "text_encoders.t5xxl.": "text_encoder_2",
    "t5.": "text_encoder_2",
}
UNDERSCORED_PREFIXES: Mapping[str, str] = {
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",  # OneTrainer
    "lora_te3_": "text_encoder_2",  # kohya, which counts SD3's encoders
}


@lru_cache
def text_sizes(component: str) -> Mapping[str, tuple[str, str]]:
    """Symbols for (out, in) of every linear of a text encoder, of as many layers as any has."""
    encoder = TEXT_ENCODERS[component]
    layers = [encoder.layer.format(i=i) for i in range(MOST_LAYERS)]
    return {layer + linear: sizes for layer in layers for linear, sizes in encoder.linears.items()}


@lru_cache
def text_modules(component: str) -> Mapping[str, str]:
    """Every name that a text encoder's linear goes by, and its canonical one."""
    root = TEXT_ENCODERS[component].optional_root
    names = text_sizes(component)
    return {**{name.removeprefix(root): name for name in names}, **{name: name for name in names}}


@lru_cache
def text_norms(component: str) -> Mapping[str, str]:
    """Every name that a text encoder's norm goes by, and its canonical one."""
    encoder = TEXT_ENCODERS[component]
    names = [encoder.layer.format(i=i) + norm for i in range(MOST_LAYERS) for norm in encoder.norms]
    names.append(encoder.last_norm)
    return {**{name.removeprefix(encoder.optional_root): name for name in names}, **{name: name for name in names}}


@lru_cache
def text_norm_parameters(component: str) -> frozenset[str]:
    """The canonical names of all parameters of a text encoder's norms."""
    parameters = TEXT_ENCODERS[component].norm_parameters
    return frozenset(f"{norm}.{parameter}" for norm in text_norms(component).values() for parameter in parameters)
