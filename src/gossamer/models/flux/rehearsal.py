"""The rehearsal of a model's first step: its kernels are compiled side by side before they are needed.

    model.rehearsal = unrehearsed      kernels are compiled one after the other, as they come
    model.rehearsal = FirstStep()      what `prepare` sets where there are kernels to compile

One block of each kind runs on tokens of its own, and the norm behind the last block. That asks for all kernels that see
tokens: they are the same for every block of a kind, and for most numbers of tokens. Those that decode weights run as
ever, since what they write may be kept.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any, Protocol

from torch import nn

from gossamer.kernels.operators import through_operator
from gossamer.kernels.rehearsal import rehearse
from gossamer.layers import QuantLinear
from gossamer.models.flux.blocks import DoubleBlock, SingleBlock
from gossamer.models.flux.modulation import DoubleVectors, SingleVectors
from gossamer.models.flux.seam import BlockState, Shared
from gossamer.models.flux.step import StepInputs

Part = tuple[nn.Module, DoubleVectors | SingleVectors]


class Rehearsal(Protocol):
    """What is called before the blocks of every step that is not replayed."""

    def __call__(self, model: Any, inputs: StepInputs, /) -> None:
        """Make ready what the step needs. Nothing that is given changes."""


def unrehearsed(model: Any, inputs: StepInputs) -> None:
    """Nothing is made ready."""


class FirstStep:
    """Rehearses the first step that it sees."""

    def __init__(self) -> None:
        self._done = False

    def __call__(self, model: Any, inputs: StepInputs) -> None:
        """Back when the kernels of the step are there, but for those of blocks that are streamed or not our own."""
        if self._done or through_operator(inputs.image):
            return
        self._done = True
        rehearse(lambda: _run(model, inputs), inputs.image.device)


def _run(model: Any, inputs: StepInputs) -> None:
    """One block of each kind, and the last norm, on tokens that nobody wrote."""
    batch, tokens = inputs.image.shape[0], inputs.text.shape[1] + inputs.image.shape[1]
    width = inputs.vectors.out.scale.shape[-1]
    own = BlockState(inputs.image.new_empty(batch, tokens, width), inputs.text.shape[1])
    shared = Shared(inputs.rotation, model.operators)
    for block, vectors in _one_of_each_kind(model, inputs):
        block(own, vectors, shared)
    model.operators.pointwise.norm_modulate(own.image, inputs.vectors.out, own.dtype)


def _one_of_each_kind(model: Any, inputs: StepInputs) -> Iterator[Part]:
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    vectors: list[DoubleVectors | SingleVectors] = [*inputs.vectors.double, *inputs.vectors.single]
    found: dict[Hashable, Part] = {}
    for block, own in zip(blocks, vectors, strict=True):
        if _can_run(block):
            kind = type(block), *(group.rows_type(inputs.image.dtype) for group in block.groups)
            found.setdefault(kind, (block, own))
    return iter(found.values())


def _can_run(block: nn.Module) -> bool:
    """Whether nothing but our own kernels sees what runs through a block, and its weights are there."""
    if type(block) not in (DoubleBlock, SingleBlock) or any(map(_is_watched, block.modules())):
        return False
    layers = [layer for group in block.groups for layer in group.layers]  # type: ignore[union-attr]
    return all(isinstance(layer, QuantLinear) and _is_ready(layer) for layer in layers)


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody else takes part in a forward, and might remember it."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._compiled_call_impl is not None
    return bool(hooked) or "forward" in vars(module)


def _is_ready(layer: QuantLinear) -> bool:
    return layer.execution is not None and layer.stored.slot is None
