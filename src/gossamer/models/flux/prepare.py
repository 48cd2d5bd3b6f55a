"""Puts kernels and libraries under a FLUX transformer, on the device that it is on, with the reasons for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

from torch import nn

from gossamer.kernels.backends import attention_backend
from gossamer.kernels.capability import Capability
from gossamer.kernels.choice import Choice
from gossamer.kernels.detect import detect
from gossamer.kernels.rehearsal import hashed_meanwhile
from gossamer.kernels.wishes import require_attention_wish
from gossamer.layers import Buffers, LinearGroup
from gossamer.models.execute import TYPES, execute, pointwise_functions
from gossamer.models.flux.blocks import DoubleBlock, SingleBlock
from gossamer.models.flux.cuda_graphs import CudaGraphs
from gossamer.models.flux.graph import GraphedSteps
from gossamer.models.flux.operators import Operators, attention_through
from gossamer.models.flux.rehearsal import FirstStep, unrehearsed
from gossamer.models.flux.step import run_step
from gossamer.models.flux.transformer import FluxTransformer
from gossamer.models.flux_spec import SENSITIVE, is_modulation
from gossamer.models.swap import linear_layers


@dataclass(frozen=True)
class Prepared:
    """What was chosen: for each linear by name, for pointwise functions and attention, and whether steps are replayed.

    `graphs` says so in words; what happened to each step is in the `tally` of the model's stepper.
    """

    choices: Mapping[str, Choice]
    pointwise: str
    attention: str
    graphs: str

    def kinds(self) -> list[Choice]:
        """The different choices, in the order of the layers."""
        return list(dict.fromkeys(self.choices.values()))


def prepare(
    model: FluxTransformer,
    wish: str = "auto",
    capability: Capability | None = None,
    keeps_merged: bool = False,
    graphs: bool = True,
    attention: str = "auto",
    buffers: Buffers | None = None,
) -> Prepared:
    """Choose for every linear, pointwise function and attention, and put the choice into the model.

    With `graphs`, repeated steps on an NVIDIA GPU are captured once and then replayed (see `graph`). `attention` is
    "auto" or "exact": whether its operands may be rounded to eight bits (see `kernels.backends`), which "auto" does in
    models whose blocks multiply in fp8 anyway. Where there are kernels to compile, the first step is rehearsed (see
    `rehearsal`), and Triton hashes itself meanwhile. `buffers` are for decoded weights, where other models share them.

    Call it after the linears were packed and moved, and again after a move: stored bytes of linears that run as one
    are put side by side. `capability` is that of the model's device by default.
    """
    device = next(model.parameters()).device
    capability = detect(device) if capability is None else capability
    head_dim = int(model.config["attention_head_dim"])
    require_attention_wish(attention)
    wish_of, pointwise = partial(_wish, wish=wish), pointwise_functions(capability)
    compiles = pointwise.name == "triton"
    with hashed_meanwhile() if compiles else nullcontext():
        choices = execute(model, capability, wish_of, keeps_merged, head_dim, attention, is_modulation, buffers)
        activations, compute = _activations(model, choices), _products(model, _groups(model))
        picked = attention_backend(capability, activations, head_dim, compute=compute, wish=attention).name
        model.operators = Operators(pointwise, attention_through(picked))
        join_groups(model)
        _enroll(model)
    model.rehearsal = FirstStep() if compiles else unrehearsed
    why_not = _no_graphs(capability, graphs)
    model.stepper = GraphedSteps(CudaGraphs()) if why_not is None else run_step
    return Prepared(choices, pointwise.name, picked, "on" if why_not is None else f"off: {why_not}")


def join_groups(model: nn.Module) -> None:
    """Put the stored bytes of linears that run as one side by side; to be called again after any got other bytes."""
    for group in _groups(model):
        group.join()


def forget_groups(model: nn.Module) -> None:
    """Have no group hold on to the bytes that it has now; to be called before any of them move."""
    for group in _groups(model):
        group.forget()


def _groups(model: nn.Module) -> list[LinearGroup]:
    blocks = (block for block in model.modules() if isinstance(block, (DoubleBlock, SingleBlock)))
    return [group for block in blocks for group in block.groups]


def _enroll(model: nn.Module) -> None:
    """Have operands made for the whole model at once."""
    together = {id(layer) for group in _groups(model) if group.enroll() for layer in group.layers}
    for layer in linear_layers(model).values():
        if id(layer) not in together:
            layer.enroll()


def _no_graphs(capability: Capability, wished: bool) -> str | None:
    """Why steps are not captured and replayed."""
    if not wished:
        return "it was asked for"
    return None if capability.kind == "cuda" else f"CUDA graphs are for NVIDIA GPUs, and this is {capability.chip}"


def _activations(model: FluxTransformer, choices: Mapping[str, Choice]) -> str:
    """The type between the layers, which is the model's own while nothing is packed."""
    own = {dtype: name for name, dtype in TYPES.items()}[model.dtype]
    return next((choice.activations for name, choice in choices.items() if "transformer_blocks." in name), own)


def _products(model: FluxTransformer, groups: Sequence[LinearGroup]) -> str:
    """The type in which the linears of the blocks multiply, or all of them by name."""
    names = {dtype: name for name, dtype in TYPES.items()}
    return " and ".join(sorted({names[group.rows_type(model.dtype)] for group in groups}))


def _wish(name: str, wish: str) -> str:
    """Eight-bit products are for the large linears of the blocks; an exact wish holds for all."""
    exact = is_modulation(name) or any(fnmatchcase(name, pattern) for pattern in SENSITIVE)
    return "exact" if exact and wish not in ("bf16", "fp16", "fp32") else wish
