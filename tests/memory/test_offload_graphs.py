"""Steps are captured, copies of weights among them, and what was captured goes before the weights do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_offload import CPU, adapter, built, placed, run

import gossamer
from gossamer.adapters import attach, set_scale
from gossamer.memory.footprint import gpu_bytes, setting
from gossamer.memory.model_specs import DEV
from gossamer.memory.offload import offload
from gossamer.memory.picture import Job
from gossamer.memory.placement import Placement
from gossamer.memory.subject import known_subject
from gossamer.models.flux import GraphedSteps
from gossamer.models.flux.step import run_step
from recorded_steps import Double

ALL = 5  # blocks of the model
FIRST = "call by call: the first step of its shapes since the model changed"
ELSEWHERE = "weights are elsewhere than at the beginning of the captured step"
IN_A_TURN = [FIRST, "captured", "replayed"]


class Watching(Double):
    """Notes, whenever all is dropped, whether the weights were still there."""

    def __init__(self):
        super().__init__()
        self.model, self.were_there = None, []

    def release(self):
        super().release()
        weights = self.model.single_transformer_blocks[0].attn.to_q.stored
        self.were_there.append(weights.slot is not None and weights.slot.filled)


@pytest.fixture
def graphed():
    """A model with a double of CUDA graphs, and what a step of it gives."""
    model = built("nf4", "fp32")
    expected = run(model)
    model.stepper = GraphedSteps(Watching())
    model.stepper._backend.model = model
    return model, expected


def steps(model, expected, count=3):
    """What was done in so many steps, all of them right."""
    done = []
    for _ in range(count):
        assert torch.equal(run(model), expected)
        done.append(model.stepper.last)
    return done


@pytest.mark.parametrize("text", ["evicted", "streamed"])
def test_steps_are_captured_in_every_turn(graphed, text):
    model, expected = graphed
    handle = placed(model, Placement(ALL, text=text))
    for _ in range(2):
        assert steps(model, expected) == IN_A_TURN
        model.stepper._backend.were_there.clear()
        handle.turns.take(None)
        assert model.stepper._backend.were_there == [True], "before the weights left"
        assert not model.stepper._captured
        assert handle.parts["transformer"]._carousel._memory == {}


def test_an_adapter_comes_and_changes_within_a_turn(graphed):
    model, expected = graphed
    plain = built("nf4", "fp32")
    placed(model, Placement(ALL, text="evicted"))
    steps(model, expected)
    for each in (model, plain):
        attach(each, adapter(), "style", 0.7)
    assert steps(model, run(plain)) == IN_A_TURN
    for each in (model, plain):
        set_scale(each, "style", -0.3)
    assert steps(model, run(plain), 1) == ["replayed"]


COMING = (
    Placement(ALL - 1, text="evicted"),
    Placement(0),
    Placement(2, slots=1),
    Placement(0, slots=3),
    Placement(ALL - 1),
)


@pytest.mark.parametrize("placement", COMING)
def test_copies_are_captured_with_the_step(graphed, placement):
    model, expected = graphed
    placed(model, placement)
    assert steps(model, expected, 5) == [*IN_A_TURN, "replayed", "replayed"]
    with torch.autocast("cpu", torch.bfloat16):
        run(model)
    assert "autocast" in model.stepper.last
    assert steps(model, expected) == ["replayed"] * 3, "what was fetched call by call serves the captured step"


@pytest.mark.parametrize(("wish", "after"), [("fp32", "replayed"), ("fp8", "replayed"), ("int8", FIRST)])
def test_a_scale_changes_while_blocks_come_and_go(wish, after):
    """Row scales of int8 are measured, which takes bytes that are not there between two steps."""
    model, plain = built("nf4", wish), built("nf4", wish)
    model.stepper = GraphedSteps(Double())
    placed(model, Placement(0))
    for each in (model, plain):
        attach(each, adapter(), "style", 0.7)
    assert steps(model, run(plain)) == IN_A_TURN
    for scale in (-0.3, 1.2):
        for each in (model, plain):
            set_scale(each, "style", scale)
        expected = run(plain)
        assert steps(model, expected)[0] == after
        assert steps(model, expected) == ["replayed"] * 3


def test_a_step_that_failed_leaves_blocks_where_the_captured_one_does_not_expect_them(graphed):
    model, expected = graphed
    placed(model, Placement(0))
    steps(model, expected)

    def fail_at_third(step, state):
        step(state)
        if step.index == 2:
            raise KeyboardInterrupt

    plain, model.runner = model.runner, fail_at_third
    with pytest.raises(KeyboardInterrupt):
        run(model)
    model.runner = plain
    assert steps(model, expected) == ["call by call: " + ELSEWHERE, "replayed", "replayed"]


def test_no_step_is_captured_while_the_host_takes_part_in_its_copies(graphed):
    model, expected = graphed
    placed(model, Placement(ALL - 1, pinned=False))
    host = "call by call: the host takes part in bringing the weights of blocks"
    assert steps(model, expected) == [host] * 3


def test_captured_steps_are_dropped_when_other_blocks_move(graphed):
    model, expected = graphed
    handle = placed(model, Placement(ALL, text="evicted"))
    steps(model, expected)
    handle = handle.rearranged(Placement(2, text="evicted"))
    assert not model.stepper._captured
    assert steps(model, expected) == IN_A_TURN
    handle.rearranged(Placement(ALL, text="evicted"))
    assert steps(model, expected) == IN_A_TURN


@pytest.mark.parametrize("end", ["settle", "withdraw"])
def test_captured_steps_are_dropped_at_the_end(graphed, end):
    model, expected = graphed
    handle = placed(model, Placement(ALL, text="evicted"))
    steps(model, expected)
    model.stepper._backend.were_there.clear()
    getattr(handle, end)()
    assert model.stepper._backend.were_there[0], "before the weights left"
    assert not model.stepper._captured
    assert steps(model, expected) == IN_A_TURN


def test_pictures_of_captured_steps_are_the_same(one_thread):
    pipe = gossamer.load(storage="nf4", text_storage="nf4", compute="fp32")
    options = {"seed": 1, "steps": 4, "size": "64x64"}
    pipe.transformer.stepper = run_step
    prompts = ("a red ball on a cube", "two green cones")
    expected = [np.array(pipe(prompt, **options)) for prompt in prompts]
    pipe.transformer.stepper = GraphedSteps(Double())
    count = len(pipe.transformer.transformer_blocks) + len(pipe.transformer.single_transformer_blocks)
    handle = offload(pipe.components, Placement(count, text="evicted"), CPU)
    for prompt, picture in zip(prompts, expected, strict=True):
        assert np.array_equal(np.array(pipe(prompt, **options)), picture)
        assert not pipe.transformer.stepper._captured, "the decoder had its turn"
    assert pipe.transformer.stepper.tally == {FIRST: 2, "captured": 2, "replayed": 4}
    handle.settle()


@pytest.mark.parametrize("text", ["resident", "evicted", "streamed"])
def test_the_plan_counts_what_captured_steps_keep(text):
    of = setting(known_subject(DEV), Job(), ("nf4", "nf4"), ("fp8", "bf16"), 0)
    blocks = len(of.weights.blocks)
    placements = (Placement(blocks, text=text), Placement(9, text=text), Placement(9, text=text, pinned=False))
    captured, streamed, plain = (gpu_bytes(of, placement) for placement in placements)
    name, inputs = "captured steps", 4608 * 64 * 2 * 4 + (512 * 4096 + 2 * 4096 * 64 + 344 * 3072) * 2
    kept = inputs + 35_000_000  # and a workspace of cuBLAS
    assert captured["denoise"][name] == kept
    for phase in ("text", "decode"):
        assert captured[phase].get(name, 0) == (0 if text != "resident" else kept + 375652352)
    for phase, parts in captured.items():
        assert streamed[phase].get(name, 0) == parts.get(name, 0)
    assert not any(name in parts for parts in plain.values())
