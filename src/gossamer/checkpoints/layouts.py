"""Which layout a checkpoint has, from the names of its weights: data tables before code.

    layout        how its transformer tensors are called
    diffusers     transformer_blocks.0.attn.to_q.weight
    bfl           double_blocks.0.img_attn.qkv.weight, bare
    all-in-one    the same behind model.diffusion_model., text encoders and autoencoder perhaps beside it

The components of a file are told apart by prefix, or by names that one component alone has.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

TRANSFORMER = "transformer"
CLIP, T5, VAE = "text_encoder", "text_encoder_2", "vae"
COMPONENTS = (TRANSFORMER, CLIP, T5, VAE)

# prefix of a component's tensors, and the component; longer prefixes stand first
PREFIXES: tuple[tuple[str, str], ...] = (
    ("model.diffusion_model.", TRANSFORMER),
    ("diffusion_model.", TRANSFORMER),
    ("transformer.", TRANSFORMER),
    ("text_encoders.clip_l.transformer.", CLIP),
    ("text_encoders.clip_l.", CLIP),
    ("text_encoders.t5xxl.transformer.", T5),
    ("text_encoders.t5xxl.", T5),
    ("cond_stage_model.clip_l.transformer.", CLIP),
    ("cond_stage_model.t5xxl.transformer.", T5),
    ("conditioner.embedders.0.transformer.", CLIP),
    ("conditioner.embedders.1.transformer.", T5),
    ("conditioner.embedders.1.", T5),
    ("text_encoder_2.", T5),
    ("text_encoder.", CLIP),
    ("first_stage_model.", VAE),
    ("vae.", VAE),
)

# bare names that belong to one component alone
BARE: tuple[tuple[str, re.Pattern[str]], ...] = (
    (TRANSFORMER, re.compile(r"(double_blocks|single_blocks|(single_)?transformer_blocks)\.\d+\.")),
    (TRANSFORMER, re.compile(r"(img_in|txt_in|time_in|vector_in|guidance_in|final_layer)\.")),
    (TRANSFORMER, re.compile(r"(x_embedder|context_embedder|time_text_embed|norm_out|proj_out)\.")),
    (CLIP, re.compile(r"text_model\.|text_projection(\.|$)")),
    (T5, re.compile(r"(encoder\.(block|embed_tokens|final_layer_norm)|shared)\.")),
    (VAE, re.compile(r"(encoder|decoder)\.(down|mid|up|conv|norm)|(post_)?quant_conv\.")),
)

NAMINGS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("bfl", re.compile(r"(double|single)_blocks\.\d+\.|(img|txt|time|vector|guidance)_in\.|final_layer\.")),
    (
        "diffusers",
        re.compile(r"(single_)?transformer_blocks\.\d+\.|(x|context)_embedder\.|time_text_embed\.|norm_out\."),
    ),
)


@dataclass(frozen=True)
class Layout:
    """Names of a checkpoint by component, each with what is left of it behind its prefix; `other` belong to none."""

    components: Mapping[str, Mapping[str, str]]
    other: tuple[str, ...]
    naming: str | None
    prefix: str

    @property
    def name(self) -> str:
        """The layout in a word."""
        if self.naming is None:
            return "without a FLUX.1 transformer"
        return "all-in-one" if self.prefix.endswith("diffusion_model.") else self.naming


def find_layout(names: Iterable[str]) -> Layout:
    """The layout of a file with weights of these names."""
    components: dict[str, dict[str, str]] = {}
    other, prefixes = [], Counter[str]()
    for name in names:
        component, prefix = _place(name)
        if component is None:
            other.append(name)
            continue
        components.setdefault(component, {})[name] = name.removeprefix(prefix)
        if component == TRANSFORMER:
            prefixes[prefix] += 1
    return Layout(
        components=components,
        other=tuple(other),
        naming=find_naming(components.get(TRANSFORMER, {}).values()),
        prefix=prefixes.most_common(1)[0][0] if prefixes else "",
    )


def find_naming(bare: Iterable[str]) -> str | None:
    """How the tensors of a transformer are called: "bfl", "diffusers", or neither."""
    counts = Counter(naming for name in bare for naming, pattern in NAMINGS if pattern.match(name))
    return counts.most_common(1)[0][0] if counts else None


def _place(name: str) -> tuple[str | None, str]:
    """The component that a tensor belongs to, and the prefix that says so."""
    for prefix, component in PREFIXES:
        if name.startswith(prefix):
            return component, prefix
    return next(((component, "") for component, pattern in BARE if pattern.match(name)), (None, ""))
