"""What else a file may be that was handed over as a FLUX.1 checkpoint: other models, and parts without a transformer.

Nothing here decides whether a file loads; it finds the words for the error when it does not.
"""

from __future__ import annotations

import re
from collections.abc import Collection

# names that only one family of models has; the first that fits any name says the family
FAMILIES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("an adapter", re.compile(r"lora_(up|down|A|B)|\.lora\.|lokr_|hada_w|lora_unet_")),
    ("a ControlNet for FLUX.1", re.compile(r"^controlnet_(blocks|x_embedder|single_blocks)\.")),
    ("FLUX.2", re.compile(r"(double|single)_stream_modulation|to_qkv_mlp_proj|ff(_context)?\.linear_in")),
    ("Chroma", re.compile(r"distilled_guidance_layer\.")),
    ("HunyuanVideo", re.compile(r"individual_token_refiner|(img|txt)_attn_qkv\.")),
    ("Qwen-Image", re.compile(r"transformer_blocks\.\d+\.(img|txt)_mod\.")),
    ("Stable Diffusion 3", re.compile(r"(^|\.)joint_blocks\.\d|(^|\.)pos_embed\.(proj|pos_embed)")),
    (
        "Stable Diffusion XL",
        re.compile(r"diffusion_model\.label_emb\.|^conditioner\.embedders\.1\.model\.|(^|\.)add_embedding\."),
    ),
    (
        "a Stable Diffusion U-Net (1.x or 2.x)",
        re.compile(r"(^|\.)(input_blocks|output_blocks)\.\d|(^|\.)down_blocks\.\d+\.attentions"),
    ),
    ("Wan", re.compile(r"(^|\.)blocks\.\d+\.(self_attn|cross_attn)\.")),
    ("LTX-Video", re.compile(r"(^|\.)patchify_proj\.")),
    ("Lumina or Z-Image", re.compile(r"(^|\.)(noise_refiner|cap_embedder)\.")),
    ("PixArt", re.compile(r"(^|\.)caption_projection\.")),
    ("AuraFlow", re.compile(r"(^|\.)(double_layers|joint_transformer_blocks)\.\d")),
    ("FLUX.1 in nunchaku's SVDQuant layout", re.compile(r"\.(qweight|wscales|wzeros)$")),
)

PARTS: tuple[tuple[str, str], ...] = (
    ("text_encoder", "the CLIP text encoder"),
    ("text_encoder_2", "the T5 text encoder"),
    ("vae", "the autoencoder"),
)


def other_family(names: Collection[str]) -> str | None:
    """The model that these tensors belong to, where it is plainly not FLUX.1."""
    return next((family for family, pattern in FAMILIES if any(pattern.search(name) for name in names)), None)


def parts_in_words(components: Collection[str]) -> str:
    """Components of a file without a transformer, for a message."""
    return " and ".join(words for component, words in PARTS if component in components)
