"""What each key of an adapter file is, by its name alone: part of a term, a norm scale, of no effect, or unknown.

All spellings are looked up at once, since no two of them mean different things by one name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from gossamer.adapters import text_names
from gossamer.adapters.spelling_tables import (
    ENDINGS,
    NORM_ENDINGS,
    SCALED,
    SPELLINGS,
    UNDERSCORED_PREFIXES,
    WRAPPERS,
    Role,
    Spelling,
)
from gossamer.checkpoints.flux_names import Part, kohya_name
from gossamer.models.flux_spec import FluxSpec

TRANSFORMER = "transformer"

# keys that are left alone on purpose
WITHOUT_EFFECT: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"^bundle_emb\."),
        "an embedding for a word of the prompt; FLUX.1's text encoders are used with their own words only",
    ),
    (
        re.compile(r"^(lora_te1?_|clip_l\.|text_encoders?\.(clip_l\.)?(transformer\.)?)text_projection\."),
        "FLUX.1 takes CLIP's output before the text projection, so a change of it has no effect",
    ),
)
LONE_ALPHA = "alpha, a strength, of a module for which the file has no factors that it scales"


Roles = Mapping[Role, str]


@dataclass(frozen=True)
class Recognised:
    """What the keys of a file are.

    `modules` has the keys of each module of the transformer by role, under the linears in it; `text` the same for each
    linear of each text encoder; `norms` the key of each norm scale that is replaced; `changed_norms` the key of what is
    added to a norm's parameter, by component and parameter; `without_effect` the reason for each key that does nothing.
    `left_over` are the keys that nothing here understands, or that say a thing twice.
    """

    spelling: Spelling
    modules: Mapping[tuple[Part, ...], Roles]
    text: Mapping[str, Mapping[str, Roles]]
    norms: Mapping[str, str]
    changed_norms: Mapping[str, Mapping[str, str]]
    without_effect: Mapping[str, str]
    left_over: tuple[str, ...]

    @property
    def unused(self) -> tuple[str, ...]:
        """All keys that change nothing, known and unknown."""
        return *self.left_over, *self.without_effect


@dataclass(frozen=True)
class _Module:
    """What a file calls one module: the linears, or rows of linears, of a component of the model."""

    spelling: str
    component: str
    parts: tuple[Part, ...]

    @property
    def linears(self) -> list[tuple[str, str]]:
        return [(self.component, part.name) for part in self.parts]


@dataclass(frozen=True)
class _Names:
    """Modules and norm scales by the names that stand behind some prefix; of `component`, the parameters of norms that
    may be changed, by what the file has for them.
    """

    component: str
    modules: Mapping[str, _Module]
    norms: Mapping[str, str]
    changed_norms: Mapping[str, str]


_Places = dict[tuple[str, tuple[Part, ...]], dict[Role, str]]


def recognise(keys: list[str], spec: FluxSpec) -> Recognised:
    """Sort the keys of a file for a model of the sizes in `spec`."""
    without_effect = {key: reason for key in keys if (reason := _no_effect(key)) is not None}
    found: dict[str, tuple[_Module, Role]] = {}
    norms: dict[str, str] = {}
    changed: dict[str, dict[str, str]] = {}
    for key in keys:
        names, name = _names_for(key, spec)
        place = _place(name, names)
        if place is not None and key not in without_effect:
            found[key] = place
        elif name in names.norms:
            norms.setdefault(names.norms[name], key)
        elif name in names.changed_norms:
            changed.setdefault(names.component, {}).setdefault(names.changed_norms[name], key)
    places, spelling = _claim_places(found)
    idle = [roles["alpha"] for roles in places.values() if "alpha" in roles and not roles.keys() & SCALED]
    without_effect |= dict.fromkeys(idle, LONE_ALPHA)
    changing = [*norms.values(), *(key for of_one in changed.values() for key in of_one.values())]
    placed = {key for roles in places.values() for key in roles.values()}.union(changing, without_effect)
    return Recognised(
        spelling=spelling,
        modules=_of(TRANSFORMER, places),
        text={
            component: {parts[0].name: roles for parts, roles in of_one.items()}
            for component in text_names.TEXT_ENCODERS
            if (of_one := _of(component, places))
        },
        norms=norms,
        changed_norms=changed,
        without_effect=without_effect,
        left_over=tuple(key for key in keys if key not in placed),
    )


def _no_effect(key: str) -> str | None:
    return next((reason for pattern, reason in WITHOUT_EFFECT if pattern.search(key)), None)


def _claim_places(found: Mapping[str, tuple[_Module, Role]]) -> tuple[_Places, Spelling]:
    """Give each key its place, unless another key has it or another module changes the same linear.

    Where two keys want one place, the spelling that most of the file is in wins, and the other key is left out.
    """
    counts = Counter(module.spelling for module, _ in found.values())
    places: _Places = {}
    owners: dict[tuple[str, str], tuple[Part, ...]] = {}
    for key, (module, role) in sorted(found.items(), key=lambda item: -counts[item[1][0].spelling]):
        roles = places.setdefault((module.component, module.parts), {})
        if role not in roles and all(
            owners.setdefault(linear, module.parts) == module.parts for linear in module.linears
        ):
            roles[role] = key
    most = counts.most_common(1)[0][0] if counts else SPELLINGS[0].name
    return places, next(spelling for spelling in SPELLINGS if spelling.name == most)


def _of(component: str, places: _Places) -> dict[tuple[Part, ...], Roles]:
    """The places in one component that something fills, more than an alpha alone, which has no effect."""
    return {parts: roles for (owner, parts), roles in places.items() if owner == component and roles.keys() - {"alpha"}}


def _place(name: str, names: _Names) -> tuple[_Module, Role] | None:
    """Module and role of a key without its prefix; more than one ending may fit, the module decides."""
    for ending, role in ENDINGS.items():
        module = names.modules.get(name.removesuffix(ending)) if name.endswith(ending) else None
        if module is not None:
            return module, role
    return None


def _names_for(key: str, spec: FluxSpec) -> tuple[_Names, str]:
    """The names that can stand behind the key's prefix, and the key without the prefix."""
    for prefix in UNDERSCORED_PREFIXES:
        if key.startswith(prefix):
            return _transformer_names(spec, underscored=True), _without_last_underscore(key.removeprefix(prefix))
    for prefix, component in text_names.UNDERSCORED_PREFIXES.items():
        if key.startswith(prefix):
            return _text_names(component, underscored=True), _without_last_underscore(key.removeprefix(prefix))
    name = _unwrapped(key)
    for prefix, component in text_names.DOTTED_PREFIXES.items():
        if name.startswith(prefix):
            return _text_names(component, underscored=False), _unwrapped(name.removeprefix(prefix))
    return _transformer_names(spec, underscored=False), name


def _unwrapped(name: str) -> str:
    while wrapper := next((wrapper for wrapper in WRAPPERS if name.startswith(wrapper)), None):
        name = name.removeprefix(wrapper)
    return name


def _without_last_underscore(name: str) -> str:
    """`context_embedder_.alpha` is one that trainers write for `context_embedder.alpha`."""
    module, dot, ending = name.partition(".")
    return module.removesuffix("_") + dot + ending


@lru_cache(maxsize=8)
def _transformer_names(spec: FluxSpec, underscored: bool) -> _Names:
    chosen = [spelling for spelling in SPELLINGS if spelling.underscored == underscored]
    norms = {name: norm for spelling in chosen for name, norm in spelling.norms(spec).items()}
    modules = {name: norm for spelling in chosen for name, norm in spelling.changed_norms(spec).items()}
    return _Names(
        component=TRANSFORMER,
        modules={
            name: _Module(spelling.name, TRANSFORMER, parts)
            for spelling in chosen
            for name, parts in spelling.modules(spec).items()
        },
        norms=norms,
        # by the module's name or, as some extracts have it, the parameter's; these norms have no bias
        changed_norms={
            name + ending: norm
            for name, norm in {**modules, **norms}.items()
            for ending, parameter in NORM_ENDINGS.items()
            if parameter == "weight"
        },
    )


@lru_cache
def _text_names(component: str, underscored: bool) -> _Names:
    spelling, spell = ("kohya", kohya_name) if underscored else ("diffusers", str)
    parameters = text_names.text_norm_parameters(component)
    return _Names(
        component=component,
        modules={
            spell(name): _Module(spelling, component, (Part(canonical),))
            for name, canonical in text_names.text_modules(component).items()
        },
        norms={},
        changed_norms={
            spell(name) + ending: f"{norm}.{parameter}"
            for name, norm in text_names.text_norms(component).items()
            for ending, parameter in NORM_ENDINGS.items()
            if f"{norm}.{parameter}" in parameters
        },
    )
