"""Attach adapters to a FLUX transformer whose linears are QuantLinears, change their strength, and detach them.

Stored weights are never written to. Everything is checked before anything is changed, so that an error leaves the model
as it was. What is attached is remembered on the model itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from gossamer.adapters import control
from gossamer.adapters.adapter import INPUT_LAYER, Adapter, LowRankTerm, allowed_input_widths, describe
from gossamer.adapters.text_encoders import TextEncoders, text_targets
from gossamer.errors import AdapterError, WrongModelError
from gossamer.layers import LowRank, QuantLinear
from gossamer.models.flux_spec import FluxSpec
from gossamer.models.swap import linear_layers

RECORD = "attached_adapters"
LARGEST_STRENGTH = torch.finfo(torch.float32).max


@dataclass(frozen=True, eq=False)
class Attachment:
    """An adapter on a model: its strength, and the parameters whose place its norm scales took."""

    adapter: Adapter
    scale: float
    originals: Mapping[str, nn.Parameter]


def attached(model: nn.Module) -> dict[str, Attachment]:
    """What is attached to the model by name, in order of attachment."""
    return dict(model.__dict__.get(RECORD, {}))


def base_spec(model: nn.Module) -> FluxSpec:
    """The sizes of the model without any adapter: a Control LoRA's wider input layer does not count."""
    layer = linear_layers(model).get(INPUT_LAYER)
    if layer is None:
        raise _not_swapped([INPUT_LAYER])
    config = cast(Mapping[str, Any], model.config)
    return FluxSpec.from_config({**config, "in_channels": layer.packed.shape[1]})


def attach(
    model: nn.Module, adapter: Adapter, name: str, scale: float = 1.0, text_encoders: TextEncoders | None = None
) -> None:
    """Attach an adapter under a name. A Control LoRA also widens the input layer and replaces norm scales.

    An adapter with terms for text encoders needs those encoders, by their diffusers names, here and in `set_scale` and
    `detach`: {"text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}.
    """
    layers = linear_layers(model)
    spec = base_spec(model)
    texts = text_targets(adapter, text_encoders or {})
    _check(model, [*layers.values(), *(layer for layer, _ in texts)], spec, adapter, name)
    _check_terms(model, layers, adapter)
    _check_scale(adapter, name, scale)
    width = max(layers[INPUT_LAYER].in_features, adapter.input_channels or 0)
    # built on the device first: an allocation that fails leaves the model as it was
    low_ranks = {target: _low_rank(layers[target], term, name, scale) for target, term in adapter.terms.items()}
    text_low_ranks = [(layer, _low_rank(layer, term, name, scale)) for layer, term in texts]
    if INPUT_LAYER in low_ranks:
        low_ranks[INPUT_LAYER] = low_ranks[INPUT_LAYER].widened(width)
    control.set_input_width(model, layers[INPUT_LAYER], width)
    for target, low_rank in low_ranks.items():
        layers[target].add(low_rank)
    for layer, low_rank in text_low_ranks:
        layer.add(low_rank)
    originals = control.replace_norms(model, adapter.replacements)
    _remember(model, {**attached(model), name: Attachment(adapter, scale, originals)})


def detach(model: nn.Module, name: str, text_encoders: TextEncoders | None = None) -> Adapter:
    """Take an adapter off; the model is then as if it had never been there. Hands the adapter back."""
    layers = linear_layers(model)
    record, targets = _find(model, layers, name, text_encoders)
    for layer, _ in targets:
        layer.remove(name)
    control.restore_norms(model, record.originals)
    others = {other: attachment for other, attachment in attached(model).items() if other != name}
    _remember(model, others)
    widths = [attachment.adapter.input_channels or 0 for attachment in others.values()]
    control.set_input_width(model, layers[INPUT_LAYER], max([layers[INPUT_LAYER].packed.shape[1], *widths]))
    return record.adapter


def set_scale(model: nn.Module, name: str, scale: float, text_encoders: TextEncoders | None = None) -> None:
    """Change an adapter's strength from the next call on. Norm scales that it replaced stay replaced."""
    record, targets = _find(model, linear_layers(model), name, text_encoders)
    _check_scale(record.adapter, name, scale)
    for layer, term in targets:
        layer.set_scale(name, scale * term.multiplier)
    _remember(model, {**attached(model), name: replace(record, scale=scale)})


def _low_rank(layer: QuantLinear, term: LowRankTerm, name: str, scale: float) -> LowRank:
    low_rank = LowRank(name, term.down, term.up, scale * term.multiplier, term.bias)
    low_rank.move(layer.packed.device)
    return low_rank


def _remember(model: nn.Module, records: Mapping[str, Attachment]) -> None:
    if records:
        setattr(model, RECORD, dict(records))
    else:
        model.__dict__.pop(RECORD, None)


def _find(
    model: nn.Module, layers: Mapping[str, QuantLinear], name: str, text_encoders: TextEncoders | None
) -> tuple[Attachment, list[tuple[QuantLinear, LowRankTerm]]]:
    """The record of an adapter all of whose terms are still in place, and each of them with its layer."""
    records = attached(model)
    if name not in records:
        raise AdapterError(
            f"No adapter called {name!r} is attached.",
            f"Attached: {', '.join(records) or 'none'}.",
            "Use one of the attached names.",
        )
    adapter = records[name].adapter
    lost = [target for target in adapter.terms if target not in layers or name not in layers[target].names()]
    texts = text_targets(adapter, text_encoders or {})
    lost += ["the text encoders" for layer, _ in texts if name not in layer.names()]
    if lost:
        raise AdapterError(
            f"Parts of the adapter {name!r} are gone from the model, such as the one of {lost[0]!r}.",
            "Something removed terms from single layers, or replaced layers, since the adapter was attached.",
            "Load the model again.",
        )
    return records[name], [*((layers[target], term) for target, term in adapter.terms.items()), *texts]


# checks


def _check(model: nn.Module, layers: list[QuantLinear], spec: FluxSpec, adapter: Adapter, name: str) -> None:
    taken = name in attached(model) or any(name in layer.names() for layer in layers)
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
        shared = [parameter for parameter in adapter.replacements if parameter in record.originals]
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
