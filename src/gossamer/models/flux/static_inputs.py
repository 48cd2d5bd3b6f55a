"""Inputs of a step that stay at their addresses: the values of each step are copied into them."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from gossamer.kernels.pointwise import Rotation
from gossamer.models.flux.modulation import each_vector, vectors_of
from gossamer.models.flux.step import StepInputs


def shapes_of(inputs: StepInputs) -> Hashable:
    """Equal for steps that run the same kernels: shapes, types, and which blocks share a residual."""
    first = inputs.vectors.out.scale
    tensors = (inputs.image, inputs.text, first, inputs.rotation.cos, *_distinct(inputs))
    return (*((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors), _pattern(inputs))


class StaticInputs:
    """A copy of the inputs of a step; all vectors lie in one tensor (batch, vectors * width)."""

    def __init__(self, inputs: StepInputs) -> None:
        vectors = vectors_of(inputs.vectors)
        self._vectors = torch.cat(vectors, dim=1)
        self._residuals = [residual.clone() for residual in _distinct(inputs)]
        views = iter(self._vectors.split([vector.shape[1] for vector in vectors], dim=1))
        self.inputs = StepInputs(
            inputs.image.clone(),
            inputs.text.clone(),
            each_vector(inputs.vectors, lambda _: next(views)),
            Rotation(inputs.rotation.cos.clone(), inputs.rotation.sin.clone()),
            [None if place is None else self._residuals[place] for place in _pattern(inputs)],
            inputs.branch,
        )

    def load(self, inputs: StepInputs) -> None:
        """Copy the values of another step of the same shapes."""
        torch.cat(vectors_of(inputs.vectors), dim=1, out=self._vectors)
        self.inputs.image.copy_(inputs.image)
        self.inputs.text.copy_(inputs.text)
        self.inputs.rotation.cos.copy_(inputs.rotation.cos)
        self.inputs.rotation.sin.copy_(inputs.rotation.sin)
        for own, given in zip(self._residuals, _distinct(inputs), strict=True):
            own.copy_(given)


def _distinct(inputs: StepInputs) -> list[torch.Tensor]:
    """The residuals, each once, in the order of blocks: a ControlNet's serve several blocks each."""
    return list({id(residual): residual for residual in inputs.residuals if residual is not None}.values())


def _pattern(inputs: StepInputs) -> tuple[int | None, ...]:
    """For each block the place of its residual among the distinct ones."""
    places = {id(residual): place for place, residual in enumerate(_distinct(inputs))}
    return tuple(None if residual is None else places[id(residual)] for residual in inputs.residuals)
