"""Replayed steps against steps that run call by call.

On a CPU a double stands in for CUDA graphs: it keeps the work that was to be recorded and runs it again, on the inputs
that stay where they are, at each replay.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch

from gossamer.adapters import Adapter, DifferenceTerm, LowRankTerm, attach, detach, set_scale
from gossamer.models.flux import GraphedSteps, from_diffusers, prepare, run_block, run_step
from gossamer.models.flux.graph import KEPT
from gossamer.models.flux_spec import FluxSpec, linear_shapes
from gossamer.models.swap import linear_layers, quantize
from recorded_steps import Double

WIDE = {"attention_head_dim": 128, "axes_dims_rope": (16, 56, 56), "joint_attention_dim": 64, "in_channels": 64}
REPLAYED, CAPTURED = "replayed", "captured"


@pytest.fixture
def twins(make_diffusers):
    """The same packed model twice: with steps that are replayed, and call by call."""

    def make(storage="nf4", wish="fp32", **options):
        models = []
        for stepper in (GraphedSteps(Double()), run_step):
            model = from_diffusers(make_diffusers(**WIDE))
            quantize(model, storage)
            prepare(model, wish, **options)
            model.stepper = stepper
            models.append(model)
        return models

    return make


def adapter_of(model, rank=4, seed=3, layers="transformer_blocks."):
    torch.manual_seed(seed)
    spec = FluxSpec.from_config(model.config)
    shapes = {name: shape for name, shape in linear_shapes(spec).items() if layers in name}
    factors = {name: (torch.randn(rank, columns), torch.randn(rows, rank)) for name, (rows, columns) in shapes.items()}
    return Adapter(spec, {name: LowRankTerm(down * 0.02, up * 0.02) for name, (down, up) in factors.items()})


def steps_of(inputs, count):
    """Inputs of steps of a run: other latents and timesteps in each."""
    for step in range(count):
        torch.manual_seed(step)
        latents = torch.randn_like(inputs["hidden_states"])
        yield {**inputs, "hidden_states": latents, "timestep": inputs["timestep"] * (1 - 0.2 * step)}


def require_same(models, inputs):
    found, expected = [model(**inputs, return_dict=False)[0] for model in models]
    assert torch.equal(found, expected)
    return found


def run(models, inputs, count=3):
    """Steps on both models, with equal results; what the first of them did."""
    done = []
    for step in steps_of(inputs, count):
        require_same(models, step)
        done.append(models[0].stepper.last)
    return done


@torch.inference_mode()
@pytest.mark.parametrize("batch", [1, 2])
def test_the_second_step_is_captured_and_later_ones_are_replayed(twins, make_inputs, batch):
    models = twins()
    done = run(models, make_inputs(models[0].config, batch=batch), 4)
    assert done[0].startswith("call by call")
    assert done[1:] == [CAPTURED, REPLAYED, REPLAYED]
    assert models[0].stepper.tally[REPLAYED] == 2


@torch.inference_mode()
def test_a_result_is_the_callers_own(twins, make_inputs):
    models = twins()
    inputs = make_inputs(models[0].config)
    run(models, inputs)
    first, second = (require_same(models, step) for step in steps_of(inputs, 2))
    assert not torch.equal(first, second)
    kept = first.clone()
    run(models, inputs)
    assert torch.equal(first, kept)


@torch.inference_mode()
def test_all_inputs_may_change(twins, make_inputs):
    models = twins()
    inputs = make_inputs(models[0].config)
    run(models, inputs)
    before = require_same(models, inputs)
    for name, value in inputs.items():
        other = {**inputs, name: value + (1 if name == "img_ids" else 0.25)}
        assert not torch.equal(require_same(models, other), before) or name == "txt_ids", name
        assert models[0].stepper.last == REPLAYED


@torch.inference_mode()
def test_two_resolutions_take_turns(twins, make_inputs):
    models = twins()
    small, large = (make_inputs(models[0].config, side=side) for side in (4, 6))
    for inputs in (small, large, small, large):
        require_same(models, inputs)
    for _ in range(2):
        for inputs in (small, large):
            require_same(models, inputs)
            assert models[0].stepper.last == REPLAYED


@torch.inference_mode()
def test_few_shapes_are_kept(twins, make_inputs):
    model = twins()[0]
    sides = range(2, 2 + KEPT + 1)
    for side in sides:
        for _ in range(2):
            model(**make_inputs(model.config, side=side))
    assert model.stepper._backend.captures == len(sides)
    model(**make_inputs(model.config, side=sides[-1]))
    assert model.stepper.last == REPLAYED
    model(**make_inputs(model.config, side=sides[0]))  # the one that was used longest ago is gone
    assert model.stepper.last == CAPTURED


@torch.inference_mode()
@pytest.mark.parametrize(
    ("storage", "wish", "keeps_merged"), [("nf4", "fp32", False), ("nf4", "fp8", False), ("fp8", "fp8", True)]
)
def test_adapters_come_change_and_go_between_steps(twins, make_inputs, storage, wish, keeps_merged):
    models = twins(storage, wish, keeps_merged=keeps_merged)
    inputs = make_inputs(models[0].config)
    run(models, inputs)
    for model in models:
        attach(model, adapter_of(model), "style", 0.7)
    assert run(models, inputs)[1:] == [CAPTURED, REPLAYED]
    before = require_same(models, inputs)
    for strength in (0.3, -1.2):
        for model in models:
            set_scale(model, "style", strength)
        assert not torch.equal(require_same(models, inputs), before)
        assert models[0].stepper.last == REPLAYED  # a new strength is a number in memory
    for model in models:
        set_scale(model, "style", 0.0)
    assert run(models, inputs)[1:] == [CAPTURED, REPLAYED]
    for model in models:
        detach(model, "style")
        attach(model, adapter_of(model, seed=4), "other")
    assert run(models, inputs)[1:] == [CAPTURED, REPLAYED]


@torch.inference_mode()
@pytest.mark.parametrize("wish", ["fp32", "fp8"])
def test_a_new_strength_is_written_into_merged_copies_in_place(twins, make_inputs, wish):
    models = twins(wish=wish)
    inputs = make_inputs(models[0].config)
    for model in models:
        spec = FluxSpec.from_config(model.config)
        attach(model, adapter_of(model), "style", 0.7)
        shapes = {name: shape for name, shape in linear_shapes(spec).items() if name.endswith("attn.to_k")}
        terms = {name: DifferenceTerm(torch.randn(*shape) * 0.02) for name, shape in shapes.items()}
        attach(model, Adapter(spec, terms), "change", 0.5)
    assert run(models, inputs)[1:] == [CAPTURED, REPLAYED]
    seen = [require_same(models, inputs)]
    for name, strength in (("style", 0.3), ("change", -0.4)):
        for model in models:
            set_scale(model, name, strength)
        seen.append(require_same(models, inputs))
        assert models[0].stepper.last == REPLAYED
        assert not torch.equal(seen[-1], seen[-2])


@torch.inference_mode()
def test_control_net_residuals_are_inputs(twins, make_inputs):
    models = twins()
    inputs = make_inputs(models[0].config)
    tokens, width = inputs["hidden_states"].shape[1], 256
    for count in (1, 2):
        for seed in range(3):
            torch.manual_seed(seed)
            residuals = {
                "controlnet_block_samples": [torch.randn(1, tokens, width) for _ in range(count)],
                "controlnet_single_block_samples": [torch.randn(1, tokens, width)],
            }
            require_same(models, {**inputs, **residuals})
        assert models[0].stepper.last == REPLAYED
    require_same(models, inputs)
    assert models[0].stepper.last.startswith("call by call")


# what captured steps must not outlive ---------------------------------------------------------------------------------


def replace_a_norm(model):
    norm = model.transformer_blocks[0].attn.norm_q
    norm.weight = torch.nn.Parameter(norm.weight * 1.5, requires_grad=False)


def replace_a_layer(model):
    attention = model.single_transformer_blocks[1].attn
    torch.manual_seed(0)
    other = copy.copy(attention.to_q)  # shares everything but its own attributes
    other._adapters = {}
    attention.to_q = other


def change_the_type_of_products(model):
    prepare(model, "bf16")
    model.stepper = model._kept_stepper


def cast(model):
    model.to(torch.float64).to(torch.float32)


def replace_the_operators(model):
    model.operators = copy.copy(model.operators)


@torch.inference_mode()
@pytest.mark.parametrize(
    "change", [replace_a_norm, replace_a_layer, change_the_type_of_products, cast, replace_the_operators]
)
def test_a_change_of_the_model_drops_them(twins, make_inputs, change):
    models = twins()
    inputs = make_inputs(models[0].config)
    run(models, inputs)
    for model in models:
        model._kept_stepper = model.stepper
        change(model)
    done = run(models, inputs)
    assert done[0].startswith("call by call: the first step of its shapes")
    assert done[1:] == [CAPTURED, REPLAYED]


# what keeps them away -------------------------------------------------------------------------------------------------


def test_gradients_keep_them_away(twins, make_inputs):
    models = twins()
    assert all("gradients are recorded" in each for each in run(models, make_inputs(models[0].config)))


@torch.inference_mode()
def test_another_runner_keeps_them_away(twins, make_inputs):
    models, seen = twins(), []
    inputs = make_inputs(models[0].config)
    run(models, inputs)
    models[0].runner = lambda step, state: (seen.append(step.index), step(state))
    assert all("runs the blocks" in each for each in run(models, inputs))
    assert len(seen) == 3 * 5
    models[0].runner = run_block
    assert run(models, inputs, 1) == [REPLAYED]


@torch.inference_mode()
def test_a_forward_waits_for_others_before_it_writes_anything(twins, make_inputs):
    """The modulation decodes its weights into the buffer that the step of another stream may be reading."""
    events = []

    class Waiting(Double):
        @contextmanager
        def in_turn(self):
            events.append("in turn")
            yield
            events.append("done")

    model, modulator = twins()[0], twins()[0].modulator
    model.stepper = GraphedSteps(Waiting())
    model.modulator = lambda *given: (events.append("modulation"), modulator(*given))[1]
    for _ in range(3):
        model(**make_inputs(model.config))
    assert model.stepper.last == REPLAYED
    assert events == ["in turn", "modulation", "done"] * 3


@torch.inference_mode()
def test_a_hook_keeps_them_away(twins, make_inputs):
    models, seen = twins(), []
    inputs = make_inputs(models[0].config)
    run(models, inputs)
    hook = models[0].transformer_blocks[1].register_forward_hook(lambda *_: seen.append(1))
    assert "has hooks" in run(models, inputs)[-1]
    assert len(seen) == 3
    hook.remove()
    assert run(models, inputs)[1:] == [CAPTURED, REPLAYED]


@torch.inference_mode()
def test_a_layer_without_kernels_keeps_them_away(twins, make_inputs):
    models = twins()
    linear_layers(models[0])["proj_out"].execution = None
    assert "proj_out" in run(models, make_inputs(models[0].config))[-1]


@torch.inference_mode()
def test_a_compiled_block_keeps_them_away(twins, make_inputs):
    models, inputs = twins(), make_inputs(twins()[0].config)
    assert run(models, inputs)[-1] == REPLAYED
    models[0].transformer_blocks[0].compile(backend="eager")
    done = run(models, inputs)
    assert done[0].startswith("call by call: the first step")
    assert done[1:] == ["call by call: 'transformer_blocks.0' is compiled"] * 2
    torch.compiler.reset()


@torch.inference_mode()
def test_autocast_keeps_them_away(twins, make_inputs):
    models = twins()
    with torch.autocast("cpu", torch.bfloat16):
        models[0](**make_inputs(models[0].config))
    assert "autocast" in models[0].stepper.last


def test_modes_may_change_between_steps(twins, make_inputs):
    models = twins("nf4", "fp8")
    for model in models:
        attach(model, adapter_of(model), "style", 0.7)
    inputs = make_inputs(models[0].config)
    for count, mode in enumerate((torch.inference_mode, torch.no_grad) * 3):
        with mode():
            require_same(models, inputs)
        for model in models:
            set_scale(model, "style", 0.5 + count)
    assert models[0].stepper.last == REPLAYED


@torch.inference_mode()
def test_a_copy_of_a_model_captures_its_own(twins, make_inputs):
    models = twins()
    inputs = make_inputs(models[0].config)
    run(models, inputs)
    copied = copy.deepcopy(models[0])
    attach(copied, adapter_of(copied), "style")
    other = [copied(**inputs).sample for _ in range(3)][-1]
    assert copied.stepper.last == REPLAYED
    assert not torch.equal(other, require_same(models, inputs))
    assert models[0].stepper.last == REPLAYED


def test_prepare_says_whether_steps_are_replayed(twins):
    model = twins()[1]
    assert "NVIDIA" in prepare(model, "fp32").graphs
    assert prepare(model, "fp32", graphs=False).graphs.startswith("off: ")
    assert model.stepper is run_step
