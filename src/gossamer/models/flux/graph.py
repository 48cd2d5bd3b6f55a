"""A whole step as one CUDA graph, which costs the host one call where a step has 700 to 900 kernels.

A graph repeats kernels with the addresses that they had. So there is one for each set of shapes; inputs are copied into
tensors of its own; and all graphs go when anything that kernels read moves: an adapter that comes or goes, a scale that
becomes 0 or leaves it, a layer or parameter that is replaced, a model that is moved. A new scale alone is written into
the memory that the graph reads.

Weights that come from the host come to the same places in every step. Copies from pinned memory are part of the graph,
on a branch beside the kernels, and a graph begins with the blocks on the device that are there when it ends. Whoever
takes the places away drops the graphs first, with `release`.

    first step of a shape      call by call: kernels are compiled, operands made
    second                     captured, then replayed
    from then on               replayed

Results are those of the plain way, bit by bit: the same kernels run on the same values.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from gossamer.kernels.operators import lasting, through_operator
from gossamer.models.flux.seam import Recording, run_block
from gossamer.models.flux.snapshot import Snapshot
from gossamer.models.flux.static_inputs import StaticInputs, shapes_of
from gossamer.models.flux.step import StepInputs, run_step

KEPT = 4  # sets of shapes; a graph has 10 to 20 MB of inputs, and all share the memory in between


class Backend(Protocol):
    """What records and repeats work on a device."""

    def obstacle(self, tensor: torch.Tensor) -> str | None:
        """Why nothing can be recorded on this tensor's device now, or None."""

    def capture(self, work: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], torch.Tensor]:
        """Record `work` without running it; each call of the result runs it and hands back the same tensor."""

    def in_turn(self) -> AbstractContextManager[None]:
        """Inside, work waits for all that was queued inside before, from whatever stream."""

    def release(self) -> None:
        """Give memory back after all recorded work was dropped."""


@dataclass(frozen=True, eq=False)
class Captured:
    """A step on inputs that stay where they are, and the copies of weights in it."""

    inputs: StaticInputs
    weights: Recording
    replay: Callable[[], torch.Tensor]


class GraphedSteps:
    """A stepper that replays steps where it can. `tally` counts what it did and why, `last` is its last entry."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._captured: OrderedDict[Hashable, Captured] = OrderedDict()
        self._warm: set[Hashable] = set()  # shapes that ran call by call in the state of the snapshot
        self._snapshot: Snapshot | None = None
        self.tally: Counter[str] = Counter()
        self.last = "nothing ran yet"

    def __call__(self, model: Any, inputs: StepInputs) -> torch.Tensor:
        """Run a step in the way that is possible."""
        why_not = self._obstacle(model, inputs)
        if why_not is not None:
            if self._captured and model.weights.obstacle() is not None:
                self.release()  # what graphs hold is memory that was to be saved
            return self._run(model, inputs, why_not)
        if self._snapshot is None or self._snapshot.differs(model) or self._moved_by_scales(model):
            self.release()
            return self._warm_up(model, inputs)
        if self._snapshot.obstacle is not None:
            return self._run(model, inputs, self._snapshot.obstacle)
        shapes = shapes_of(inputs)
        if shapes not in self._captured and shapes not in self._warm:
            return self._warm_up(model, inputs)
        return self._replay(shapes, model, inputs)

    def in_turn(self) -> AbstractContextManager[None]:
        """Around a whole forward: what it makes before its step, and the step, wait for those of other streams."""
        return self._backend.in_turn()

    def _moved_by_scales(self, model: Any) -> bool:
        """Whether new scales could not be shown in place: where bytes are needed for it that are not there now."""
        assert self._snapshot is not None
        return self._snapshot.show_scales() and self._snapshot.differs(model)

    def release(self) -> bool:
        """Drop all graphs and give their memory back to the allocator; whether there were any."""
        had_captured = bool(self._captured)
        self._captured.clear()
        self._warm.clear()
        self._snapshot = None
        self._backend.release()
        return had_captured

    def _replay(self, shapes: Hashable, model: Any, inputs: StepInputs) -> torch.Tensor:
        captured = self._captured.get(shapes)
        if captured is None:
            self._note("captured")
            captured = self._capture(shapes, model, inputs)
        elif not captured.weights.possible():
            return self._run(model, inputs, "weights are elsewhere than at the beginning of the captured step")
        else:
            self._note("replayed")
            self._captured.move_to_end(shapes)
            captured.inputs.load(inputs)
        sample = captured.replay().clone()  # a later replay writes into the tensor itself
        captured.weights.repeated()
        return sample

    def _capture(self, shapes: Hashable, model: Any, inputs: StepInputs) -> Captured:
        while len(self._captured) >= KEPT:
            self._captured.popitem(last=False)
        with lasting():
            static = StaticInputs(inputs)
        weights = model.weights.recording()

        def step() -> torch.Tensor:
            with weights.recorded():
                return run_step(model, static.inputs)

        replay = self._backend.capture(step, inputs.image.device)
        self._captured[shapes] = Captured(static, weights, replay)
        return self._captured[shapes]

    def _warm_up(self, model: Any, inputs: StepInputs) -> torch.Tensor:
        """Call by call; what it makes, such as operands, is there when the same shapes come again."""
        sample = self._run(model, inputs, "the first step of its shapes since the model changed")
        if self._snapshot is None or self._snapshot.differs(model):
            self._captured.clear()
            self._warm.clear()
            self._snapshot = Snapshot(model)
        self._warm.add(shapes_of(inputs))
        return sample

    def _run(self, model: Any, inputs: StepInputs, reason: str) -> torch.Tensor:
        self._note(f"call by call: {reason}")
        return run_step(model, inputs)

    def _note(self, what: str) -> None:
        self.last = what
        self.tally[what] += 1

    def _obstacle(self, model: Any, inputs: StepInputs) -> str | None:
        """Why this step has to run call by call."""
        if model.runner is not run_block:
            return "something else than the plain loop runs the blocks"
        if through_operator(inputs.image):
            return "gradients are recorded, or a compiler or tracer watches"
        if torch.is_autocast_enabled(inputs.image.device.type):
            return "autocast is on"
        return model.weights.obstacle() or self._backend.obstacle(inputs.image)

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphedSteps:
        """A copy of a model captures its own."""
        copied = memo[id(self)] = GraphedSteps(type(self._backend)())
        return copied
