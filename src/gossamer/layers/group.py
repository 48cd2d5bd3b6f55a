"""Linears of a model that read the same input, found by their places in it, so that they may be swapped at any time.

A block has its queries, keys and values (a single block its feed-forward part too) in one buffer that way. Layers that
have an execution, and the same one in kind, become one product of one operand; all others run one after the other, each
as exact as it is alone. On a CPU one product gains nothing (320 tokens, width 256, a single block's group: 2.7 ms
against 2.8 ms in four).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import ref

import torch
from torch import nn

from gossamer.formats import Packed
from gossamer.kernels.pointwise.backends import Pointwise
from gossamer.kernels.pointwise.rows import Rows
from gossamer.layers.execution import Execution
from gossamer.layers.join import Joined, join
from gossamer.layers.linear import QuantLinear
from gossamer.layers.product import GroupProduct, as_rows, execution_of


class LinearGroup:
    """Linears by place: pairs of a module and the name of its child.

    The modules are those that hold the group. It does not hold them, so that a model that nobody needs is gone, with
    all memory, and not only when Python next looks for cycles.
    """

    def __init__(self, *places: tuple[nn.Module, str]) -> None:
        self._places = _weak(places)
        self._product = GroupProduct()
        self._joined: Joined | None = None
        self._found: Found | None = None

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """The layers as they are now."""
        return tuple([module()._modules[name] for module, name in self._places])  # type: ignore[misc, union-attr]

    def __getstate__(self) -> dict[str, Any]:
        """For copies, whose modules are copied with them."""
        return {**self.__dict__, "_places": [(module(), name) for module, name in self._places], "_found": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._places = _weak(state["_places"])

    def rows_type(self, plain: torch.dtype) -> torch.dtype:
        """The type in which the input is best given: the operand's, or `plain`."""
        found = self._find()
        return plain if found.execution is None else found.execution.operand

    def rows(self, x: torch.Tensor, pointwise: Pointwise) -> Rows:
        """x (batch, tokens, in) as rows of that type."""
        return as_rows(x, self.rows_type(x.dtype), pointwise)

    def __call__(self, rows: Rows, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows (..., in) through every layer: (..., sum of outputs), into `out` where it is given, a view or not."""
        found = self._find()
        if found.execution is not None and rows.values.dtype == found.execution.operand:
            return self._product(cast(tuple[QuantLinear, ...], found.layers), rows, out, found.joined)
        return _one_by_one(found.layers, rows.values, out)

    @property
    def fuses_gelu(self) -> bool:
        """Whether `with_gelu` and `of_parts` serve: one product, whose operands are floats without scales."""
        execution = self._find().execution
        return execution is not None and not execution.rows_have_scales

    def with_gelu(self, rows: Rows, plain: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (..., in) to the first `plain` outputs of all layers as they are, and GELU of the others."""
        found = self._find()
        return self._product.with_gelu(cast(tuple[QuantLinear, ...], found.layers), rows.values, plain, found.joined)

    def of_parts(self, *parts: torch.Tensor) -> torch.Tensor:
        """What a single layer makes of parts (..., in_0), (..., in_1), ... as if they lay side by side: (..., out)."""
        layers = cast(tuple[QuantLinear, ...], self._find().layers)
        operand = execution_of(layers[0]).operand
        return self._product.of_parts(layers, [part.to(operand) for part in parts])

    def join(self) -> None:
        """Put the stored bytes of the layers side by side, where their format allows it: one call decodes all."""
        fused = _fused(self.layers)
        self._joined = None if fused is None or len(fused) == 1 else join(fused)
        self._found = None

    def enroll(self) -> bool:
        """Have the operand made together with those of all other products of the model; False where there is none."""
        found = self._find()
        if found.execution is not None:
            layers = cast(tuple[QuantLinear, ...], found.layers)
            self._product.enroll(layers, found.execution.workspace.terms, found.joined)
        return found.execution is not None

    @property
    def joined(self) -> Packed | None:
        """The stored bytes of all layers side by side, where they lie so and run as one."""
        joined = self._find().joined
        return None if joined is None else joined.packed

    def forget(self) -> None:
        """Drop what was made for the next products; it is made again when they come."""
        self._product.release()
        self._found = None

    def _find(self) -> Found:
        """What the layers are now; looked at closely only after something changed."""
        layers, found = self.layers, self._found
        if found is None or found.layers != layers or found.changed():
            fused = _fused(layers)
            execution = None if fused is None else execution_of(fused[0])
            lying = fused is not None and self._joined is not None and self._joined.holds(fused)
            joined = self._joined if lying else None
            structure = -1 if execution is None else execution.workspace.terms.structure
            found = self._found = Found(layers, execution, joined, structure)
        return found


def _weak(places: Iterable[tuple[nn.Module, str]]) -> tuple[tuple[ref[nn.Module], str], ...]:
    return tuple((ref(module), name) for module, name in places)


@dataclass(frozen=True, eq=False)
class Found:
    """The layers of a group as they were at a count of changes: what runs them as one, and their joined bytes."""

    layers: tuple[nn.Module, ...]
    execution: Execution | None
    joined: Joined | None
    structure: int

    def changed(self) -> bool:
        """Whether something may have changed since; always, where the layers have no execution to count changes."""
        return self.execution is None or self.execution.workspace.terms.structure != self.structure


def _fused(layers: Sequence[nn.Module]) -> Sequence[QuantLinear] | None:
    """The layers, if one product can serve them all."""
    first = layers[0]
    if not isinstance(first, QuantLinear) or first.execution is None:
        return None
    for layer in layers[1:]:
        if not isinstance(layer, QuantLinear) or layer.execution is None:
            return None
        if not first.execution.fits(layer.execution) or layer.in_features != first.in_features:
            return None
    return cast(Sequence[QuantLinear], layers)


def _one_by_one(layers: Sequence[nn.Module], x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    if len(layers) == 1 and out is None:
        only: torch.Tensor = layers[0](x)
        return only
    widths = [int(layer.out_features) for layer in layers]  # type: ignore[arg-type]
    out = x.new_empty(*x.shape[:-1], sum(widths)) if out is None else out
    if out.shape[-1] != sum(widths):
        raise ValueError(f"layers of {widths} outputs do not fill a buffer of {out.shape[-1]} columns")
    stop = 0
    for layer, width in zip(layers, widths, strict=True):
        start, stop = stop, stop + width
        out[..., start:stop] = layer(x)
    return out
