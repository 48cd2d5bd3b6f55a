"""Where an adapter's terms are in a model, so that a change behind its back is noticed without a search."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import is_
from typing import cast

from torch import nn

from gossamer.layers import QuantLinear

Children = dict[str, nn.Module | None]


@dataclass(frozen=True, eq=False)
class Places:
    """Layers by name, and how each was reached: a module by its parent's children and its name there.

    The steps of all ways lie in three lists, each step once. A model may replace a child at any time without telling
    anyone, so the steps are gone through whenever a strength changes: 834 for a full adapter of FLUX.1, with no line of
    Python and no layer looked into.
    """

    layers: Mapping[str, QuantLinear]
    parents: list[Children]
    names: list[str]
    modules: list[nn.Module]

    @staticmethod
    def of(model: nn.Module, layers: Mapping[str, QuantLinear], known: Iterable[Places] = ()) -> Places:
        """The places of these layers; those of another adapter on the same layers serve again while they hold."""
        return next((one for one in known if one._are(layers)), None) or Places._found(model, layers)

    def _are(self, layers: Mapping[str, QuantLinear]) -> bool:
        return self.layers.keys() == layers.keys() and self.hold()

    @staticmethod
    def _found(model: nn.Module, layers: Mapping[str, QuantLinear]) -> Places:
        steps: dict[str, tuple[Children, str, nn.Module]] = {}
        for name in layers:
            _reach(model, name, steps)
        parents, names, modules = ([step[part] for step in steps.values()] for part in range(3))
        return Places(layers, parents, names, modules)  # type: ignore[arg-type]

    def hold(self) -> bool:
        """Whether nothing on the way was replaced."""
        return all(map(is_, map(dict.get, self.parents, self.names), self.modules))


def _reach(model: nn.Module, path: str, steps: dict[str, tuple[Children, str, nn.Module]]) -> nn.Module:
    """The module of a dotted name that the model has; each step of the way is taken once and remembered."""
    if not path:
        return model
    if path not in steps:
        above, _, name = path.rpartition(".")
        children = _reach(model, above, steps)._modules
        steps[path] = (children, sys.intern(name), cast(nn.Module, children[name]))
    return steps[path][2]
