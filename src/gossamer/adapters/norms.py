"""What adapters do to parameters of norms: replace them, or add a difference times the adapter's scale.

    value = (replacement or original) + sum_i  scale_i * difference_i       in float32, then in the parameter's type

The original parameters are kept aside and come back themselves, so that nothing is left when the last adapter goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gossamer.layers import Strength


@dataclass(frozen=True, eq=False)
class NormChange:
    """An attached adapter's share in the norms of one module, by parameter, with the parameters that were there."""

    originals: Mapping[str, nn.Parameter]
    replacements: Mapping[str, torch.Tensor]
    differences: Mapping[str, torch.Tensor]
    strength: Strength


def new_change(
    module: nn.Module,
    there: Iterable[NormChange],
    replacements: Mapping[str, torch.Tensor],
    differences: Mapping[str, torch.Tensor],
    strength: Strength,
) -> NormChange:
    """A change of these parameters, beside those that are there already; nothing is done yet."""
    known = {name: original for change in there for name, original in change.originals.items()}
    names = dict.fromkeys((*replacements, *differences))
    originals = {name: known[name] if name in known else module.get_parameter(name) for name in names}
    return NormChange(originals, replacements, differences, strength)


def set_norms(module: nn.Module, before: Sequence[NormChange], after: Sequence[NormChange]) -> None:
    """Go from one set of attached changes to another."""
    originals = {name: original for change in (*before, *after) for name, original in change.originals.items()}
    for name, original in originals.items():
        current = module.get_parameter(name)
        # the original was aside while the model was moved or cast
        original.data = original.data.to(current)
        changing = [change for change in after if name in change.originals]
        value = _value(name, original, changing)
        parameter = original if value is None else nn.Parameter(value, requires_grad=original.requires_grad)
        _set_parameter(module, name, parameter)


def _value(name: str, original: nn.Parameter, changing: Sequence[NormChange]) -> torch.Tensor | None:
    """What takes the original's place; None where nothing does."""
    if not changing:
        return None
    replaced = [change.replacements[name] for change in changing if name in change.replacements]
    value = (replaced[0] if replaced else original.detach()).to(original.device, torch.float32, copy=True)
    for change in changing:
        if name in change.differences:
            value.add_(change.differences[name].to(value), alpha=change.strength.value)
    return value.to(original.dtype)


def _set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, parameter)
