"""Which layout a checkpoint file has, from the names and types of its tensors: data tables before code.

    layout        how its transformer tensors are called
    diffusers     transformer_blocks.0.attn.to_q.weight
    bfl           double_blocks.0.img_attn.qkv.weight, bare
    all-in-one    the same behind model.diffusion_model., text encoders and autoencoder perhaps beside it

The components of a file are told apart by prefix. What the numbers are stored as is said by types and by tensors that
stand beside a weight, such as its scale.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

TRANSFORMER = "transformer"

# prefix of a component's tensors, the component, and the naming behind the prefix; longer prefixes stand first
PREFIXES: tuple[tuple[str, str], ...] = (
    ("model.diffusion_model.", TRANSFORMER),
    ("diffusion_model.", TRANSFORMER),
    ("transformer.", TRANSFORMER),
    ("text_encoders.clip_l.transformer.", "text_encoder"),
    ("text_encoders.clip_l.", "text_encoder"),
    ("text_encoders.t5xxl.transformer.", "text_encoder_2"),
    ("text_encoders.t5xxl.", "text_encoder_2"),
    ("cond_stage_model.clip_l.transformer.", "text_encoder"),
    ("cond_stage_model.t5xxl.transformer.", "text_encoder_2"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder.", "text_encoder"),
    ("first_stage_model.", "vae"),
    ("vae.", "vae"),
)

# bare names that belong to one component alone
BARE: tuple[tuple[str, re.Pattern[str]], ...] = (
    (TRANSFORMER, re.compile(r"(double_blocks|single_blocks|(single_)?transformer_blocks)\.\d+\.")),
    (TRANSFORMER, re.compile(r"(img_in|txt_in|time_in|vector_in|guidance_in|final_layer)\.")),
    (TRANSFORMER, re.compile(r"(x_embedder|context_embedder|time_text_embed|norm_out|proj_out)\.")),
    ("text_encoder", re.compile(r"text_model\.|text_projection\.")),
    ("text_encoder_2", re.compile(r"(encoder\.(block|final_layer_norm)|shared)\.")),
    ("vae", re.compile(r"(encoder|decoder)\.(down|mid|up|conv|norm)|(post_)?quant_conv\.")),
)

NAMINGS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("bfl", re.compile(r"(double|single)_blocks\.\d+\.")),
    ("diffusers", re.compile(r"(single_)?transformer_blocks\.\d+\.")),
)


@dataclass(frozen=True)
class Marker:
    """A tensor ending that shows how the weights beside it are stored."""

    storage: str
    ending: str


MARKERS: tuple[Marker, ...] = (
    Marker("bitsandbytes nf4", ".quant_state.bitsandbytes__nf4"),
    Marker("bitsandbytes fp4", ".quant_state.bitsandbytes__fp4"),
    Marker("comfy_quant", ".comfy_quant"),
    Marker("nunchaku", ".qweight"),
    Marker("fp8 with two scales", ".weight_scale_2"),
    Marker("scaled fp8", ".scale_weight"),
    Marker("scaled fp8", ".weight_scale"),
)


@dataclass(frozen=True)
class Layout:
    """What a checkpoint holds: tensor names by component, how the transformer's are called, and how they are stored.

    `other` are names that belong to no component. `markers` are the ways of storing that endings give away.
    """

    naming: str | None
    prefix: str
    components: Mapping[str, tuple[str, ...]]
    other: tuple[str, ...]
    markers: tuple[str, ...]

    @property
    def name(self) -> str:
        """The layout in a word."""
        if self.naming is None:
            return "without a FLUX.1 transformer"
        return "all-in-one" if self.prefix.endswith("diffusion_model.") else self.naming


def find_layout(names: Iterable[str]) -> Layout:
    """The layout of a file with tensors of these names."""
    components: dict[str, list[str]] = {}
    other, bare, prefixes = [], Counter[str](), Counter[str]()
    for name in names:
        component, prefix = _place(name)
        if component is None:
            other.append(name)
            continue
        components.setdefault(component, []).append(name)
        if component == TRANSFORMER:
            prefixes[prefix] += 1
            bare.update(naming for naming, pattern in NAMINGS if pattern.match(name.removeprefix(prefix)))
    everything = [name for part in components.values() for name in part] + other
    return Layout(
        naming=bare.most_common(1)[0][0] if bare else None,
        prefix=prefixes.most_common(1)[0][0] if prefixes else "",
        components={component: tuple(found) for component, found in components.items()},
        other=tuple(other),
        markers=tuple(dict.fromkeys(m.storage for m in MARKERS if any(name.endswith(m.ending) for name in everything))),
    )


def _place(name: str) -> tuple[str | None, str]:
    """The component that a tensor belongs to, and the prefix that says so."""
    for prefix, component in PREFIXES:
        if name.startswith(prefix):
            return component, prefix
    return next(((component, "") for component, pattern in BARE if pattern.match(name)), (None, ""))
