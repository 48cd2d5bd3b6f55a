"""Puts kernels and libraries under a FLUX transformer, on the device that it is on, with the reasons for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

from gossamer.kernels.attention import attend
from gossamer.kernels.backends import attention_backend
from gossamer.kernels.capability import Capability
from gossamer.kernels.choice import Choice
from gossamer.kernels.detect import detect
from gossamer.models.execute import TYPES, execute, pointwise_functions
from gossamer.models.flux.blocks import DoubleBlock, SingleBlock
from gossamer.models.flux.operators import Operators
from gossamer.models.flux.transformer import FluxTransformer
from gossamer.models.flux_spec import SENSITIVE

# one row a step, so nothing is gained by eight bits there, and every block depends on them
MODULATION = "*.norm*.linear"


@dataclass(frozen=True)
class Prepared:
    """What was chosen: for each linear by name, and for all pointwise functions and attention."""

    choices: Mapping[str, Choice]
    pointwise: str
    attention: str

    def kinds(self) -> list[Choice]:
        """The different choices, in the order of the layers."""
        return list(dict.fromkeys(self.choices.values()))


def prepare(
    model: FluxTransformer,
    wish: str = "auto",
    capability: Capability | None = None,
    keeps_merged: bool = False,
) -> Prepared:
    """Choose for every linear, pointwise function and attention, and put the choice into the model.

    Call it after the linears were packed and moved, and again after a move: stored bytes of linears that run as one
    are put side by side. `capability` is that of the model's device by default.
    """
    device = next(model.parameters()).device
    capability = detect(device) if capability is None else capability
    head_dim = int(model.config["attention_head_dim"])
    choices = execute(model, capability, lambda name: _wish(name, wish), keeps_merged, head_dim)
    pointwise = pointwise_functions(capability)
    attention = attention_backend(capability, _activations(model, choices), head_dim).name
    model.operators = Operators(pointwise, partial(attend, backend=attention))
    for block in model.modules():
        if isinstance(block, (DoubleBlock, SingleBlock)):
            for group in block.groups:
                group.join()
    return Prepared(choices, pointwise.name, attention)


def _activations(model: FluxTransformer, choices: Mapping[str, Choice]) -> str:
    """The type between the layers, which is the model's own while nothing is packed."""
    own = {dtype: name for name, dtype in TYPES.items()}[model.dtype]
    return next((choice.activations for name, choice in choices.items() if "transformer_blocks." in name), own)


def _wish(name: str, wish: str) -> str:
    """Eight-bit products are for the large linears of the blocks; an exact wish holds for all."""
    exact = any(fnmatchcase(name, pattern) for pattern in (MODULATION, *SENSITIVE))
    return "exact" if exact and wish not in ("bf16", "fp16", "fp32") else wish
