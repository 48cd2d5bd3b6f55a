"""How adapter files spell the same thing: which prefix, which module names, which endings. A new spelling is a row.

    diffusers   transformer.transformer_blocks.0.attn.to_q             .lora_A.weight     .lora_B.weight   .lora_B.bias
    kohya       lora_unet_double_blocks_0_img_attn_qkv                 .lora_down.weight  .lora_up.weight
    bfl         double_blocks.0.img_attn.qkv                           .lora_A.weight     .lora_B.weight   .lora_B.bias
    onetrainer  lora_transformer_transformer_blocks_0_attn_to_q        .lora_down.weight  .lora_up.weight
                transformer.double_blocks.0.img_attn.qkv.0             .lora_down.weight  .lora_up.weight
    xlabs       double_blocks.0.processor.qkv_lora1                    .down.weight       .up.weight

and `.alpha` with all of them; the other families have endings of their own, `.lokr_w1`, `.hada_w1_a`, `.diff`, and the
magnitude of DoRA three. A key is a prefix, a module and an ending, or a prefix and the name of a norm scale. Any ending
and any prefix of the tables are read with any module naming, because trainers mix them; what a spelling writes is in
its own row. Text encoders are in `text_names`, what the roles mean together in `kinds`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from gossamer.checkpoints.flux_names import (
    Part,
    bfl_linears,
    bfl_norms,
    kohya_name,
    onetrainer_linears,
    xlabs_linears,
)
from gossamer.errors import UnknownOptionError
from gossamer.models.flux_spec import FluxSpec, linear_shapes, norm_shapes

Role = Literal[
    "down",
    "up",
    "bias",
    "alpha",
    "magnitude",
    "lokr_w1",
    "lokr_w1_a",
    "lokr_w1_b",
    "lokr_w2",
    "lokr_w2_a",
    "lokr_w2_b",
    "lokr_t2",
    "hada_w1_a",
    "hada_w1_b",
    "hada_t1",
    "hada_w2_a",
    "hada_w2_b",
    "hada_t2",
    "diff",
    "diff_b",
]

LYCORIS_ROLES: tuple[Role, ...] = (
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    *("hada_w1_a", "hada_w1_b", "hada_t1", "hada_w2_a", "hada_w2_b", "hada_t2"),
)

# longer endings first where one ends in another, but the module decides: XLabs' `qkv_lora` has `.down.weight` behind it
ENDINGS: Mapping[str, Role] = {
    ".lora_A.weight": "down",  # PEFT
    ".lora_B.weight": "up",
    ".lora_B.bias": "bias",
    ".lora_A.default.weight": "down",  # PEFT, with the name of the adapter left in
    ".lora_B.default.weight": "up",
    ".lora_B.default.bias": "bias",
    ".lora_A": "down",  # a bare parameter
    ".lora_B": "up",
    ".lora_down.weight": "down",  # kohya
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",  # diffusers before PEFT
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",  # and before that
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".down.weight": "down",  # XLabs
    ".up.weight": "up",
    ".alpha": "alpha",
    ".dora_scale": "magnitude",  # LyCORIS, OneTrainer: (out, 1) or (1, in)
    ".lora_magnitude_vector": "magnitude",  # PEFT: (out,)
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude",
    ".magnitude": "magnitude",
    **{f".{role}": role for role in LYCORIS_ROLES},
    **{f".{role}.default": role for role in LYCORIS_ROLES},  # PEFT
    ".diff": "diff",  # ComfyUI's extracts, LyCORIS' full
    ".diff_b": "diff_b",
}

# behind the name of a norm: what is added to its scale, and to its bias
NORM_ENDINGS: Mapping[str, Literal["weight", "bias"]] = {
    ".diff": "weight",
    ".w_norm": "weight",  # LyCORIS
    ".diff_b": "bias",
    ".b_norm": "bias",
}

# roles that alpha / rank scales; beside others alone it does nothing
SCALED: frozenset[Role] = frozenset({"down", "up", *LYCORIS_ROLES})

# what stands before dotted names, in any combination: the wrappers of PEFT, the component, ComfyUI's model
WRAPPERS = ("transformer.", "base_model.model.", "diffusion_model.")
UNDERSCORED_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")

Modules = Mapping[str, tuple[Part, ...]]


@dataclass(frozen=True)
class Spelling:
    """One way to spell the transformer's part of an adapter.

    `modules` maps a file's module names to the diffusers linears inside, `norms` a file's norm scales to diffusers
    parameters, `changed_norms` what stands before one of NORM_ENDINGS. `underscored` names stand behind one of
    UNDERSCORED_PREFIXES, others behind WRAPPERS or nothing.
    """

    name: str
    modules: Callable[[FluxSpec], Modules]
    norms: Callable[[FluxSpec], Mapping[str, str]]
    changed_norms: Callable[[FluxSpec], Mapping[str, str]]
    underscored: bool = False
    written: Written | None = None


@dataclass(frozen=True)
class Written:
    """How a spelling is written: its prefix, an ending for each role, and the prefix of each text encoder.

    Where it lacks a role or a text encoder, the spelling cannot say that.
    """

    prefix: str
    endings: Mapping[Role, str]
    text_prefixes: Mapping[str, str] = field(default_factory=dict)
    always_alpha: bool = False


def norm_modules(norms: Mapping[str, str]) -> dict[str, str]:
    """The same by the names of the modules: without the last part, which is the parameter's."""
    return {name.rpartition(".")[0]: norm for name, norm in norms.items()}


def _diffusers_modules(spec: FluxSpec) -> Modules:
    return {name: (Part(name),) for name in linear_shapes(spec)}


def _diffusers_norms(spec: FluxSpec) -> Mapping[str, str]:
    return {name: name for name in norm_shapes(spec)}


def _bfl_modules(spec: FluxSpec) -> Modules:
    return bfl_linears(spec.num_layers, spec.num_single_layers, spec.width, spec.guidance_embeds)


def _bfl_norms(spec: FluxSpec) -> Mapping[str, str]:
    return bfl_norms(spec.num_layers, spec.num_single_layers)


def _kohya_modules(spec: FluxSpec) -> Modules:
    return {kohya_name(bfl): parts for bfl, parts in _bfl_modules(spec).items()}


def _onetrainer_modules(spec: FluxSpec) -> Modules:
    return {kohya_name(name): parts for name, parts in _diffusers_modules(spec).items()}


def _onetrainer_bfl_modules(spec: FluxSpec) -> Modules:
    return onetrainer_linears(spec.num_layers, spec.num_single_layers)


def _xlabs_modules(spec: FluxSpec) -> Modules:
    return xlabs_linears(spec.num_layers, spec.num_single_layers, spec.width)


def _diffusers_changed_norms(spec: FluxSpec) -> Mapping[str, str]:
    return norm_modules(_diffusers_norms(spec))


def _bfl_changed_norms(spec: FluxSpec) -> Mapping[str, str]:
    return norm_modules(_bfl_norms(spec))


def _kohya_changed_norms(spec: FluxSpec) -> Mapping[str, str]:
    return {kohya_name(name): norm for name, norm in norm_modules(_bfl_norms(spec)).items()}


def _onetrainer_changed_norms(spec: FluxSpec) -> Mapping[str, str]:
    return {kohya_name(name): norm for name, norm in norm_modules(_diffusers_norms(spec)).items()}


def _no_norms(spec: FluxSpec) -> Mapping[str, str]:
    return {}


PEFT_MAGNITUDE = ".lora_magnitude_vector"
LYCORIS_ENDINGS: Mapping[Role, str] = {
    **{role: f".{role}" for role in LYCORIS_ROLES},
    "diff": ".diff",
    "diff_b": ".diff_b",
    "magnitude": ".dora_scale",
    "alpha": ".alpha",
}
PEFT_ENDINGS: Mapping[Role, str] = {
    **LYCORIS_ENDINGS,
    "down": ".lora_A.weight",
    "up": ".lora_B.weight",
    "bias": ".lora_B.bias",
    "magnitude": PEFT_MAGNITUDE,
}
KOHYA_ENDINGS: Mapping[Role, str] = {**LYCORIS_ENDINGS, "down": ".lora_down.weight", "up": ".lora_up.weight"}

DIFFUSERS_FILE = Written(
    "transformer.", PEFT_ENDINGS, {"text_encoder": "text_encoder.", "text_encoder_2": "text_encoder_2."}
)
KOHYA_FILE = Written(
    "lora_unet_", KOHYA_ENDINGS, {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te3_"}, always_alpha=True
)
BFL_FILE = Written("", PEFT_ENDINGS)

SPELLINGS: tuple[Spelling, ...] = (
    Spelling("diffusers", _diffusers_modules, _diffusers_norms, _diffusers_changed_norms, written=DIFFUSERS_FILE),
    Spelling("kohya", _kohya_modules, _no_norms, _kohya_changed_norms, underscored=True, written=KOHYA_FILE),
    Spelling("bfl", _bfl_modules, _bfl_norms, _bfl_changed_norms, written=BFL_FILE),
    Spelling("onetrainer", _onetrainer_modules, _no_norms, _onetrainer_changed_norms, underscored=True),
    Spelling("onetrainer", _onetrainer_bfl_modules, _no_norms, _no_norms),
    Spelling("xlabs", _xlabs_modules, _no_norms, _no_norms),
)


def find_written(name: str) -> tuple[Spelling, Written]:
    """The spelling of that name, one that can be written."""
    known = {spelling.name: (spelling, spelling.written) for spelling in SPELLINGS if spelling.written is not None}
    if name not in known:
        raise UnknownOptionError(
            f"There is no adapter spelling {name!r} to write.",
            f"Known spellings: {', '.join(known)}.",
            "Use one of these.",
        )
    return known[name]
