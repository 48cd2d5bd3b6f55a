"""Which layers of which text encoder an adapter's text terms go to, all of it checked before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from gossamer.adapters.adapter import Adapter, LowRankTerm
from gossamer.adapters.text_names import TEXT_ENCODERS
from gossamer.errors import AdapterError, WrongModelError
from gossamer.layers import QuantLinear
from gossamer.models.swap import linear_layers

TextEncoders = Mapping[str, nn.Module]


def text_targets(adapter: Adapter, encoders: TextEncoders) -> list[tuple[QuantLinear, LowRankTerm]]:
    """Each text term of the adapter with the layer that it changes."""
    missing = [component for component in adapter.text if component not in encoders]
    if missing:
        raise AdapterError(
            f"The adapter also changes {' and '.join(missing)}, and only the transformer was given.",
            "Leaving its text-encoder terms out in silence would make another adapter of it.",
            f"Pass the text encoders too: text_encoders={{{', '.join(f'{name!r}: ...' for name in adapter.text)}}}; "
            "or attach adapter.without_text(), which is the transformer's part alone.",
        )
    targets = (_targets(component, terms, encoders[component]) for component, terms in adapter.text.items())
    return [target for of_one in targets for target in of_one]


def _targets(
    component: str, terms: Mapping[str, LowRankTerm], encoder: nn.Module
) -> list[tuple[QuantLinear, LowRankTerm]]:
    layers = linear_layers(encoder)
    known, root = {name for name, _ in encoder.named_modules()}, TEXT_ENCODERS[component].optional_root
    names = {name: _known_name(name, known, root) for name in terms}
    unknown = [name for name, own in names.items() if own is None]
    if unknown:
        raise WrongModelError(
            f"The adapter changes {len(unknown)} layers that the {component} does not have, such as {unknown[0]!r}.",
            f"The given {component} is a {type(encoder).__name__} of other layers.",
            "Use an adapter that was made for this text encoder.",
        )
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


def _known_name(name: str, known: set[str], optional_root: str) -> str | None:
    """What the encoder calls the linear; None where it has no such module."""
    return next((own for own in (name, name.removeprefix(optional_root)) if own in known), None)


def _check_size(component: str, name: str, term: LowRankTerm, layer: QuantLinear) -> None:
    expected = (layer.out_features, layer.in_features)
    if term.shape != expected:
        raise WrongModelError(
            f"The adapter was made for a {component} of another size.",
            f"For {name!r} it brings a change of shape {term.shape}; the layer is {expected}.",
            "Use an adapter that was made for this text encoder.",
        )
