"""What the kernels of a step follow from besides its inputs: a captured step is right as long as that stays the same.

Layers count their changes (`layers.model_terms`). Everything else that a forward reads, modules, parameters and hooks,
is compared by identity.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from gossamer.kernels.operators import lasting
from gossamer.layers import QuantLinear, StoredWeight
from gossamer.models.flux_spec import is_modulation

PARTS = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")


class Snapshot:
    """The state of a model at one time; `obstacle` says why no step of it can be captured, or is None."""

    def __init__(self, model: Any) -> None:
        every = list(model.named_modules())
        named = [(name, module) for name, module in every if not is_modulation(name)]  # modulation has run before
        executions = [module.execution for _, module in named if isinstance(module, QuantLinear)]
        models = {id(of.workspace.terms): of.workspace.terms for of in executions if of is not None}
        self._terms = next(iter(models.values()), None)
        self.obstacle = _obstacle(model, named, len(models)) or _foreign(every)
        self._structure = -1 if self._terms is None else self._terms.structure
        self._operators = model.operators
        # bytes of stored weights are counted where they move
        self._holders = [vars(module) for _, module in named if not isinstance(module, StoredWeight)]
        self._parts = [holder[part] for holder in self._holders for part in PARTS]
        self._held = self._objects()  # alive, so that no other object gets the place of one

    def differs(self, model: Any) -> bool:
        """Whether kernels would be others now, or read from elsewhere."""
        if self._terms is None or self._terms.structure != self._structure or model.operators is not self._operators:
            return True
        return list(map(id, self._objects())) != list(map(id, self._held))

    def show_scales(self) -> bool:
        """Write new scales of adapters into the memory that kernels read; whether there were any."""
        if self._terms is None or self._terms.scales == self._terms.shown:
            return False
        with lasting():
            self._terms.refresh()
        return True

    def _objects(self) -> list[Any]:
        compiled = [holder.get("_compiled_call_impl") for holder in self._holders]
        return [*compiled, *(value for part in self._parts for value in part.values())]


def _obstacle(model: Any, named: Sequence[tuple[str, nn.Module]], executions: int) -> str | None:
    """Why the model itself, or one of its modules, stands against it."""
    if executions != 1:
        return "the linears of the model were not prepared together"
    for name, module in named:
        if module is not model and (module._forward_hooks or module._forward_pre_hooks):
            return f"{name!r} has hooks"
        if isinstance(module, QuantLinear) and module.execution is None:
            return f"{name!r} runs without kernels"
        if module._compiled_call_impl is not None:
            return f"{name or 'the model'!r} is compiled"
        if "forward" in vars(module):
            return f"the forward of {name or 'the model'!r} was replaced"
    return None


def _foreign(named: Iterable[tuple[str, nn.Module]]) -> str | None:
    """A module whose forward may do anything."""
    homes = ("gossamer.", "torch.nn.modules.")
    found = next((name for name, module in named if not type(module).__module__.startswith(homes)), None)
    return None if found is None else f"{found!r} is no part that gossamer knows"
