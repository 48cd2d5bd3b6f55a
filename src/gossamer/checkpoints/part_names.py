"""Canonical names of the text encoders' and the autoencoder's tensors, and what is known to have no use.

CLIP and T5 are called as transformers writes them. The autoencoder is called as diffusers writes it; the naming of
Black Forest Labs and of latent diffusion before them differs:

    latent diffusion                 diffusers
    encoder.down.1.block.0.conv1     encoder.down_blocks.1.resnets.0.conv1
    encoder.down.1.downsample.conv   encoder.down_blocks.1.downsamplers.0.conv
    decoder.up.3.block.0.conv1       decoder.up_blocks.0.resnets.0.conv1          levels from the other end
    decoder.up.3.upsample.conv       decoder.up_blocks.0.upsamplers.0.conv
    *.nin_shortcut                   *.conv_shortcut
    *.mid.block_1, mid.block_2       *.mid_block.resnets.0, resnets.1
    *.mid.attn_1.norm, q, k, v       *.mid_block.attentions.0.group_norm, to_q, to_k, to_v
    *.mid.attn_1.proj_out            *.mid_block.attentions.0.to_out.0            1x1 convolutions, here linears
    *.norm_out                       *.conv_norm_out
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from gossamer.checkpoints.layouts import CLIP, T5, VAE

_LEAF = r"\.(weight|bias)"
CLIP_NAMES = re.compile(
    r"text_model\.("
    r"embeddings\.(token|position)_embedding\.weight|final_layer_norm" + _LEAF + "|"
    r"encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12]|layer_norm[12])" + _LEAF + ")"
)
T5_NAMES = re.compile(
    r"shared\.weight|encoder\.(embed_tokens\.weight|final_layer_norm\.weight|block\.\d+\.layer\.("
    r"0\.SelfAttention\.(q|k|v|o|relative_attention_bias)\.weight|[01]\.layer_norm\.weight|"
    r"1\.DenseReluDense\.(wi|wi_0|wi_1|wo)\.weight))"
)
_RESNET = r"(norm[12]|conv[12]|conv_shortcut)"
_MIDDLE = r"mid_block\.(resnets\.[01]\." + _RESNET + r"|attentions\.0\.(group_norm|to_q|to_k|to_v|to_out\.0))"
_LEVEL = r"(down|up)_blocks\.\d+\.(resnets\.\d+\." + _RESNET + r"|(down|up)samplers\.0\.conv)"
VAE_NAMES = re.compile(
    rf"((encoder|decoder)\.(conv_in|conv_out|conv_norm_out|{_MIDDLE}|{_LEVEL})|(post_)?quant_conv)" + _LEAF
)

# what files hold and FLUX.1 does not read, with the reason
UNNEEDED: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"logit_scale$"), "CLIP's temperature compares pictures with texts, which FLUX.1 does not do"),
    (
        re.compile(r"(^|\.)text_projection(\.weight)?$"),
        "FLUX.1 reads CLIP's pooled text before this projection",
    ),
    (re.compile(r"text_model\.embeddings\.position_ids$"), "the numbers 0 to 76, which the text encoder counts itself"),
    (re.compile(r"spiece_model$"), "a tokenizer; that of the base model is used"),
)

_LDM_PARTS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.down\.(\d+)\.block\."), r".down_blocks.\1.resnets."),
    (re.compile(r"\.down\.(\d+)\.downsample\."), r".down_blocks.\1.downsamplers.0."),
    (re.compile(r"\.up\.(\d+)\.block\."), r".up_blocks.\1.resnets."),
    (re.compile(r"\.up\.(\d+)\.upsample\."), r".up_blocks.\1.upsamplers.0."),
    (re.compile(r"\.nin_shortcut\."), ".conv_shortcut."),
    (re.compile(r"\.mid\.block_1\."), ".mid_block.resnets.0."),
    (re.compile(r"\.mid\.block_2\."), ".mid_block.resnets.1."),
    (re.compile(r"\.mid\.attn_1\.norm\."), ".mid_block.attentions.0.group_norm."),
    (re.compile(r"\.mid\.attn_1\.([qkv])\."), r".mid_block.attentions.0.to_\1."),
    (re.compile(r"\.mid\.attn_1\.proj_out\."), ".mid_block.attentions.0.to_out.0."),
    (re.compile(r"coder\.norm_out\."), "coder.conv_norm_out."),
)
_UP = re.compile(r"(decoder\.up)\.(\d+)\.")


def canonical_names(component: str, bare: Iterable[str]) -> dict[str, str]:
    """Canonical name by name without prefix, for those that the component is known to have."""
    bare = list(bare)
    renamed = {CLIP: _clip, T5: _same, VAE: _autoencoder}[component](bare)
    known = {CLIP: CLIP_NAMES, T5: T5_NAMES, VAE: VAE_NAMES}[component]
    return {name: canonical for name, canonical in renamed.items() if known.fullmatch(canonical)}


def why_unneeded(name: str) -> str | None:
    """Why FLUX.1 has no use for a tensor that files are known to hold; None for any other."""
    return next((reason for pattern, reason in UNNEEDED if pattern.search(name)), None)


def _same(bare: list[str]) -> Mapping[str, str]:
    return {name: name for name in bare}


def _clip(bare: list[str]) -> Mapping[str, str]:
    """transformers leaves `text_model.` away from version 5 on."""
    return {name: name if name.startswith("text_model.") else f"text_model.{name}" for name in bare}


def _autoencoder(bare: list[str]) -> Mapping[str, str]:
    levels = [int(match[2]) for name in bare if (match := _UP.match(name))]
    return {name: _from_latent_diffusion(name, max(levels, default=0)) for name in bare}


def _from_latent_diffusion(name: str, last_level: int) -> str:
    name = _UP.sub(lambda match: f"{match[1]}.{last_level - int(match[2])}.", name)
    for pattern, replacement in _LDM_PARTS:
        name = pattern.sub(replacement, name)
    return name
