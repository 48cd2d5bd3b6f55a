"""Swap every linear of a torch module for a QuantLinear, in place, and say exactly what was packed and what was not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from gossamer.errors import GossamerError, InvalidOptionError, UnknownOptionError
from gossamer.formats import find_format, find_packing_format, pack, plain
from gossamer.layers import QuantLinear, StoredWeight

SWAPPABLE = (nn.Linear, NonDynamicallyQuantizableLinear)


@dataclass(frozen=True)
class QuantizeReport:
    """What `quantize` did: storage by layer, the reason by layer that was kept, and exact bytes of the whole module."""

    packed: Mapping[str, str]
    kept: Mapping[str, str]
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class _Pack:
    """Store this layer in a format."""

    storage: str


@dataclass(frozen=True)
class _Hold:
    """Make this layer a QuantLinear around the weight as it is."""

    reason: str


@dataclass(frozen=True)
class _Leave:
    """Do not touch this module."""

    reason: str


_Plan = _Pack | _Hold | _Leave


def linear_layers(module: nn.Module) -> dict[str, QuantLinear]:
    """Every QuantLinear of a module by dotted name; one that is reachable by two names appears under both."""
    found: dict[str, QuantLinear] = {}
    _find_linears(module, "", found)
    return found


def _find_linears(module: nn.Module, name: str, found: dict[str, QuantLinear]) -> None:
    """A walk of our own: torch's hands each name through a generator a level, and enters what linears are made of."""
    if isinstance(module, QuantLinear):
        found[name] = module
        return
    prefix = f"{name}." if name else ""
    for child, part in module._modules.items():
        if part is not None:
            _find_linears(part, prefix + child, found)


def weight_bytes(module: nn.Module) -> int:
    """Exact bytes of all parameters, buffers, packed weights and attached adapters; what is shared counts once."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    for layer in linear_layers(module).values():
        tensors |= {id(tensor): tensor for low_rank in layer.adapters() for tensor in low_rank.tensors()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def quantize(
    module: nn.Module,
    storage: str | Mapping[str, str],
    skip: str | Iterable[str] = (),
    compute: torch.dtype | None = None,
) -> QuantizeReport:
    """Replace every linear inside `module` by a QuantLinear, one layer at a time, freeing each original at once.

    `storage` is one format, or formats by pattern of dotted name, where the first pattern that fits decides. `skip` is
    one pattern, or several, of layers to keep in their own type. Those, and layers whose width does not fit the format,
    become QuantLinears around the unchanged weight, so that adapters attach to them too. `compute` is the type of the
    products of packed layers: by default float32 on a CPU, the weight's own type elsewhere.

    Names and formats are checked before anything is touched. A weight that cannot be packed (NaN) stops the work with
    the layers before it swapped; load such a model again.
    """
    linears = _linears(module)
    shared = _parameters_outside_linears(module)
    plans = _plans(linears, storage, (skip,) if isinstance(skip, str) else tuple(skip), shared)
    bytes_before = weight_bytes(module)
    _carry_out(module, linears, plans, compute)
    return QuantizeReport(
        packed={name: plan.storage for name, plan in plans.items() if isinstance(plan, _Pack)},
        kept={name: plan.reason for name, plan in plans.items() if not isinstance(plan, _Pack)},
        bytes_before=bytes_before,
        bytes_after=weight_bytes(module),
    )


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    if isinstance(module, (nn.Linear, QuantLinear)):
        raise InvalidOptionError(
            "A single linear layer cannot be quantised in place.",
            "Its parent has to hold the replacement.",
            "Quantise the module that contains it, or build QuantLinear(pack(weight, storage), bias).",
        )
    done = next(iter(linear_layers(module)), None)
    if done is not None:
        raise InvalidOptionError(
            "This module is already quantised.",
            f"{done!r} is a QuantLinear; packing its decoded weight again would add a second rounding.",
            "Load the model again and quantise it once, with one pattern per format if layers are to differ.",
        )
    named = module.named_modules(remove_duplicate=False)
    return {name: child for name, child in named if isinstance(child, nn.Linear)}


def _parameters_outside_linears(module: nn.Module) -> dict[int, str]:
    """Name of the owner of each parameter that a module other than a linear holds, by the parameter's id."""
    return {
        id(parameter): name
        for name, child in module.named_modules()
        if not isinstance(child, nn.Linear)
        for parameter in child.parameters(recurse=False)
    }


# what to do with each layer, decided before anything is touched


def _plans(
    linears: Mapping[str, nn.Linear], storage: str | Mapping[str, str], skip: tuple[str, ...], shared: Mapping[int, str]
) -> dict[str, _Plan]:
    by_pattern = {"*": storage} if isinstance(storage, str) else storage
    formats = {pattern: find_packing_format(name).name for pattern, name in by_pattern.items()}
    for pattern in (*skip, *(() if isinstance(storage, str) else formats)):
        _require_match(pattern, linears)
    return {name: _plan(name, layer, formats, skip, shared) for name, layer in linears.items()}


def _require_match(pattern: str, linears: Mapping[str, nn.Linear]) -> None:
    if any(fnmatchcase(name, pattern) for name in linears):
        return
    nearest = get_close_matches(pattern, linears, n=3, cutoff=0.3)
    raise UnknownOptionError(
        f"No linear layer is called {pattern!r}.",
        f"The module has {len(linears)} linear layers" + (f"; nearest: {', '.join(nearest)}." if nearest else "."),
        "Give a full dotted name, or a pattern such as '*.norm*.linear'.",
    )


def _plan(
    name: str, layer: nn.Linear, formats: Mapping[str, str], skip: tuple[str, ...], shared: Mapping[int, str]
) -> _Plan:
    obstacle = _obstacle(layer, shared)
    if obstacle:
        return _Leave(obstacle)
    skipped_by = next((pattern for pattern in skip if fnmatchcase(name, pattern)), None)
    if skipped_by is not None:
        return _Hold(f"skipped by {skipped_by!r}")
    storage = next((chosen for pattern, chosen in formats.items() if fnmatchcase(name, pattern)), None)
    if storage is None:
        return _Hold("no storage pattern fits its name")
    multiple = find_format(storage).width_multiple
    if layer.in_features % multiple:
        return _Hold(f"{layer.in_features} input features are not a multiple of {multiple}, as {storage} needs")
    return _Pack(storage)


def _obstacle(layer: nn.Linear, shared: Mapping[int, str]) -> str | None:
    """Why this module must stay exactly what it is, or None."""
    if type(layer) not in SWAPPABLE:
        return f"{type(layer).__name__} is not a plain nn.Linear; a swap could lose what it adds"
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return "it carries hooks or a replaced forward, which a swap would lose"
    if id(layer.weight) in shared:
        return f"its weight is shared with {shared[id(layer.weight)]!r}"
    if layer.weight.dtype not in plain.DTYPES.values():
        return f"its weight is {layer.weight.dtype}"
    return None


# doing it


def _carry_out(
    module: nn.Module, linears: dict[str, nn.Linear], plans: Mapping[str, _Plan], compute: torch.dtype | None
) -> None:
    """Swap layer by layer; `linears` is emptied on the way so that nothing here keeps an original alive.

    The ids of layers and weights are safe keys: all originals were alive together, so no two ever had the same one.
    """
    swapped: dict[int, QuantLinear] = {}
    stored: dict[tuple[int, str], StoredWeight] = {}
    for name, plan in plans.items():
        layer = linears.pop(name)
        if isinstance(plan, _Leave):
            continue
        if id(layer) not in swapped:
            key = (id(layer.weight), plan.storage if isinstance(plan, _Pack) else "held")
            stored[key] = stored.get(key) or _store(name, layer.weight, plan)
            swapped[id(layer)] = _replacement(layer, stored[key], plan, compute)
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, swapped[id(layer)])


def _store(name: str, weight: torch.Tensor, plan: _Pack | _Hold) -> StoredWeight:
    if isinstance(plan, _Hold):
        return StoredWeight(plain.hold(weight))
    try:
        return StoredWeight(pack(weight, plan.storage))
    except GossamerError as error:
        raise type(error)(f"Layer {name!r}: {error.what}", error.why, error.next_step) from error


def _replacement(
    layer: nn.Linear, stored: StoredWeight, plan: _Pack | _Hold, compute: torch.dtype | None
) -> QuantLinear:
    own = layer.weight.dtype
    default = torch.float32 if layer.weight.device.type == "cpu" else own
    chosen = own if isinstance(plan, _Hold) else compute or default
    return QuantLinear(stored, layer.bias, chosen).train(layer.training)
