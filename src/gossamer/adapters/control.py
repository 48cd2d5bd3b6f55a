"""What a Control LoRA does besides low-rank terms: a wider input layer and replaced norm scales, and their undoing.

FLUX.1-Canny-dev-lora reads 128 channels where the model reads 64: noisy latents, then the latents of the control
picture. The stored weight of the input layer keeps its bytes; zero columns are added when it is decoded, so terms of
either width fit: a narrower `down` gets zero columns too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from gossamer.layers import QuantLinear


def set_input_width(model: nn.Module, layer: QuantLinear, width: int) -> None:
    """Make the input layer read `width` channels, its attached terms included, and let the model's config say so."""
    if width == layer.in_features:
        return
    terms = [layer.remove(name) for name in layer.names()]
    layer.widen(width)
    for term in terms:
        layer.add(term.widened(width))
    cast(Any, model).register_to_config(in_channels=width)


def replace_norms(model: nn.Module, replacements: Mapping[str, torch.Tensor]) -> dict[str, nn.Parameter]:
    """Put other values in the place of norm scales, in their type and on their device; hands back the originals."""
    originals = {}
    for name, values in replacements.items():
        original = model.get_parameter(name)
        originals[name] = original
        _set_parameter(model, name, nn.Parameter(values.to(original).clone(), requires_grad=original.requires_grad))
    return originals


def restore_norms(model: nn.Module, originals: Mapping[str, nn.Parameter]) -> None:
    """Put the original parameters back; they follow the model if it was moved or cast meanwhile."""
    for name, original in originals.items():
        original.data = original.data.to(model.get_parameter(name))
        _set_parameter(model, name, original)


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(module), attribute, parameter)
