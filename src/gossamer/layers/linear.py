"""The one linear layer: a packed weight, a bias, and a list of low-rank terms that are added before rounding.

    W_eff = unpack(packed) + sum_i scale_i * up_i @ down_i      float32 (out, in), then rounded once to the compute type
    b_eff = bias + sum_i scale_i * bias_i                       likewise (out,)
    y     = x @ W_eff.T + b_eff                                 returned in the type of x

The packed bytes are never written to, so removing every term leaves the layer exactly as it was. This is the reference;
with an `execution` the same runs through kernels and libraries, see `product`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from gossamer.errors import AdapterError
from gossamer.formats import Packed
from gossamer.layers.execution import Execution
from gossamer.layers.product import GroupProduct, as_rows
from gossamer.layers.stored import StoredWeight
from gossamer.layers.strength import Strength
from gossamer.layers.term import Term


class QuantLinear(nn.Module):
    """A linear layer whose storage and compute types are independent.

    `in_features` may be wider than the packed weight (see `widen`); the missing columns are zero. `.to(device)` moves
    everything; `.to(dtype)` changes the compute type and the bias, never the packed bytes or the adapters.
    """

    def __init__(
        self,
        weight: Packed | StoredWeight,
        bias: torch.Tensor | None = None,
        compute: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.stored = weight if isinstance(weight, StoredWeight) else StoredWeight(weight)
        self.out_features, self.in_features = self.stored.shape
        self.compute = compute
        self._execution: Execution | None = None
        self.revision = 0  # of anything that a product depends on, but for scales that are not 0
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._adapters: dict[str, Term] = {}
        self._product = GroupProduct()

    @property
    def packed(self) -> Packed:
        """The stored bytes of the base weight."""
        return self.stored.packed

    @property
    def device(self) -> torch.device:
        """Where the product runs; of a streamed weight the device that it is streamed to."""
        return cast(StoredWeight, self._modules["stored"]).device  # `self.stored` searches: adapters ask often

    @property
    def execution(self) -> Execution | None:
        """What runs the layer; None for the reference."""
        return self._execution

    @execution.setter
    def execution(self, execution: Execution | None) -> None:
        self.changed()
        self._execution = execution
        self.stored.watcher = None if execution is None else execution.workspace.terms
        self.changed()

    def changed(self) -> None:
        """Count a change of structure, here and in the model that the layer is part of."""
        vars(self)["revision"] += 1  # as self.revision, without torch's search for a parameter of that name
        if self._execution is not None:
            self._execution.workspace.terms.structure += 1

    @property
    def weight(self) -> torch.Tensor:
        """W_eff (out, in) in the compute type, decoded anew on every read.

        It exists for code that asks a linear for its weight's type or device, as T5's feed-forward layer does.
        """
        return self.effective_weight()

    def enroll(self) -> None:
        """Have the operand of the layer alone made together with those of all other products of the model."""
        if self._execution is not None:
            self._product.enroll((self,), self._execution.workspace.terms, None)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """What an assignment to `bias` calls: another one is a change."""
        super().register_parameter(name, param)
        self.changed()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Take another bias; the weight counts its loads itself."""
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.changed()

    def rebase(self, stored: StoredWeight, bias: nn.Parameter | None) -> None:
        """Take another base weight and bias in place of the own ones; width, terms and execution stay."""
        stored.watcher = self.stored.watcher
        self.stored, self.bias = stored, bias
        self.changed()

    def forget(self) -> None:
        """Drop what was made for the next products; it is made again when they come."""
        self._product.release()

    # adapters ---------------------------------------------------------------------------------------------------------

    def names(self) -> tuple[str, ...]:
        """Names of the attached adapters, in order of attachment."""
        return tuple(self._adapters)

    def has(self, name: str) -> bool:
        """Whether an adapter of that name is attached."""
        return name in self._adapters

    def adapters(self) -> Iterator[Term]:
        """The attached low-rank terms, in order of attachment."""
        return iter(self._adapters.values())

    def add(self, term: Term) -> None:
        """Attach a low-rank term under its own name."""
        if term.name in self._adapters:
            raise AdapterError(
                f"An adapter called {term.name!r} is already attached to this layer.",
                "Names tell adapters apart; adding the same one twice would double its effect unnoticed.",
                "Remove it first, or attach this one under another name.",
            )
        if term.shape != (self.out_features, self.in_features):
            raise AdapterError(
                f"Adapter {term.name!r} does not fit this layer.",
                f"It maps {term.in_features} to {term.out_features} features, "
                f"the layer maps {self.in_features} to {self.out_features}.",
                "Check that the adapter was made for this model; a Control LoRA needs its input layer widened first.",
            )
        term.move(self.device)
        term.strength.changes += 1
        self._adapters[term.name] = term
        self.changed()

    def remove(self, name: str) -> Term:
        """Detach an adapter and hand it back."""
        term = self._adapter(name)
        term.strength.changes += 1
        del self._adapters[name]
        self.changed()
        return term

    def set_scale(self, name: str, scale: float) -> None:
        """Change an adapter's strength on this layer alone, from the next call on.

        To and from 0 operands are made anew; else it is a number in the memory of the device, or a merged copy that is
        written again.
        """
        self.share(name, Strength(), scale)

    def share(self, name: str, strength: Strength, multiplier: float) -> None:
        """Have an adapter act with a strength that its terms of other layers have too, times a multiplier."""
        term = self._adapter(name)
        if (term.scale == 0) != (strength.value * multiplier == 0):
            self.changed()
        if term.strength is not strength or term.multiplier != multiplier:
            term.share(strength, multiplier)

    def _adapter(self, name: str) -> Term:
        if name not in self._adapters:
            raise AdapterError(
                f"No adapter called {name!r} is attached to this layer.",
                f"Attached: {', '.join(self._adapters) or 'none'}.",
                "Use one of the attached names.",
            )
        return self._adapters[name]

    # width ------------------------------------------------------------------------------------------------------------

    def widen(self, in_features: int) -> None:
        """Accept wider inputs: the base weight gets zero columns when it is decoded, its bytes stay as they are."""
        if in_features < self.stored.shape[1]:
            raise AdapterError(
                f"A layer of {self.stored.shape[1]} input features cannot take inputs of {in_features}.",
                "Widening adds columns of zeros; it cannot take stored columns away.",
                "Check that the adapter was made for this model.",
            )
        self._require_no_adapter_of_other_width(in_features)
        self.in_features = in_features
        self.changed()

    def narrow(self) -> None:
        """Undo `widen`: back to the width of the packed weight."""
        self.widen(self.stored.shape[1])

    def _require_no_adapter_of_other_width(self, in_features: int) -> None:
        other = [term.name for term in self.adapters() if term.in_features != in_features]
        if other:
            raise AdapterError(
                f"The layer cannot take inputs of {in_features} features while {', '.join(other)} is attached.",
                f"These adapters were made for {self.in_features} input features.",
                "Remove them first, change the width, then attach adapters of the new width.",
            )

    # the product ------------------------------------------------------------------------------------------------------

    def active(self) -> list[Term]:
        """The terms whose scale is not 0."""
        return [term for term in self._adapters.values() if term.scale != 0]

    def base_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The decoded base (out, in_features), padded where the layer was widened; do not write into it."""
        weight = self.stored.unpack(dtype)
        extra = self.in_features - weight.shape[1]
        return F.pad(weight, (0, extra)) if extra else weight

    def merged_weight(self) -> torch.Tensor:
        """W_eff (out, in_features) in float32: base and active terms; do not write into it."""
        base, active = self.base_weight(torch.float32), self.active()
        if not active:
            return base
        weight = base.clone()
        for term in active:
            term.add_to_weight(weight, base)
        return weight

    def effective_weight(self) -> torch.Tensor:
        """W_eff (out, in_features) in the compute type: base and terms summed in float32, rounded once."""
        return self.merged_weight().to(self.compute) if self.active() else self.base_weight(self.compute)

    def effective_bias(self, dtype: torch.dtype | None = None) -> torch.Tensor | None:
        """b_eff (out,) in the compute type or in `dtype`; None where neither layer nor active adapter has one.

        It may be the layer's own: do not write into it.
        """
        own, terms = self.bias, [term.scaled_bias() for term in self.active() if term.bias is not None]
        if not terms:
            return None if own is None else own.to(dtype or self.compute)
        terms = terms if own is None else [own.float(), *terms]
        return sum(terms[1:], start=terms[0]).to(dtype or self.compute)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in_features) to y (..., out), in the type of x."""
        if self._execution is not None:
            return self._execute(x, self._execution)
        y = F.linear(x.to(self.compute), self.effective_weight(), self.effective_bias())
        return y.to(x.dtype)

    def _execute(self, x: torch.Tensor, execution: Execution) -> torch.Tensor:
        """The same through kernels and libraries."""
        flat = x.reshape(1, -1, self.in_features)
        y = self._product((self,), as_rows(flat, execution.operand, execution.pointwise))
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantLinear:
        moves = self.stored.moves
        super()._apply(fn, recurse)
        if self.stored.moves != moves:
            self._product.drop()  # an operand would keep the bytes where they were
        moved = fn(torch.empty(0, dtype=self.compute, device=self.device))
        self.compute = moved.dtype
        for term in self.adapters():
            term.move(moved.device)
        self.changed()
        return self

    def extra_repr(self) -> str:
        """Widths, compute type and adapters, for printing."""
        adapters = f", adapters={list(self._adapters)}" if self._adapters else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, compute={self.compute}{adapters}"
        )
