"""Adapters whose strength changes over the steps of a run; when it ends, however it ends, they are what they were.

Nothing is attached, merged or compiled anew at a step: a scale is a number beside each term. A text encoder reads the
prompt before the first step, so its terms have to act before `over_steps` is entered, at the adapter's own scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import nn

from gossamer.adapters.attach import set_scale
from gossamer.adapters.records import attached
from gossamer.adapters.text_encoders import TextEncoders
from gossamer.errors import AdapterError

Factor = Callable[[int], float]  # from a step, counted from 0, to what the scale is multiplied with in it
AtStep = Callable[[int], None]


@contextmanager
def over_steps(
    model: nn.Module, factors: Mapping[str, Factor], text_encoders: TextEncoders | None = None
) -> Iterator[AtStep]:
    """Inside, calling the yielded function gives each named adapter its strength in a step; others are left alone.

    Call it before each step, in any order and as often as wanted: where nothing changes, nothing is done.
    """
    scales = {name: _scale(model, name) for name in factors}

    def at_step(step: int) -> None:
        for name, factor in factors.items():
            wanted = scales[name] * factor(step)
            if _scale(model, name) != wanted:
                set_scale(model, name, wanted, text_encoders)

    with ExitStack() as undo:
        for name, scale in scales.items():
            # always, because a change that was interrupted may not have come to all norms
            undo.callback(set_scale, model, name, scale, text_encoders)
        yield at_step


def _scale(model: nn.Module, name: str) -> float:
    there = attached(model)
    if name not in there:
        raise AdapterError(
            f"The adapter {name!r}, whose strength changes over the steps, is not attached.",
            f"Attached: {', '.join(there) or 'none'}.",
            "Attach it before the run begins, and leave it attached until the run is over.",
        )
    return there[name].scale
