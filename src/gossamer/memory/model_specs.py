"""Sizes of everything in a FLUX.1 pipeline besides its transformer, and the models that are known by name.

Sizes come from a model's own configs where it is on this machine, else from this table, which holds what the configs of
the published models say. Then nothing needs to be downloaded to know what a model takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gossamer.errors import WrongModelError
from gossamer.models.flux_spec import FluxSpec


@dataclass(frozen=True)
class T5Spec:
    """A T5 encoder with gated feed-forward parts."""

    layers: int
    width: int
    heads: int
    head_size: int
    hidden: int
    vocabulary: int
    buckets: int = 32

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> T5Spec:
        """From a transformers config."""
        values = _read(config, "T5 encoder", "num_layers", "d_model", "num_heads", "d_kv", "d_ff", "vocab_size")
        if not str(config.get("feed_forward_proj", "")).startswith("gated"):
            raise WrongModelError(
                "This is not the T5 encoder of a FLUX.1 model.",
                f"Its feed-forward parts are {config.get('feed_forward_proj')!r}; FLUX.1's are gated.",
                "Use the text_encoder_2 folder of a FLUX.1 model.",
            )
        return cls(*(*values, config.get("relative_attention_num_buckets", 32)))


@dataclass(frozen=True)
class ClipSpec:
    """A CLIP text model."""

    layers: int
    width: int
    heads: int
    hidden: int
    vocabulary: int
    positions: int = 77

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ClipSpec:
        """From a transformers config."""
        names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
        values = _read(config, "CLIP text model", *names)
        return cls(*(*values, config.get("max_position_embeddings", 77)))


@dataclass(frozen=True)
class VaeSpec:
    """An autoencoder: channels by level, outermost first, and residual blocks a level in the encoder."""

    channels: tuple[int, ...]
    layers: int
    latent: int
    quant: bool = False
    post_quant: bool = False
    middle_attention: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VaeSpec:
        """From a diffusers config."""
        channels, layers, latent = _read(config, "VAE", "block_out_channels", "layers_per_block", "latent_channels")
        return cls(
            tuple(channels),
            layers,
            latent,
            quant=config.get("use_quant_conv", True),
            post_quant=config.get("use_post_quant_conv", True),
            middle_attention=config.get("mid_block_add_attention", True),
        )


def _read(config: Mapping[str, Any], part: str, *names: str) -> tuple[Any, ...]:
    missing = [name for name in names if name not in config]
    if missing:
        raise WrongModelError(
            f"This is not the config of a {part}.", f"It says nothing of {', '.join(missing)}.", "Use a FLUX.1 model."
        )
    return tuple(config[name] for name in names)


@dataclass(frozen=True)
class ModelSpec:
    """A whole model. `stored` is the format of its files; `steps` is what its makers recommend."""

    name: str
    transformer: FluxSpec
    t5: T5Spec
    clip: ClipSpec
    vae: VaeSpec
    text_tokens: int = 512
    steps: int = 20
    side: int = 1024
    stored: str = "bf16"


T5_XXL = T5Spec(layers=24, width=4096, heads=64, head_size=64, hidden=10240, vocabulary=32128)
CLIP_L = ClipSpec(layers=12, width=768, heads=12, hidden=3072, vocabulary=49408)
FLUX_VAE = VaeSpec(channels=(128, 256, 512, 512), layers=2, latent=16)
FLUX_DEV = FluxSpec(19, 38, 24, 128, 64, 64, 4096, 768, guidance_embeds=True)

DEV = ModelSpec("FLUX.1-dev", FLUX_DEV, T5_XXL, CLIP_L, FLUX_VAE)
SCHNELL = replace(
    DEV, name="FLUX.1-schnell", transformer=replace(FLUX_DEV, guidance_embeds=False), text_tokens=256, steps=4
)
CONTROL = replace(FLUX_DEV, in_channels=128)

KNOWN: tuple[ModelSpec, ...] = (
    DEV,
    SCHNELL,
    replace(DEV, name="FLUX.1-Fill-dev", transformer=replace(FLUX_DEV, in_channels=384)),
    replace(DEV, name="FLUX.1-Canny-dev", transformer=CONTROL),
    replace(DEV, name="FLUX.1-Depth-dev", transformer=CONTROL),
    replace(DEV, name="FLUX.1-Kontext-dev"),
    replace(DEV, name="FLUX.1-Krea-dev"),
)


def known_model(name: str) -> ModelSpec | None:
    """The published model of that name, with its owner or without: `black-forest-labs/FLUX.1-dev`, `flux.1-dev`."""
    owner, _, bare = name.rpartition("/")
    if owner not in ("", "black-forest-labs"):
        return None
    return next((model for model in KNOWN if model.name.lower() == bare.lower()), None)
