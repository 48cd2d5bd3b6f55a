"""Which layers and norms of which text encoder an adapter changes, all of it checked before anything is changed."""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch
from torch import nn

from gossamer.adapters.adapter import Adapter
from gossamer.adapters.terms import LinearTerm
from gossamer.adapters.text_names import TEXT_ENCODERS
from gossamer.errors import AdapterError, WrongModelError
from gossamer.layers import QuantLinear
from gossamer.models.swap import linear_layers

TextEncoders = Mapping[str, nn.Module]


def text_targets(adapter: Adapter, encoders: TextEncoders) -> list[tuple[QuantLinear, LinearTerm]]:
    """Each text term of the adapter with the layer that it changes."""
    missing = [component for component in adapter.text_components if component not in encoders]
    if missing:
        given = ", ".join(f"{name!r}: ..." for name in adapter.text_components)
        raise AdapterError(
            f"The adapter also changes {' and '.join(missing)}, and only the transformer was given.",
            "Leaving its text-encoder terms out in silence would make another adapter of it.",
            f"Pass the text encoders too: text_encoders={{{given}}}; "
            "or attach adapter.without_text(), which is the transformer's part alone.",
        )
    targets = (_targets(component, terms, encoders[component]) for component, terms in adapter.text.items())
    return [target for of_one in targets for target in of_one]


def text_norms(adapter: Adapter, encoders: TextEncoders) -> dict[str, dict[str, torch.Tensor]]:
    """What the adapter adds to parameters of norms, by component and by the parameter's name in that encoder.

    To be called after `text_targets`, which says what is missing.
    """
    changed = [component for component in adapter.text_components if component in adapter.norm_differences]
    return {
        component: _norms(component, adapter.norm_differences[component], encoders[component]) for component in changed
    }


def _norms(component: str, differences: Mapping[str, torch.Tensor], encoder: nn.Module) -> dict[str, torch.Tensor]:
    parameters, root = dict(encoder.named_parameters()), TEXT_ENCODERS[component].optional_root
    found = {}
    for name, difference in differences.items():
        own = _known_name(name, parameters, root)
        if own is None:
            raise _no_such_layers(component, [name], encoder)
        if parameters[own].shape != difference.shape:
            raise _other_size(component, name, tuple(difference.shape), tuple(parameters[own].shape))
        found[own] = difference
    return found


def _targets(
    component: str, terms: Mapping[str, LinearTerm], encoder: nn.Module
) -> list[tuple[QuantLinear, LinearTerm]]:
    layers = linear_layers(encoder)
    known, root = {name for name, _ in encoder.named_modules()}, TEXT_ENCODERS[component].optional_root
    names = {name: _known_name(name, known, root) for name in terms}
    unknown = [name for name, own in names.items() if own is None]
    if unknown:
        raise _no_such_layers(component, unknown, encoder)
    own_names = {name: own for name, own in names.items() if own is not None}
    plain = [own for own in own_names.values() if own not in layers]
    if plain:
        raise AdapterError(
            f"{len(plain)} layers of the {component} cannot take an adapter, such as {plain[0]!r}.",
            "They are not QuantLinears.",
            "Swap its linears first with gossamer.quantize; storage='fp32' keeps the weights as they are.",
        )
    for name, own in own_names.items():
        _check_size(component, name, terms[name], layers[own])
    return [(layers[own], terms[name]) for name, own in own_names.items()]


def _known_name(name: str, known: Container[str], optional_root: str) -> str | None:
    """What the encoder calls it; None where it has no such thing."""
    return next((own for own in (name, name.removeprefix(optional_root)) if own in known), None)


def _check_size(component: str, name: str, term: LinearTerm, layer: QuantLinear) -> None:
    expected = (layer.out_features, layer.in_features)
    if term.shape != expected[: len(term.shape)]:
        raise _other_size(component, name, term.shape, expected)


def _no_such_layers(component: str, names: list[str], encoder: nn.Module) -> WrongModelError:
    return WrongModelError(
        f"The adapter changes {len(names)} layers that the {component} does not have, such as {names[0]!r}.",
        f"The given {component} is a {type(encoder).__name__} of other layers.",
        "Use an adapter that was made for this text encoder.",
    )


def _other_size(component: str, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> WrongModelError:
    return WrongModelError(
        f"The adapter was made for a {component} of another size.",
        f"For {name!r} it brings a change of shape {found}; the layer is {expected}.",
        "Use an adapter that was made for this text encoder.",
    )
