"""`gossamer plan --measure`: a few steps on the GPU that is here, beside what the chosen plan predicted of them."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from gossamer.cli.console import note, print_json, progress_bar
from gossamer.errors import InvalidOptionError
from gossamer.pipeline.options import AUTO, LoadOptions, PaintOptions, make

if TYPE_CHECKING:
    from gossamer.pipeline.accuracy import Accuracy
    from gossamer.pipeline.prepare import Prepared

STEPS = 5  # the first one is not counted: kernels are compiled in it, and the modulation computed
PROMPT = "a picture that is painted to be measured"


def measure(arguments: argparse.Namespace) -> int:
    """Plan as `gossamer run --vram` does, paint a few steps, print both."""
    _require_measurable(arguments)
    from gossamer.pipeline.fit import Fit
    from gossamer.pipeline.prepare import prepare

    paint = make(PaintOptions, {"prompt": PROMPT, "size": arguments.size, "steps": arguments.steps})
    prepared = prepare(_loading(arguments), paint)
    assert isinstance(prepared.fit, Fit)  # a budget is named, so there is a plan or an error
    actual = _painted(prepared, replace(paint, steps=STEPS))
    planning = prepared.fit.planning
    if arguments.format == "json":
        print_json({**planning.as_json(), "actual": actual.as_json()})
        return 0
    from gossamer.cli.plan_drawing import print_planning

    print_planning(planning, prepared.fit.request)
    print("\n".join(actual.said()))
    return 0


def _painted(prepared: Prepared, paint: PaintOptions) -> Accuracy:
    from gossamer.pipeline.accuracy import accuracy
    from gossamer.pipeline.load import assemble

    with progress_bar(paint.steps) as bar:
        pipeline = assemble(prepared, note)
        bar.say("Measuring")
        found = accuracy(pipeline, pipeline.paint(paint, bar.on_step))
    assert found is not None  # it was loaded by a plan
    return found


def _loading(arguments: argparse.Namespace) -> LoadOptions:
    """The same wishes, for the memory that was named or is free."""
    import torch

    return make(
        LoadOptions,
        {
            "model": arguments.model,
            "base": arguments.base,
            "storage": arguments.storage or AUTO,
            "text_storage": arguments.text_storage or AUTO,
            "compute": arguments.compute,
            "attention": arguments.attention,
            "loras": tuple(arguments.lora),
            "device": "cuda",
            "vram": arguments.vram or torch.cuda.mem_get_info()[0],
            "ram": arguments.ram,
            "offload": arguments.offload,
            "least_fidelity": arguments.least_fidelity,
        },
    )


def _require_measurable(arguments: argparse.Namespace) -> None:
    import torch

    if not torch.cuda.is_available():
        raise InvalidOptionError(
            "There is no GPU to measure on.",
            "--measure runs a few steps on an NVIDIA GPU of this machine, and torch finds none.",
            "Leave --measure out: the plan itself needs no GPU.",
        )
    if arguments.gpu is not None:
        raise InvalidOptionError(
            "--measure and --gpu cannot be used together.",
            "--gpu names a card that need not be here; what is measured is the one that is.",
            "Leave one of them out.",
        )
    if arguments.batch != 1:
        raise InvalidOptionError(
            f"A batch of {arguments.batch} cannot be measured.",
            "--measure paints as `gossamer run` does, one picture at a time.",
            "Leave --batch out, or --measure.",
        )
