"""Attach adapters to a FLUX transformer whose linears are QuantLinears, change their strength, and detach them.

Stored weights are never written to. Everything is checked before anything is changed, so that an error leaves the model
as it was. What is attached is remembered on the model itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from gossamer.adapters import control
from gossamer.adapters.adapter import INPUT_LAYER, TRANSFORMER, Adapter, allowed_input_widths, describe
from gossamer.adapters.build import layer_term
from gossamer.adapters.cost import cost_of
from gossamer.adapters.norms import NormChange, new_change
from gossamer.adapters.places import Places
from gossamer.adapters.records import Attachment, attached, find, remember, set_records, show_norms
from gossamer.adapters.terms import DecomposedTerm, LinearTerm
from gossamer.adapters.text_encoders import TextEncoders, text_norms, text_targets
from gossamer.errors import AdapterError, WrongModelError
from gossamer.layers import Decomposed, QuantLinear, Strength, Term
from gossamer.layers.moves import move_terms
from gossamer.models.flux_spec import FluxSpec
from gossamer.models.swap import linear_layers

Values = Mapping[str, torch.Tensor]

Targets = list[tuple[QuantLinear, LinearTerm]]

LARGEST_STRENGTH = torch.finfo(torch.float32).max


def base_spec(model: nn.Module) -> FluxSpec:
    """The sizes of the model without any adapter: a Control LoRA's wider input layer does not count."""
    return _base_spec(model, linear_layers(model))


def _base_spec(model: nn.Module, layers: Mapping[str, QuantLinear]) -> FluxSpec:
    layer = layers.get(INPUT_LAYER)
    if layer is None:
        raise _not_swapped([INPUT_LAYER])
    config = cast(Mapping[str, Any], model.config)
    return FluxSpec.from_config({**config, "in_channels": layer.stored.shape[1]})


def attach(
    model: nn.Module, adapter: Adapter, name: str, scale: float = 1.0, text_encoders: TextEncoders | None = None
) -> None:
    """Attach an adapter under a name. A Control LoRA also widens the input layer and replaces norm scales.

    An adapter with terms for text encoders needs those encoders, by their diffusers names, here and in `set_scale` and
    `detach`: {"text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}.
    """
    layers, encoders = linear_layers(model), text_encoders or {}
    spec, strength, multipliers = _base_spec(model, layers), Strength(scale), _multipliers(adapter)
    texts, norms = text_targets(adapter, encoders), _norms(model, adapter, encoders, strength)
    _check(model, [*layers.values(), *(layer for layer, _ in texts)], spec, adapter, name)
    _check_terms(model, layers, adapter)
    _check_scale(multipliers, name, scale)
    width = max(layers[INPUT_LAYER].in_features, adapter.input_channels or 0)
    # on the device before anything else: an allocation that fails leaves the model as it was
    own = ((layers[target], term) for target, term in adapter.terms.items())
    terms, text_terms = ({layer: layer_term(layer, of, name, strength) for layer, of in each} for each in (own, texts))
    move_terms((term, layer.device) for layer, term in (*terms.items(), *text_terms.items()))
    _share_norms(layers, adapter.terms, terms)
    if layers[INPUT_LAYER] in terms:
        terms[layers[INPUT_LAYER]] = terms[layers[INPUT_LAYER]].widened(width)
    control.set_input_width(model, layers[INPUT_LAYER], width)
    for layer, term in (*terms.items(), *text_terms.items()):
        layer.add(term)
    cost = sum((cost_of(encoder, text_terms) for encoder in encoders.values()), start=cost_of(model, terms))
    known = (other.places for other in attached(model).values())
    places = Places.of(model, {target: layers[target] for target in adapter.terms}, known)
    record = Attachment(adapter, strength, multipliers, places, strength.changes, norms, cost)
    set_records(model, encoders, {**attached(model), name: record})


def detach(model: nn.Module, name: str, text_encoders: TextEncoders | None = None) -> Adapter:
    """Take an adapter off; the model is then as if it had never been there. Hands the adapter back."""
    record, encoders = find(model, name), text_encoders or {}
    for layer, _ in _in_place(record, name, encoders):
        layer.remove(name)
    others = {other: attachment for other, attachment in attached(model).items() if other != name}
    set_records(model, encoders, others)
    widths = [attachment.adapter.input_channels or 0 for attachment in others.values()]
    first = model.get_submodule(INPUT_LAYER)
    if isinstance(first, QuantLinear):
        control.set_input_width(model, first, max([first.stored.shape[1], *widths]))
    return record.adapter


def set_scale(model: nn.Module, name: str, scale: float, text_encoders: TextEncoders | None = None) -> None:
    """Change an adapter's strength from the next call on. Norm scales that it replaced stay replaced.

    That is one number for all terms. Layers are looked at only where an adapter is switched on or off, changes text
    encoders, or does not share its strength with all of its terms any more.
    """
    record, encoders = find(model, name), text_encoders or {}
    crosses = any((record.scale * own == 0) != (scale * own == 0) for own in record.multipliers)
    alone = not record.in_place() or bool(record.adapter.text_components)
    targets = _in_place(record, name, encoders) if crosses or alone else []
    _check_scale(record.multipliers, name, scale)
    if alone:
        record = _gathered(model, record, name, targets)
    for layer, term in targets:
        if (record.scale * term.multiplier == 0) != (scale * term.multiplier == 0):
            layer.changed()
    record.strength.become(scale)  # last, so that a change that is interrupted is none
    records = attached(model)
    show_norms(model, encoders, record.norms, records, records)


def _gathered(model: nn.Module, record: Attachment, name: str, targets: Targets) -> Attachment:
    """Have all terms share the adapter's strength, as some may have been set on their layers alone, or copied."""
    for layer, term in targets:
        layer.share(name, record.strength, term.multiplier)
    return remember(model, name, replace(record, seen=record.strength.changes))


def _share_norms(
    layers: Mapping[str, QuantLinear], terms: Mapping[str, LinearTerm], made: Mapping[QuantLinear, Term]
) -> None:
    """Measure the columns of every fused module that has a DoRA."""
    for group in dict.fromkeys(term.whole for term in terms.values() if isinstance(term, DecomposedTerm)):
        _share_norm([layers[target] for target in group], made)


def _share_norm(layers: Iterable[QuantLinear], made: Mapping[QuantLinear, Term]) -> None:
    """Measure the columns of a fused module that a DoRA was trained on, over the layers that hold its parts here."""
    parts = [(layer, term) for layer in layers if isinstance(term := made.get(layer), Decomposed)]
    if not parts:
        return
    bases = ((layer.base_weight(torch.float32).to(layer.device), term) for layer, term in parts)  # one at a time
    squares = [term.whole(base).square_().sum(0, keepdim=True) for base, term in bases]
    norm = torch.stack(squares).sum(0).sqrt_()
    for _, term in parts:
        term.norm = norm


def _norms(model: nn.Module, adapter: Adapter, encoders: TextEncoders, strength: Strength) -> dict[str, NormChange]:
    """What the adapter does to norms, by component; nothing is changed yet."""
    records = attached(model).values()

    def change(component: str, module: nn.Module, replaced: Values, added: Values) -> NormChange:
        there = [record.norms[component] for record in records if component in record.norms]
        return new_change(module, there, replaced, added, strength)

    texts = text_norms(adapter, encoders).items()
    found = {component: change(component, encoders[component], {}, of_one) for component, of_one in texts}
    own = adapter.norm_differences.get(TRANSFORMER, {})
    if adapter.replacements or own:
        found[TRANSFORMER] = change(TRANSFORMER, model, adapter.replacements, own)
    return found


def _in_place(record: Attachment, name: str, encoders: TextEncoders) -> Targets:
    """Each layer that the adapter changes, with its term there; all of them are still in place."""
    adapter, places = record.adapter, record.places
    lost = [target for target, layer in places.layers.items() if not layer.has(name)]
    lost += [] if places.hold() else list(places.layers)[:1]
    texts = text_targets(adapter, encoders)
    lost += ["the text encoders" for layer, _ in texts if not layer.has(name)]
    if lost:
        raise AdapterError(
            f"Parts of the adapter {name!r} are gone from the model, such as the one of {lost[0]!r}.",
            "Something removed terms from single layers, or replaced layers, since the adapter was attached.",
            "Load the model again.",
        )
    return [*((places.layers[target], term) for target, term in adapter.terms.items()), *texts]


def _multipliers(adapter: Adapter) -> frozenset[float]:
    """Those of all terms, each once."""
    groups = (adapter.terms, *adapter.text.values())
    return frozenset(term.multiplier for terms in groups for term in terms.values())


# checks


def _check(model: nn.Module, layers: list[QuantLinear], spec: FluxSpec, adapter: Adapter, name: str) -> None:
    taken = name in attached(model) or any(layer.has(name) for layer in layers)
    if taken:
        raise AdapterError(
            f"An adapter called {name!r} is already attached.",
            "Names tell adapters apart; attaching the same one twice would double its effect unnoticed.",
            "Detach it first, or attach this one under another name.",
        )
    _check_sizes(spec, adapter)


def _check_terms(model: nn.Module, layers: Mapping[str, QuantLinear], adapter: Adapter) -> None:
    plain = [target for target in adapter.terms if target not in layers]
    if plain:
        raise _not_swapped(plain)
    _check_norms(model, adapter)


def _check_sizes(spec: FluxSpec, adapter: Adapter) -> None:
    """All sizes agree; the input width is looked at by itself, because adapters may change it."""
    same = replace(adapter.spec, in_channels=spec.in_channels, out_channels=spec.out_channels) == spec
    if not same or (adapter.input_channels or spec.in_channels) not in allowed_input_widths(spec):
        raise WrongModelError(
            "The adapter was read for another model than the one that it is attached to.",
            f"It was read for {describe(adapter.spec)}; this model has {describe(spec)}.",
            "Read the adapter's file again with the sizes of this model.",
        )


def _check_scale(multipliers: Iterable[float], name: str, scale: float) -> None:
    """Scale times multiplier is a float32 number in every term, as the products need it."""
    strengths = (scale * multiplier for multiplier in multipliers)
    unusable = next((strength for strength in strengths if not abs(strength) <= LARGEST_STRENGTH), None)  # NaN too
    if unusable is not None:
        raise AdapterError(
            f"The adapter {name!r} cannot act at scale {scale:g}.",
            f"Times the factor in its file that is {unusable:g}, which is no finite float32 number.",
            "Give a scale such as 1.",
        )


def _check_norms(model: nn.Module, adapter: Adapter) -> None:
    for other, record in attached(model).items():
        shared = [parameter for parameter in adapter.replacements if parameter in record.adapter.replacements]
        if shared:
            raise AdapterError(
                f"This adapter replaces norm scales that {other!r} has already replaced, such as {shared[0]!r}.",
                "Only one set of values can be in place, so one of the two adapters would silently lose.",
                f"Detach {other!r} first.",
            )


def _not_swapped(names: list[str]) -> AdapterError:
    return AdapterError(
        f"{len(names)} layers cannot take an adapter: {', '.join(names[:5])}" + (", ..." if len(names) > 5 else "."),
        "They are not QuantLinears, or the model is not a FLUX transformer.",
        "Swap the model's linears first with gossamer.quantize; storage='fp32' keeps the weights as they are.",
    )
