"""Why an adapter file does not fit: what other model, depth or kind of adapter its keys belong to.

Nothing here decides whether a file loads; it finds the words for the error when it does not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from gossamer.adapters.adapter import describe, stated_base_model
from gossamer.adapters.spelling import Recognised, recognise
from gossamer.errors import AdapterError, GossamerError, WrongModelError
from gossamer.models.flux_spec import FluxSpec

# keys that only one family of models has; the first that fits any key names the family
FAMILIES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("FLUX.2", re.compile(r"(double|single)_stream_modulation|to_qkv_mlp_proj|ff(_context)?[._]linear_in")),
    (
        "Stable Diffusion XL",
        re.compile(
            r"lora_unet_(input_blocks|output_blocks|middle_block)_|^lora_te2_text_model|^text_encoder_2\.text_model"
        ),
    ),
    ("a Stable Diffusion U-Net (1.x, 2.x or XL)", re.compile(r"(^|[._])(down_blocks|up_blocks|mid_block)[._]")),
    ("Stable Diffusion 3", re.compile(r"(^|[._])joint_blocks[._]|transformer_blocks\.\d+\.attn2\.")),
    ("Qwen-Image", re.compile(r"transformer_blocks[._]\d+[._](img|txt)_(mlp|mod)[._]")),
    ("HunyuanVideo", re.compile(r"double_blocks\.\d+\.(img|txt)_attn_(qkv|proj)")),
    ("Chroma", re.compile(r"distilled_guidance_layer")),
    ("Wan", re.compile(r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn)[._]")),
)

# any key of any kind of adapter; a file without one is no adapter, whatever its keys remind of
ADAPTER = re.compile(
    r"lora|lycoris|lokr_|hada_|glora|dora_scale|ip_adapter|vera_lambda"
    r"|[._](b?oft|ia3|hra)_|\.(on_input|alpha|magnitude|diff|diff_b|w_norm|b_norm)$"
)

# keys of whole checkpoints, alone or several in one file
CHECKPOINTS: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "a transformer",
        re.compile(
            r"^(model\.)?(diffusion_model\.|transformer\.)?"
            r"((single_)?transformer_blocks|(double|single|joint)_blocks|blocks)\.\d"
        ),
    ),
    ("a U-Net", re.compile(r"^(model\.)?(diffusion_model\.|unet\.)?(down_blocks|input_blocks)\.\d")),
    ("a VAE", re.compile(r"(^|\.)(encoder\.(down|mid)|decoder\.(up|mid))(_block|_blocks)?\.")),
    ("a text encoder", re.compile(r"(^|\.)(text_model\.(encoder|embeddings)|encoder\.block\.\d+\.layer)\.")),
    ("a text encoder", re.compile(r"^(model\.)?layers\.\d+\.self_attn\.|(^|\.)transformer\.resblocks\.\d")),
)

# what keys say that belong to FLUX.1 and yet are not read; the first that fits a key names it
OTHER_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("Orthogonal factors (OFT, BOFT)", re.compile(r"[._]b?oft_|\.oft_diag$")),
    ("GLoRA factors", re.compile(r"\.[ab][12]\.weight$|glora")),
    ("IA3 scales", re.compile(r"\.on_input$|[._]ia3_")),
    (
        "Changes of embeddings",
        re.compile(r"embed_tokens|(token|position)_embedding|\.shared\.|relative_attention_bias"),
    ),
    ("Biases of norms that have none", re.compile(r"norm[^.]*(\.scale|\.weight)?\.(b_norm|diff_b)$")),
    ("Factors of convolutions", re.compile(r"\.lora_mid\.weight$")),
    ("Changes of parts of text encoders that are neither linears nor norms", re.compile(r"^(lora_te|text_encoder)")),
)

BLOCK = re.compile(r"(double_blocks|single_blocks|single_transformer_blocks|transformer_blocks)[._](\d{1,3})[._]")
SINGLE = ("single_blocks", "single_transformer_blocks")


def only_without_effect(path: str, found: Recognised) -> AdapterError:
    """The error for a file in which nothing changes a model."""
    key, reason = next(iter(found.without_effect.items()))
    return AdapterError(
        f"None of the {len(found.without_effect)} keys of {path!r} changes the model.",
        f"The first is {key!r}: {reason}.",
        "Use an adapter that changes layers of FLUX.1.",
    )


def explain_unused(
    path: str, keys: list[str], found: Recognised, metadata: Mapping[str, str], spec: FluxSpec
) -> GossamerError:
    """The error for a file with keys that the model has no place for."""
    named = ", ".join(found.left_over[:5]) + (", ..." if len(found.left_over) > 5 else "")
    what = f"{len(found.left_over)} of the {len(keys)} keys of {path!r} have no place in this model: {named}."
    made_for = _other_family(keys) or _other_sizes(keys, found, spec)
    if made_for is not None:
        return WrongModelError(
            what,
            f"The adapter was made for {made_for}{_stated(metadata)}. This model is FLUX.1 with {describe(spec)}.",
            "Use an adapter that was made for this model, or load the model that the adapter was made for.",
        )
    kinds = list(dict.fromkeys(kind for key in found.left_over if (kind := _other_kind(key)) is not None))
    if any(not recognise([key], spec).left_over for key in found.left_over):
        kinds.append("Keys for layers that other keys of the file change already")
    return AdapterError(
        what,
        f"{' and '.join(kinds) or 'Keys of this kind'} cannot be used, and a file that is used in part would be "
        f"another adapter{_stated(metadata)}. Closest spelling: {found.spelling.name}.",
        "Use a version of the adapter without these keys.",
    )


def not_an_adapter(path: str, keys: list[str]) -> AdapterError | None:
    """The error for a file without any key of an adapter; None where there is one."""
    if any(ADAPTER.search(key) for key in keys):
        return None
    parts = dict.fromkeys(name for name, pattern in CHECKPOINTS if any(pattern.search(key) for key in keys))
    looks = f", and they look like a checkpoint of {' and '.join(parts)}" if parts else ""
    return AdapterError(
        f"{path!r} is not an adapter.",
        f"None of its {len(keys)} keys is part of one{looks}; the first is {keys[0]!r}.",
        "Give the file of an adapter; a whole model is named with --model.",
    )


def _other_kind(key: str) -> str | None:
    return next((kind for kind, pattern in OTHER_KINDS if pattern.search(key)), None)


def _other_family(keys: list[str]) -> str | None:
    return next((name for name, pattern in FAMILIES if any(pattern.search(key) for key in keys)), None)


def _other_sizes(keys: list[str], found: Recognised, spec: FluxSpec) -> str | None:
    """The deeper or guided FLUX model that has a place for more of the keys, in words."""
    double, single = _depths(keys)
    larger = replace(
        spec,
        num_layers=max(spec.num_layers, double),
        num_single_layers=max(spec.num_single_layers, single),
        guidance_embeds=True,
    )
    if len(recognise(keys, larger).left_over) == len(found.left_over):
        return None
    if double > spec.num_layers or single > spec.num_single_layers:
        counts = [f"{count} {kind}" for count, kind in ((double, "double"), (single, "single")) if count]
        return f"a FLUX model of at least {' and '.join(counts)} blocks"
    return "a FLUX.1 model with a guidance embedder"


def _depths(keys: list[str]) -> tuple[int, int]:
    """Numbers of double and single blocks that the keys speak of."""
    double = single = 0
    for key in keys:
        match = BLOCK.search(key)
        if match and match[1] in SINGLE:
            single = max(single, int(match[2]) + 1)
        elif match:
            double = max(double, int(match[2]) + 1)
    return double, single


def _stated(metadata: Mapping[str, str]) -> str:
    """What the file says of itself, for the end of a sentence."""
    stated = stated_base_model(metadata)
    return f" (the file states {stated[:80]!r})" if stated else ""
