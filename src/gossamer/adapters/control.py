"""What a Control LoRA does besides its terms and norm scales: a wider input layer, and its undoing.

FLUX.1-Canny-dev-lora reads 128 channels where the model reads 64: noisy latents, then the latents of the control
picture. The stored weight of the input layer keeps its bytes; zero columns are added when it is decoded, so terms of
either width fit: a narrower `down` gets zero columns too.
"""

from __future__ import annotations

from typing import Any, cast

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
