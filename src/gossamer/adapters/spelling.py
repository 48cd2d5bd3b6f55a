"""How adapter files spell the same thing: which prefix, which module names, which endings. A new spelling is a row.

    diffusers   transformer.transformer_blocks.0.attn.to_q   .lora_A.weight     .lora_B.weight    .lora_B.bias  .alpha
    kohya       lora_unet_double_blocks_0_img_attn_qkv       .lora_down.weight  .lora_up.weight                 .alpha
    bfl         double_blocks.0.img_attn.qkv                 .lora_A.weight     .lora_B.weight    .lora_B.bias  .alpha

A key is a prefix, a module and an ending, or a prefix and the name of a norm scale. Any ending of `ENDINGS` is read
with any module naming, because trainers mix them; what each spelling writes is in its own row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from gossamer.checkpoints.flux_names import Part, bfl_linears, bfl_norms, kohya_name
from gossamer.errors import UnknownOptionError
from gossamer.models.flux_spec import FluxSpec, linear_shapes, norm_shapes

Role = Literal["down", "up", "bias", "alpha"]

ENDINGS: Mapping[str, Role] = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.bias": "bias",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_B.default.bias": "bias",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".alpha": "alpha",
}

Modules = Mapping[str, tuple[Part, ...]]


@dataclass(frozen=True)
class Spelling:
    """One way to spell an adapter.

    `prefixes` are tried in order and the first is written. `modules` maps a file's module names to the diffusers
    linears inside, `norms` a file's norm scales to diffusers parameters. `endings` are written; where it lacks a role,
    the spelling cannot say that.
    """

    name: str
    prefixes: tuple[str, ...]
    modules: Callable[[FluxSpec], Modules]
    norms: Callable[[FluxSpec], Mapping[str, str]]
    endings: Mapping[Role, str]
    always_writes_alpha: bool = False


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


def _no_norms(spec: FluxSpec) -> Mapping[str, str]:
    return {}


PEFT_ENDINGS: Mapping[Role, str] = {
    "down": ".lora_A.weight",
    "up": ".lora_B.weight",
    "bias": ".lora_B.bias",
    "alpha": ".alpha",
}
KOHYA_ENDINGS: Mapping[Role, str] = {"down": ".lora_down.weight", "up": ".lora_up.weight", "alpha": ".alpha"}

# what PEFT puts in front when a wrapped model is saved as it is
PEFT_WRAPPERS = ("base_model.model.", "base_model.model.transformer.", "transformer.base_model.model.")

SPELLINGS: tuple[Spelling, ...] = (
    Spelling("diffusers", ("transformer.", *PEFT_WRAPPERS, ""), _diffusers_modules, _diffusers_norms, PEFT_ENDINGS),
    Spelling("kohya", ("lora_unet_",), _kohya_modules, _no_norms, KOHYA_ENDINGS, always_writes_alpha=True),
    Spelling("bfl", ("", "diffusion_model."), _bfl_modules, _bfl_norms, PEFT_ENDINGS),
)


def find_spelling(name: str) -> Spelling:
    """The spelling of that name."""
    found = next((spelling for spelling in SPELLINGS if spelling.name == name), None)
    if found is None:
        raise UnknownOptionError(
            f"There is no adapter spelling {name!r}.",
            f"Known spellings: {', '.join(spelling.name for spelling in SPELLINGS)}.",
            "Use one of these.",
        )
    return found


@dataclass(frozen=True)
class Recognised:
    """The keys of a file in one spelling: key by role for each module, key for each norm scale, and what is left."""

    spelling: Spelling
    modules: Mapping[str, Mapping[Role, str]]
    norms: Mapping[str, str]
    unused: tuple[str, ...]


def recognise(keys: list[str], spelling: Spelling, spec: FluxSpec) -> Recognised:
    """Sort the keys of a file; a key that says the same thing as an earlier one is left over."""
    modules: dict[str, dict[Role, str]] = {}
    norms: dict[str, str] = {}
    unused = []
    known_modules, known_norms = spelling.modules(spec), spelling.norms(spec)
    for key in keys:
        stem, role = split_ending(key)
        module = _strip(stem, spelling.prefixes, known_modules) if role else None
        norm = _strip(key, spelling.prefixes, known_norms)
        if role and module is not None and role not in modules.setdefault(module, {}):
            modules[module][role] = key
        elif norm is not None and norm not in norms:
            norms[norm] = key
        else:
            unused.append(key)
    return Recognised(spelling, modules, norms, tuple(unused))


def best_recognised(keys: list[str], spec: FluxSpec) -> Recognised:
    """The spelling that leaves the fewest keys over."""
    return min((recognise(keys, spelling, spec) for spelling in SPELLINGS), key=lambda found: len(found.unused))


def split_ending(key: str) -> tuple[str, Role | None]:
    """The module part of a key and the role that its ending gives it; no role when the ending is unknown."""
    for ending, role in ENDINGS.items():
        if key.endswith(ending):
            return key.removesuffix(ending), role
    return key, None


def _strip(name: str, prefixes: tuple[str, ...], known: Mapping[str, object]) -> str | None:
    """The known name inside `name`, or None."""
    candidates = (name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix))
    return next((candidate for candidate in candidates if candidate in known), None)
