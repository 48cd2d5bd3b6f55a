"""Linears that read the same input as one product: y = [layer_0(x), layer_1(x), ...].

What an operand needs besides its decoding (stacked low-rank terms, row scales, the bias, a merged copy, launches) is
made once and kept until an adapter or the place of a layer changes. New scales are written into what is there. A
streamed weight comes to the same place each time, so all of that stays valid. Only merged copies are not kept of it:
they would be the memory that streaming saves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch

from gossamer.formats import Packed
from gossamer.kernels.operators import lasting
from gossamer.kernels.pointwise.backends import Pointwise
from gossamer.kernels.pointwise.rows import Rows
from gossamer.kernels.products import matmul_parts
from gossamer.layers.execution import Execution
from gossamer.layers.model_terms import Lift, ModelTerms
from gossamer.layers.multiply import multiply, multiply_gelu
from gossamer.layers.operand import (
    Keeper,
    Operand,
    Part,
    Writer,
    bias_of,
    codes_of,
    measure,
    merge,
    merged,
    needs_merging,
    plan,
    renew_bias,
    stored_as_operand,
)
from gossamer.layers.stacks import Stack, Wanted
from gossamer.layers.strength import Strength

if TYPE_CHECKING:
    from gossamer.layers.join import Joined
    from gossamer.layers.linear import QuantLinear


class GroupProduct:
    """The product of a group of layers, and what it keeps between calls; the layers hold it, or what holds them."""

    def __init__(self) -> None:
        self._held: tuple[ref[QuantLinear], ...] = ()
        self._joined: Joined | None = None
        self._model: ModelTerms | None = None
        self._structure = -1  # the model's count that the operand was last found valid at
        self._revisions: list[tuple[int, int, int]] | None = None
        self._operand: Operand | None = None
        self._writer: Writer | None = None
        self._keeper: Keeper | None = None
        self._biased = False  # whether an active term brings a bias
        self._merged: tuple[float, ...] = ()  # the scales of all terms when a merged copy was written
        self._planned: Sequence[tuple[Packed, int, Wanted | None]] = ()  # the parts of the operand
        self._base: tuple[object, torch.Tensor] | None = None

    def __call__(
        self,
        layers: tuple[QuantLinear, ...],
        rows: Rows,
        out: torch.Tensor | None = None,
        joined: Joined | None = None,
    ) -> torch.Tensor:
        """Rows (..., width) to (..., sum of outputs), into `out` where it is given.

        `joined` holds the stored bytes of all layers side by side, where they lie so.
        """
        operand, weight = self._ready(layers, joined)
        return multiply(execution_of(layers[0]), rows, weight, operand, out)

    def with_gelu(
        self, layers: tuple[QuantLinear, ...], x: torch.Tensor, plain: int, joined: Joined | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x (..., width) to the first `plain` outputs as they are, and GELU of all others; float operands only."""
        operand, weight = self._ready(layers, joined)
        return multiply_gelu(x, weight, operand, plain)

    def of_parts(self, layers: tuple[QuantLinear, ...], parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Parts of the input that lie apart, (..., width) together, to (..., sum of outputs); float operands only."""
        operand, weight = self._ready(layers, None)
        return matmul_parts(parts, weight, operand.bias)

    def _ready(self, layers: tuple[QuantLinear, ...], joined: Joined | None) -> tuple[Operand, torch.Tensor]:
        """The operand as the layers are now, and its weight, valid until the next one is written."""
        execution = execution_of(layers[0])
        _require_here(layers)
        operand = self._current(layers, execution.workspace.terms, joined)
        weight = operand.weight if self._writer is None else self._writer()
        assert weight is not None
        return operand, weight

    def _current(self, layers: tuple[QuantLinear, ...], model: ModelTerms, joined: Joined | None) -> Operand:
        """The operand as the layers are now."""
        if layers != self._layers or joined is not self._joined or model is not self._model:
            self.enroll(layers, model, joined)
        if model.structure != self._structure:
            if self._revisions != _count(layers):
                with lasting():
                    model.renew()
            self._structure = model.structure
        if model.scales != model.shown:
            with lasting():
                model.refresh()
        operand = self._operand
        assert operand is not None
        if not operand.parts and _streamed(layers):
            self.forget()
        return operand

    def enroll(self, layers: tuple[QuantLinear, ...], model: ModelTerms, joined: Joined | None) -> None:
        """Begin with these layers: their operand is made with those of the model's other products."""
        if self._model is not None and self._model is not model:
            self._model.leave(self)
        self._held, self._joined, self._model = tuple(map(ref, layers)), joined, model
        self._structure, self._revisions = -1, None
        model.follow(self)

    @property
    def _layers(self) -> tuple[QuantLinear, ...]:
        """The layers; none where one is gone."""
        layers = tuple([held() for held in self._held])
        return () if None in layers else layers  # type: ignore[return-value]

    # what the model asks for when something changed -------------------------------------------------------------------

    def wanted(self) -> Sequence[Wanted] | None:
        """The stacks of a new operand; None where the present one is valid, or its bytes cannot be read now."""
        layers = self._layers
        if not layers or not _filled(layers) or self._revisions == _count(layers) or not self._serves(layers):
            return None
        if self._joined is not None and not self._joined.holds(layers):
            return None  # the next call brings other bytes
        active = [layer.active() for layer in layers]
        self._planned = () if needs_merging(active) else tuple(plan(layers, active, self._joined))
        return [wanted for _, _, wanted in self._planned if wanted is not None]

    def _serves(self, layers: Sequence[QuantLinear]) -> bool:
        """Whether the layers are still part of the model."""
        executions = [layer.execution for layer in layers]
        return all(one is not None and one.workspace.terms is self._model for one in executions)

    def forget(self) -> None:
        """Drop the operand: its memory is free before the next one is made."""
        self._operand = self._writer = self._keeper = None
        self._structure, self._revisions = -1, None

    def drop(self) -> None:
        """Hold nothing of the bytes any more, which moved; the next operand is made with those of the others."""
        self.forget()
        self._planned = ()

    def release(self) -> None:
        """Drop everything but the row scale of the base, which is small and stays true; the next call begins anew."""
        self.forget()
        if self._model is not None:
            self._model.leave(self)
        self._held, self._joined, self._model, self._planned = (), None, None, ()

    def remake(self, stacks: Sequence[Stack]) -> None:
        """Make the operand anew."""
        layers, model = self._layers, self._model
        assert model is not None
        execution = execution_of(layers[0])
        made = self._made(layers, self._parts(stacks), execution) if self._planned else merged(layers, execution)
        self._operand, self._revisions, self._structure = made, _count(layers), model.structure
        self._biased = any(term.bias is not None for layer in layers for term in layer.active())
        self._merged = () if self._planned else _scales(layers)
        self._writer = Writer(made, execution, layers[0].device) if made.weight is None else None
        self._keeper = Keeper(made, execution, made.weight) if made.copied and made.weight is not None else None

    def lifts(self) -> Iterable[Lift]:
        """The row scales that follow from the scales of terms."""
        return () if self._operand is None else self._operand.lifts()

    def rewrite(self) -> None:
        """Row scales that have to be measured, biases of terms, and a kept weight, in place."""
        operand = self._operand
        if operand is None:
            return
        adapted = any(part.stack is not None for part in operand.parts)
        biased, measured = adapted and self._biased, operand.scale if adapted and operand.base is None else None
        if not biased and measured is None and self._keeper is None:
            return
        layers = self._layers
        if not layers:
            return
        execution = execution_of(layers[0])
        if biased:
            renew_bias(operand, layers, execution.activations)
        if measured is None and self._keeper is None:
            return
        if not _filled(layers):
            return self._wait(execution)
        if measured is not None:
            measure(operand.parts, measured, operand.width, execution)
        if self._keeper is not None:
            self._keeper()

    def remerge(self) -> None:
        """A merged copy with its bias, in place, where a scale in it is another one."""
        operand, layers = self._operand, self._layers
        if operand is None or operand.weight is None or operand.parts or self._revisions != _count(layers):
            return
        scales, execution = _scales(layers), execution_of(layers[0])
        if scales == self._merged:
            return
        if not _filled(layers):
            return self._wait(execution)
        merge(operand, operand.weight, layers)
        renew_bias(operand, layers, execution.activations)
        self._merged = scales

    def _wait(self, execution: Execution) -> None:
        """Other bytes are there now; made anew with the own ones, and whoever captured the operand has to know."""
        self._structure, self._revisions = -1, None
        execution.workspace.terms.structure += 1

    def strengths(self) -> Iterable[Strength]:
        """Those of all terms of the layers."""
        return [term.strength for layer in self._layers for term in layer.adapters()]

    def _parts(self, stacks: Sequence[Stack]) -> tuple[Part, ...]:
        parts, stop, left = [], 0, list(stacks)
        for packed, rows, wanted in self._planned:
            start, stop = stop, stop + rows
            parts.append(Part(packed, None if wanted is None else left.pop(0), start, stop))
        return tuple(parts)

    def _made(self, layers: Sequence[QuantLinear], parts: tuple[Part, ...], execution: Execution) -> Operand:
        rows, width, first = parts[-1].stop, layers[0].in_features, parts[0]
        bias = bias_of(layers, execution.activations)
        if execution.decode == "none" and len(parts) == 1 and stored_as_operand(first, width):
            packed = first.packed
            return Operand(parts, codes_of(packed), packed.tensors.get("scale"), None, bias, rows, width)
        scale, base = self._row_scale(layers, parts, execution)
        kept = None
        if execution.keeps_merged and not _streamed(layers):
            kept = torch.empty(rows, width, dtype=execution.operand, device=first.packed.device)
        return Operand(parts, kept, scale, base, bias, rows, width, kept is not None)

    # row scales -------------------------------------------------------------------------------------------------------

    def _row_scale(
        self, layers: Sequence[QuantLinear], parts: tuple[Part, ...], execution: Execution
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(out,): what one unit of code is worth in each row, still to be written where terms have a part in it.

        Measured for int8. For e4m3, whose step follows the value, the base is measured once and each term adds a bound,
        so that adapters and their scales change without another look at the weights. The second is then that base.
        """
        if not execution.rows_have_scales:
            return None, None
        adapted = [part.stack is not None for part in parts]
        if execution.operand == torch.float8_e4m3fn:
            base = self._base_scale(layers, parts, execution)
            if not any(adapted):
                return base, None
            return torch.empty_like(base) if all(adapted) else base.clone(), base
        scale = torch.empty(parts[-1].stop, dtype=torch.float32, device=parts[0].packed.device)
        if not any(adapted):
            measure(parts, scale, layers[0].in_features, execution)
        return scale, None

    def _base_scale(self, layers: Sequence[QuantLinear], parts: tuple[Part, ...], execution: Execution) -> torch.Tensor:
        """The row scale without adapters, measured again only after a layer got another weight or other bytes, was
        widened, or came to another device."""
        stored = [(layer.stored, layer.in_features) for layer in layers]
        key = [(of, of.loads, of.device, width) for of, width in stored]
        if self._base is None or self._base[0] != key:
            bare = [Part(part.packed, None, part.start, part.stop) for part in parts]
            scale = torch.empty(parts[-1].stop, dtype=torch.float32, device=parts[0].packed.device)
            self._base = (key, measure(bare, scale, layers[0].in_features, execution))
        return self._base[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupProduct:
        """A copy has layers of its own and makes its operand itself."""
        copied = memo[id(self)] = GroupProduct()
        return copied


def as_rows(x: torch.Tensor, dtype: torch.dtype, pointwise: Pointwise) -> Rows:
    """x (batch, tokens, in) as rows of a type; nothing is done where it is of that type."""
    return Rows(x) if x.dtype == dtype else pointwise.quantize_rows(x, dtype)


def execution_of(layer: QuantLinear) -> Execution:
    """The execution of a layer that has one."""
    if layer.execution is None:
        raise ValueError("the layer has no execution")
    return layer.execution


def _streamed(layers: Sequence[QuantLinear]) -> bool:
    return any(layer.stored.slot is not None for layer in layers)


def _filled(layers: Sequence[QuantLinear]) -> bool:
    """Whether the bytes of all layers are where products read them."""
    slots = [layer.stored.slot for layer in layers]
    return all(slot is None or slot.filled for slot in slots)


def _require_here(layers: Sequence[QuantLinear]) -> None:
    """A product of a slot that is not filled would be one of another block's bytes."""
    if not _filled(layers):
        raise RuntimeError("a streamed weight is used outside of its block: call the block through the seam")


def _count(layers: Sequence[QuantLinear]) -> list[tuple[int, int, int]]:
    """Differs after every change of structure of a layer, and after every move or load of its bytes."""
    return [(layer.revision, stored.moves, stored.loads) for layer in layers for stored in (layer.stored,)]


def _scales(layers: Sequence[QuantLinear]) -> tuple[float, ...]:
    return tuple([term.scale for layer in layers for term in layer.adapters()])
