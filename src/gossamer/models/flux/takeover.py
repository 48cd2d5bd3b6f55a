"""From diffusers' transformer to ours: the same layers and parameters in another forward, nothing copied."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import nn

from gossamer.errors import InvalidOptionError, WrongModelError
from gossamer.models.flux.transformer import FluxTransformer
from gossamer.models.flux_spec import FluxSpec, linear_shapes, norm_shapes
from gossamer.models.swap import linear_layers


def from_diffusers(model: Any) -> FluxTransformer:
    """Our forward around the layers of a `diffusers.FluxTransformer2DModel`.

    Linears, swapped ones included, and norm scales are shared with `model`, not copied. What our forward would lose is
    refused: hooks, another attention, fused projections, IP adapters and attached adapters.
    """
    _require_plain(model)
    with torch.device("meta"):
        ours: FluxTransformer = FluxTransformer.from_config(model.config)
    spec = FluxSpec.from_config(ours.config)
    for name in linear_shapes(spec):
        _put(ours, name, model.get_submodule(name))
    for name in norm_shapes(spec):
        _put(ours, name, model.get_parameter(name))
    _require_total(model, ours)
    return ours.train(model.training)


def _put(model: nn.Module, name: str, part: nn.Module | nn.Parameter) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, part)


def _require_plain(model: Any) -> None:
    if not isinstance(model, FluxTransformer2DModel):
        raise WrongModelError(
            f"A {type(model).__name__} cannot be taken over.",
            "Only diffusers' FluxTransformer2DModel has the layers that our forward runs.",
            "Give the model itself, not a compiled or wrapped one.",
        )
    obstacles = [obstacle for check in (_hook, _other_attention, _attached) if (obstacle := check(model))]
    if obstacles:
        raise InvalidOptionError(
            "The transformer cannot be taken over as it is.",
            f"{'; '.join(obstacles)}; a forward of our own would lose that.",
            "Take it over as it was loaded, and make such changes to the result.",
        )


def _hook(model: Any) -> str | None:
    layers = linear_layers(model)
    for name, child in model.named_modules():
        # the hooks of a linear go along with it
        is_linear = isinstance(child, nn.Linear) or name in layers
        if not is_linear and (child._forward_hooks or child._forward_pre_hooks or "forward" in vars(child)):
            return f"{f'Its {name!r}' if name else 'It'} carries hooks or a replaced forward"
    return None


def _other_attention(model: Any) -> str | None:
    for name, processor in model.attn_processors.items():
        if type(processor) is not FluxAttnProcessor or processor._attention_backend is not None:
            return f"Its {name!r} is not the default one"
    return None


def _attached(model: Any) -> str | None:
    names = {name for layer in linear_layers(model).values() for name in layer.names()}
    names |= set(getattr(model, "peft_config", {}))
    return f"It has adapters attached: {', '.join(sorted(names))}" if names else None


def _require_total(model: Any, ours: nn.Module) -> None:
    """Both models hold the same tensors under the same names."""
    theirs, taken = dict(model.state_dict(keep_vars=True)), dict(ours.state_dict(keep_vars=True))
    different = [name for name in {**theirs, **taken} if theirs.get(name) is not taken.get(name)]
    if different:
        raise WrongModelError(
            "The transformer holds weights that FLUX.1 does not have, or lacks some.",
            f"{len(different)} differ, such as {different[0]!r}.",
            "Take it over before projections are fused or IP adapters loaded.",
        )
