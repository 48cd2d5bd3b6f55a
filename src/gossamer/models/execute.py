"""Gives every QuantLinear of a module what runs it on a device: a choice of `kernels.choice` made into an execution."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn

from gossamer.kernels.capability import Capability
from gossamer.kernels.choice import FLUX_HEAD_DIM, Choice, choose
from gossamer.kernels.pointwise.backends import TORCH, Pointwise, triton_functions
from gossamer.layers import Buffers, Execution, Workspace
from gossamer.models.swap import linear_layers

TYPES = {
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}


def execute(
    module: nn.Module,
    capability: Capability,
    wish: str | Callable[[str], str] = "exact",
    keeps_merged: bool = False,
    head_dim: int = FLUX_HEAD_DIM,
    attention: str = "auto",
    apart: Callable[[str], bool] = lambda _: False,
    buffers: Buffers | None = None,
) -> Mapping[str, Choice]:
    """Set the execution of every QuantLinear inside; the choice made for each, by its name.

    `wish` is a compute type or "auto" or "exact" (see `kernels.choice`), for all layers or by name, `attention` "auto"
    or "exact". `keeps_merged` spends memory on a second copy of weights that need no decoding, while adapters are
    attached. Layers that are `apart` by their names run at other times than the rest: their changes leave captured
    steps of the others valid. Modules that never run at the same time may share `buffers` for their decoded weights.
    """
    wish_of = wish if callable(wish) else lambda _: wish
    layers = linear_layers(module)
    choices = {}
    for name, layer in layers.items():
        shape = layer.out_features, layer.in_features
        choices[name] = choose(capability, layer.packed.format, wish_of(name), shape, head_dim, attention)
    pointwise, workspace = pointwise_functions(capability), Workspace(buffers)
    other = workspace.beside()
    # equal choices are one execution, so that a model has a handful of them
    known: dict[Execution, Execution] = {}
    for name, layer in layers.items():
        made = _execution(choices[name], pointwise, other if apart(name) else workspace, keeps_merged)
        layer.execution = known.setdefault(made, made)
    return choices


def pointwise_functions(capability: Capability) -> Pointwise:
    """The Triton kernels on NVIDIA GPUs where Triton is there, else the reference."""
    return triton_functions() if capability.kind == "cuda" and capability.triton is not None else TORCH


def _execution(choice: Choice, pointwise: Pointwise, workspace: Workspace, keeps_merged: bool) -> Execution:
    made = Execution(
        operand=TYPES[choice.compute],
        activations=TYPES[choice.activations],
        decode=choice.decode,  # type: ignore[arg-type]
        merge=choice.merge,  # type: ignore[arg-type]
        product=choice.product,
        pointwise=pointwise,
        workspace=workspace,
    )
    return replace(made, keeps_merged=keeps_merged and choice.decode == "none")
