"""Make adapters part of the stored weights, say how much of them survives, and take them out again bit for bit.

    fused weight = pack(W + sum_i scale_i * delta_i)    in the layer's own storage format, W = unpack(stored)
    fused bias   = bias + sum_i scale_i * bias_i        in float32, so nothing of it is lost

Norms that an adapter changes stay changed. The original weights go to host memory, from where `unfuse` brings them
back. An attached adapter leaves the stored weights alone, which is exact in every format and needs none of this.

Adapters that stay attached act on the fused weight as they did before. DoRA alone depends on the weight that it is
attached to: beside one that is to stay, nothing is fused, and one that is attached later takes the fused weight for its
base. Weights are packed once, from the originals: what is to be fused is fused in one call.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from gossamer.adapters.adapter import TRANSFORMER
from gossamer.adapters.attach import attach, detach
from gossamer.adapters.fuse_layers import LayerFuser, Original, restore
from gossamer.adapters.fuse_report import FuseReport
from gossamer.adapters.records import Attachment, attached
from gossamer.adapters.text_encoders import TextEncoders, text_targets
from gossamer.errors import AdapterError
from gossamer.formats import find_format
from gossamer.layers import Decomposed, QuantLinear
from gossamer.models.swap import linear_layers

RECORD = "fused_adapters"

Place = tuple[str, str]  # component, and the dotted name in it


@dataclass(frozen=True, eq=False)
class Fusion:
    """What is fused into a model, by name; originals by layer, None where they were not kept, and of norms."""

    adapters: Mapping[str, Attachment]
    layers: Mapping[str, Original] | None
    norms: Mapping[Place, nn.Parameter]


def fused_adapters(model: nn.Module) -> dict[str, float]:
    """Scale of each fused adapter by name."""
    fusion = _fusion(model)
    return {} if fusion is None else {name: record.scale for name, record in fusion.adapters.items()}


@torch.no_grad()
def fuse(
    model: nn.Module,
    names: Iterable[str],
    text_encoders: TextEncoders | None = None,
    keep_originals: bool = True,
) -> FuseReport:
    """Fuse attached adapters, at the scales that they have, into the weights of every layer that they change.

    A warning is given where little of them survives. Without originals there is no way back but to load the model
    again. After an error everything is as it was.
    """
    parts = _parts(model, text_encoders)
    chosen = _chosen(model, names)
    everything = _layers(parts)
    layers = {place: layer for place, layer in everything.items() if set(layer.names()) & set(chosen)}
    _check(model, layers, chosen, text_encoders or {})
    work = LayerFuser(everything, {name: record.adapter for name, record in chosen.items()})
    detached: list[str] = []
    try:
        fidelities = {place: work.fuse(place) for place in layers}
        changed = _parameters(parts, _changed_norms(chosen))
        for name in chosen:
            detach(model, name, text_encoders)
            detached.append(name)
        norms = _put_norms(parts, changed)
    except BaseException:
        work.undo()
        for name in detached:
            attach(model, chosen[name].adapter, name, chosen[name].scale, text_encoders)
        raise
    model.__dict__[RECORD] = Fusion(chosen, work.originals if keep_originals else None, norms)
    _join_groups(model, layers.values())
    report = FuseReport(
        {name: record.scale for name, record in chosen.items()},
        {place: fidelity for place, fidelity in fidelities.items() if fidelity is not None},
        work.original_bytes if keep_originals else 0,
        sum(record.cost.total_bytes for record in chosen.values()),
    )
    if report.warning:
        warnings.warn(report.warning, stacklevel=2)
    return report


@torch.no_grad()
def unfuse(model: nn.Module, text_encoders: TextEncoders | None = None) -> tuple[str, ...]:
    """Give every layer its original bytes, and attach the adapters again, after what is attached now; their names."""
    fusion, parts = _fusion(model), _parts(model, text_encoders)
    layers = _layers(parts)
    _check_way_back(model, fusion, layers, text_encoders or {})
    assert fusion is not None
    assert fusion.layers is not None
    for place, original in fusion.layers.items():
        restore(layers[place], original)
    _put_norms(parts, fusion.norms)
    del model.__dict__[RECORD]
    for name, record in fusion.adapters.items():
        attach(model, record.adapter, name, record.scale, text_encoders)
    _join_groups(model, [layers[place] for place in fusion.layers])
    return tuple(fusion.adapters)


def _join_groups(model: nn.Module, changed: Iterable[QuantLinear]) -> None:
    """Stored bytes of linears that run as one lie side by side again."""
    if any(layer.execution is not None for layer in changed):
        from gossamer.models.flux.prepare import join_groups

        join_groups(model)


# norms ----------------------------------------------------------------------------------------------------------------


def _changed_norms(records: Mapping[str, Attachment]) -> set[Place]:
    """The parameters of norms that attached adapters change."""
    return {
        (component, name)
        for record in records.values()
        for component, change in record.norms.items()
        for name in change.originals
    }


def _parameters(parts: Mapping[str, nn.Module], places: Iterable[Place]) -> dict[Place, nn.Parameter]:
    return {(component, name): parts[component].get_parameter(name) for component, name in places}


def _put_norms(parts: Mapping[str, nn.Module], parameters: Mapping[Place, nn.Parameter]) -> dict[Place, nn.Parameter]:
    """Put parameters in place, on the device and in the type of those that are there; hands those back."""
    there = _parameters(parts, parameters)
    for (component, name), parameter in parameters.items():
        parameter.data = parameter.data.to(there[component, name])
        owner, _, attribute = name.rpartition(".")
        setattr(parts[component].get_submodule(owner), attribute, parameter)
    return there


# places ---------------------------------------------------------------------------------------------------------------


def _parts(model: nn.Module, text_encoders: TextEncoders | None) -> dict[str, nn.Module]:
    return {TRANSFORMER: model, **(text_encoders or {})}


def _place(component: str, name: str) -> str:
    return name if component == TRANSFORMER else f"{component}.{name}"


def _layers(parts: Mapping[str, nn.Module]) -> dict[str, QuantLinear]:
    """Every QuantLinear by place."""
    found = {component: linear_layers(part) for component, part in parts.items()}
    return {_place(component, name): layer for component, of in found.items() for name, layer in of.items()}


def _fusion(model: nn.Module) -> Fusion | None:
    fusion: Fusion | None = model.__dict__.get(RECORD)
    return fusion


# checks ---------------------------------------------------------------------------------------------------------------


def _chosen(model: nn.Module, names: Iterable[str]) -> dict[str, Attachment]:
    there, names = attached(model), list(dict.fromkeys(names))
    missing = [name for name in names if name not in there]
    if missing or not names:
        raise AdapterError(
            f"No adapter called {missing[0]!r} is attached." if missing else "There is nothing to fuse.",
            f"Attached: {', '.join(there) or 'none'}.",
            "Use one of the attached names." if there else "Attach an adapter first.",
        )
    return {name: record for name, record in there.items() if name in names}


def _check(
    model: nn.Module, layers: Mapping[str, QuantLinear], chosen: Mapping[str, Attachment], encoders: TextEncoders
) -> None:
    """Everything that can be known before the first weight is touched."""
    for record in chosen.values():
        text_targets(record.adapter, encoders)  # raises where the encoders are missing
    _require_unfused(model)
    for place, layer in layers.items():
        _require_repacking(place, layer)
        _require_no_dora_beside(place, layer, chosen)
    _require_norms_alone(model, chosen)


def _require_unfused(model: nn.Module) -> None:
    there = fused_adapters(model)
    if there:
        raise AdapterError(
            f"{', '.join(map(repr, there))} is fused into this model already.",
            "A weight is packed once, from its original: packing what was packed would round a second time.",
            "Call unfuse() first, then fuse everything in one call.",
        )


def _require_repacking(place: str, layer: QuantLinear) -> None:
    """The layer's weight may be packed and replaced."""
    found = find_format(layer.stored.format.name)
    why = None
    if not found.packs:
        why = f"It is stored as {found.name}, which can be read but not packed."
    elif layer.stored.slot is not None:
        why = "Its weight is streamed from host memory."
    if why is not None:
        raise AdapterError(
            f"Nothing can be fused into the layer {place!r}.",
            why,
            "Keep the adapter attached, which is exact in every format"
            + (", or fuse it before the weights are placed." if layer.stored.slot is not None else "."),
        )


def _require_no_dora_beside(place: str, layer: QuantLinear, chosen: Mapping[str, Attachment]) -> None:
    """A DoRA that stays would act on another weight than the one that it acts on now."""
    stays = [term.name for term in layer.adapters() if isinstance(term, Decomposed) and term.name not in chosen]
    if stays:
        raise AdapterError(
            f"{', '.join(map(repr, chosen))} cannot be fused while {stays[0]!r} stays attached.",
            f"{stays[0]!r} is a DoRA: its effect on {place!r} depends on the weight under it, which would change.",
            f"Fuse {stays[0]!r} too, in the same call, or detach it first.",
        )


def _require_norms_alone(model: nn.Module, chosen: Mapping[str, Attachment]) -> None:
    """A norm that another adapter changes too has no value of its own that could stay."""
    others = {name: record for name, record in attached(model).items() if name not in chosen}
    shared = _changed_norms(chosen) & _changed_norms(others)
    if shared:
        raise AdapterError(
            f"{', '.join(map(repr, chosen))} cannot be fused while {', '.join(map(repr, others))} stays attached.",
            f"Both change the norm {min(shared)[1]!r}.",
            "Fuse them in the same call, or detach what is not to be fused first.",
        )


def _check_way_back(
    model: nn.Module, fusion: Fusion | None, layers: Mapping[str, QuantLinear], encoders: TextEncoders
) -> None:
    if fusion is None:
        raise AdapterError("Nothing is fused into this model.", "unfuse undoes fuse.", "Call fuse first.")
    if fusion.layers is None:
        raise AdapterError(
            "The weights cannot be brought back.",
            f"{', '.join(map(repr, fusion.adapters))} was fused without keeping the originals.",
            "Load the model again.",
        )
    for record in fusion.adapters.values():
        text_targets(record.adapter, encoders)
    there = attached(model)
    taken = [name for name in fusion.adapters if name in there]
    taken += [name for name, record in there.items() if _changed_norms({name: record}) & set(fusion.norms)]
    lost = [place for place in fusion.layers if place not in layers or layers[place].stored.slot is not None]
    if taken or lost:
        raise AdapterError(
            "The weights cannot be brought back as things are.",
            f"The adapter {taken[0]!r} was attached since; a fused one has that name, or changes the same norms."
            if taken
            else f"The layer {lost[0]!r} is gone, or streamed from host memory.",
            f"Detach {taken[0]!r} first." if taken else "Load the model again.",
        )
