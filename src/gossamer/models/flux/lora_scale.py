"""`joint_attention_kwargs`: the one entry that FLUX pipelines use is `scale`, the strength of adapters held by PEFT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from gossamer.errors import InvalidOptionError, UnknownOptionError


@contextmanager
def lora_scale(model: nn.Module, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """All PEFT adapters of the model times `scale` inside; entries that nothing reads are refused."""
    scale = float(kwargs.get("scale", 1.0))
    _require_known(kwargs)
    if scale == 1.0:
        yield
        return
    _require_peft(model)
    from diffusers.utils import scale_lora_layers, unscale_lora_layers  # type: ignore[attr-defined]

    scale_lora_layers(model, scale)
    try:
        yield
    finally:
        unscale_lora_layers(model, scale)


def _require_known(kwargs: Mapping[str, Any]) -> None:
    unknown = sorted(set(kwargs) - {"scale"})
    if unknown:
        raise UnknownOptionError(
            f"joint_attention_kwargs holds {', '.join(unknown)}.",
            "This transformer reads `scale` only; IP adapters are not supported.",
            "Leave it out, or use diffusers' own transformer.",
        )


def _require_peft(model: nn.Module) -> None:
    if not getattr(model, "peft_config", None):
        raise InvalidOptionError(
            "joint_attention_kwargs holds a scale, but no adapter that it applies to.",
            "It is the strength of adapters that diffusers attached through PEFT.",
            "Use set_scale for adapters that Gossamer attached, or leave it out.",
        )
