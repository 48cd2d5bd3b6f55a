"""Attach adapters to a FLUX transformer whose linears are QuantLinears, change their strength, and detach them.

Stored weights are never written to. Everything is checked before anything is changed, so that an error leaves the model
as it was. What is attached is remembered on the model itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import nn

from gossamer.adapters import control
from gossamer.adapters.adapter import INPUT_LAYER, TRANSFORMER, Adapter, allowed_input_widths, describe
from gossamer.adapters.build import layer_term
from gossamer.adapters.cost import Cost, cost_of
from gossamer.adapters.norms import NormChange, new_change, set_norms
from gossamer.adapters.terms import DecomposedTerm, LinearTerm
from gossamer.adapters.text_encoders import TextEncoders, text_norms, text_targets
from gossamer.errors import AdapterError, WrongModelError
from gossamer.layers import Decomposed, QuantLinear, Term
from gossamer.layers.moves import move_terms
from gossamer.models.flux_spec import FluxSpec
from gossamer.models.swap import linear_layers

Values = Mapping[str, torch.Tensor]

Step = tuple[Mapping[str, nn.Module | None], str, nn.Module]  # the children of a module, a name, and its child

RECORD = "attached_adapters"
LARGEST_STRENGTH = torch.finfo(torch.float32).max


@dataclass(frozen=True, eq=False)
class Places:
    """Layers by name, and how each was reached: a module by its parent's children and its name there.

    So whether they are still in their places is known without a walk through the whole model.
    """

    layers: Mapping[str, QuantLinear]
    steps: tuple[Step, ...]

    @staticmethod
    def of(model: nn.Module, layers: Mapping[str, QuantLinear]) -> Places:
        """The places of these layers."""
        steps: dict[str, Step] = {}
        for name in layers:
            _reach(model, name, steps)
        return Places(layers, tuple(steps.values()))

    def hold(self) -> bool:
        """Whether nothing on the way was replaced."""
        return all(children.get(name) is module for children, name, module in self.steps)


def _reach(model: nn.Module, path: str, steps: dict[str, Step]) -> nn.Module:
    """The module of a dotted name that the model has; each step of the way is taken once and remembered."""
    if not path:
        return model
    if path not in steps:
        above, _, name = path.rpartition(".")
        children = _reach(model, above, steps)._modules
        steps[path] = (children, name, cast(nn.Module, children[name]))
    return steps[path][2]


@dataclass(frozen=True, eq=False)
class Attachment:
    """An adapter on a model: its strength, what it does to norms by component, where its terms are, and its memory."""

    adapter: Adapter
    scale: float
    places: Places
    norms: Mapping[str, NormChange] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)


def attached(model: nn.Module) -> dict[str, Attachment]:
    """What is attached to the model by name, in order of attachment."""
    return dict(model.__dict__.get(RECORD, {}))


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
    spec = _base_spec(model, layers)
    texts, norms = text_targets(adapter, encoders), _norms(model, adapter, encoders, scale)
    _check(model, [*layers.values(), *(layer for layer, _ in texts)], spec, adapter, name)
    _check_terms(model, layers, adapter)
    _check_scale(adapter, name, scale)
    width = max(layers[INPUT_LAYER].in_features, adapter.input_channels or 0)
    # on the device before anything else: an allocation that fails leaves the model as it was
    terms = {layers[target]: layer_term(layers[target], term, name, scale) for target, term in adapter.terms.items()}
    text_terms = {layer: layer_term(layer, term, name, scale) for layer, term in texts}
    move_terms((term, layer.device) for layer, term in (*terms.items(), *text_terms.items()))
    _share_norms(layers, adapter.terms, terms)
    if layers[INPUT_LAYER] in terms:
        terms[layers[INPUT_LAYER]] = terms[layers[INPUT_LAYER]].widened(width)
    control.set_input_width(model, layers[INPUT_LAYER], width)
    for layer, term in (*terms.items(), *text_terms.items()):
        layer.add(term)
    cost = sum((cost_of(encoder, text_terms) for encoder in encoders.values()), start=Cost(0))
    places = Places.of(model, {target: layers[target] for target in adapter.terms})
    record = Attachment(adapter, scale, places, norms, cost_of(model, terms) + cost)
    _set_records(model, encoders, {**attached(model), name: record})


def detach(model: nn.Module, name: str, text_encoders: TextEncoders | None = None) -> Adapter:
    """Take an adapter off; the model is then as if it had never been there. Hands the adapter back."""
    record, targets = _find(model, name, text_encoders)
    for layer, _ in targets:
        layer.remove(name)
    others = {other: attachment for other, attachment in attached(model).items() if other != name}
    _set_records(model, text_encoders or {}, others)
    widths = [attachment.adapter.input_channels or 0 for attachment in others.values()]
    first = model.get_submodule(INPUT_LAYER)
    if isinstance(first, QuantLinear):
        control.set_input_width(model, first, max([first.stored.shape[1], *widths]))
    return record.adapter


def set_scale(model: nn.Module, name: str, scale: float, text_encoders: TextEncoders | None = None) -> None:
    """Change an adapter's strength from the next call on. Norm scales that it replaced stay replaced."""
    record, targets = _find(model, name, text_encoders)
    _check_scale(record.adapter, name, scale)
    for layer, term in targets:
        layer.set_scale(name, scale * term.multiplier)
    norms = {component: change.at(scale) for component, change in record.norms.items()}
    _set_records(model, text_encoders or {}, {**attached(model), name: replace(record, scale=scale, norms=norms)})


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


def _norms(model: nn.Module, adapter: Adapter, encoders: TextEncoders, scale: float) -> dict[str, NormChange]:
    """What the adapter does to norms, by component; nothing is changed yet."""
    records = attached(model).values()

    def change(component: str, module: nn.Module, replaced: Values, added: Values) -> NormChange:
        there = [record.norms[component] for record in records if component in record.norms]
        return new_change(module, there, replaced, added, scale)

    texts = text_norms(adapter, encoders).items()
    found = {component: change(component, encoders[component], {}, of_one) for component, of_one in texts}
    own = adapter.norm_differences.get(TRANSFORMER, {})
    if adapter.replacements or own:
        found[TRANSFORMER] = change(TRANSFORMER, model, adapter.replacements, own)
    return found


def _set_records(model: nn.Module, encoders: TextEncoders, records: Mapping[str, Attachment]) -> None:
    """Bring the norms to what these records say, and remember them."""
    before = attached(model)
    for component in dict.fromkeys(of for record in (*before.values(), *records.values()) for of in record.norms):
        if component != TRANSFORMER and component not in encoders:
            continue  # nothing of it changes: an adapter that changes it cannot come, go or be scaled without it
        module = model if component == TRANSFORMER else encoders[component]
        changes = ([of.norms[component] for of in each.values() if component in of.norms] for each in (before, records))
        set_norms(module, *changes)
    if records:
        setattr(model, RECORD, dict(records))
    else:
        model.__dict__.pop(RECORD, None)


def _find(
    model: nn.Module, name: str, text_encoders: TextEncoders | None
) -> tuple[Attachment, list[tuple[QuantLinear, LinearTerm]]]:
    """The record of an adapter all of whose terms are still in place, and each of them with its layer."""
    records = attached(model)
    if name not in records:
        raise AdapterError(
            f"No adapter called {name!r} is attached.",
            f"Attached: {', '.join(records) or 'none'}.",
            "Use one of the attached names.",
        )
    adapter, places = records[name].adapter, records[name].places
    lost = [target for target, layer in places.layers.items() if not layer.has(name)]
    lost += [] if places.hold() else list(places.layers)[:1]
    texts = text_targets(adapter, text_encoders or {})
    lost += ["the text encoders" for layer, _ in texts if not layer.has(name)]
    if lost:
        raise AdapterError(
            f"Parts of the adapter {name!r} are gone from the model, such as the one of {lost[0]!r}.",
            "Something removed terms from single layers, or replaced layers, since the adapter was attached.",
            "Load the model again.",
        )
    return records[name], [*((places.layers[target], term) for target, term in adapter.terms.items()), *texts]


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


def _check_scale(adapter: Adapter, name: str, scale: float) -> None:
    """Scale times multiplier is a float32 number in every term, as the products need it."""
    groups = (adapter.terms, *adapter.text.values())
    strengths = (scale * term.multiplier for terms in groups for term in terms.values())
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
