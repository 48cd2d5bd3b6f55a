"""What has to hold between the parts of a model before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gossamer.checkpoints.checkpoint import Component
from gossamer.errors import FileDamagedError, WrongModelError
from gossamer.models.flux_spec import FluxSpec, linear_shapes, norm_shapes
from gossamer.pipeline.folder import damaged, read_config, read_json

WORDS: Mapping[str, str] = {
    "scheduler": "the scheduler",
    "tokenizer": "CLIP's tokenizer",
    "tokenizer_2": "T5's tokenizer",
    "transformer": "the transformer",
    "text_encoder": "the CLIP text encoder",
    "text_encoder_2": "the T5 text encoder",
    "vae": "the autoencoder",
}
FILL_CHANNELS = 384


def require_whole(transformer: Component, spec: FluxSpec) -> None:
    """Every tensor of the transformer is there."""
    linears = (f"{name}.{leaf}" for name in linear_shapes(spec) for leaf in ("weight", "bias"))
    missing = [name for name in (*linears, *norm_shapes(spec)) if name not in transformer.names]
    if missing:
        named = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise FileDamagedError(
            f"{str(transformer.source.files[0])!r} lacks {len(missing)} tensors of the transformer.",
            f"By their names in diffusers they are {named}.",
            "Download the file again; of a model in several files give them all, in one folder.",
        )


def require_fitting_texts(homes: Mapping[str, Path], config: Mapping[str, Any]) -> None:
    """The text encoders give as many features as the transformer reads."""
    for name, key, reads in (
        ("text_encoder", "hidden_size", "pooled_projection_dim"),
        ("text_encoder_2", "d_model", "joint_attention_dim"),
    ):
        gives = read_config(homes[name]).get(key)
        if gives is not None and gives != config[reads]:
            raise WrongModelError(
                f"{WORDS[name][:1].upper()}{WORDS[name][1:]} of {str(homes[name].parent)!r} does not fit.",
                f"It gives {gives} features a text token; the transformer reads {config[reads]}.",
                "Name a base model of the transformer's sizes with --base.",
            )


def picture_side(home: Path, model: str, config: Mapping[str, Any]) -> int:
    """Side of the pictures that the autoencoder was made for; its latents must be what the transformer reads."""
    file = home / "config.json"
    settings = read_json(file)
    side, channels = settings.get("sample_size"), settings.get("latent_channels")
    if type(side) is not int or type(channels) is not int or side % 16 or side <= 0:
        raise damaged(file, "It does not state sample_size, divisible by 16, and latent_channels.")
    patch, inputs = 4 * channels, config["in_channels"]
    if inputs in (patch, 2 * patch):
        return side
    if inputs == FILL_CHANNELS:
        raise WrongModelError(
            f"{model!r} holds FLUX.1-Fill, whose pipeline Gossamer does not have yet.",
            f"Its transformer reads {FILL_CHANNELS} channels: latents, a masked picture and the mask.",
            "Load the transformer with gossamer.load_transformer(...) and put it into diffusers' FluxFillPipeline, or "
            "choose a FLUX.1 dev, schnell, Canny or Depth model.",
        )
    raise WrongModelError(
        f"{model!r} holds a transformer of {inputs} input channels.",
        f"Text-to-image reads patches of {patch} channels, or {2 * patch} with a control picture.",
        "Choose a FLUX.1 dev, schnell, Canny or Depth model.",
    )
