"""Real CUDA graphs: bit by bit what the same model gives call by call, whatever changes between steps."""

from __future__ import annotations

import pytest
import torch

from gossamer.adapters import Adapter, LowRankTerm, attach, detach, set_scale
from gossamer.models.flux import from_diffusers, prepare, run_step
from gossamer.models.flux.prepass import Prepass
from gossamer.models.flux_spec import FluxSpec, linear_shapes
from gossamer.models.swap import quantize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WIDE = {
    "attention_head_dim": 128,
    "num_attention_heads": 4,
    "axes_dims_rope": (16, 56, 56),
    "joint_attention_dim": 64,
    "in_channels": 64,
    "pooled_projection_dim": 64,
}
PATHS = [
    ("bf16", "bf16", False),
    ("nf4", "bf16", False),
    ("nf4", "fp8", False),
    ("fp8", "fp8", True),
    ("int8", "int8", False),
]


class Run:
    """A scheduler, as the pre-pass reads it."""

    def __init__(self, count=8):
        self.timesteps = torch.linspace(1000.0, 125.0, count, device="cuda")
        self.step_index, self.begin_index = 0, 0


@pytest.fixture(params=PATHS, ids=lambda path: "-".join(map(str, path)))
def model(request, make_diffusers):
    storage, compute, keeps_merged = request.param
    if compute == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 units")
    model = from_diffusers(make_diffusers(**WIDE)).to(torch.bfloat16)
    quantize(model, storage)
    model.to("cuda")
    assert prepare(model, compute, keeps_merged=keeps_merged).graphs == "on"
    return model


@pytest.fixture
def inputs_of(make_inputs):
    """Of two sizes, as the pipelines make them."""

    def make(model, side=8, **options):
        made = make_inputs(model.config, dtype=torch.bfloat16, side=side, **options)
        return {name: value.to("cuda") for name, value in made.items()}

    return make


def adapter_of(model, rank=16, seed=3):
    torch.manual_seed(seed)
    spec = FluxSpec.from_config(model.config)
    shapes = {name: shape for name, shape in linear_shapes(spec).items() if "transformer_blocks." in name}
    factors = {name: (torch.randn(rank, columns), torch.randn(rows, rank)) for name, (rows, columns) in shapes.items()}
    terms = {name: LowRankTerm(down.bfloat16() * 0.02, up.bfloat16() * 0.02) for name, (down, up) in factors.items()}
    return Adapter(spec, terms)


def both_ways(model, inputs):
    """A step by the model's stepper, and call by call; how the first was run."""
    stepper = model.stepper
    found = model(**inputs, return_dict=False)[0]
    done, model.stepper = stepper.last, run_step
    expected = model(**inputs, return_dict=False)[0]
    model.stepper = stepper
    assert found.isfinite().all()
    assert torch.equal(found, expected), done
    return found, done


def warm(model, inputs):
    for _ in range(2):
        model(**inputs)
    assert model.stepper.last == "captured"


@torch.no_grad()
def test_steps_of_a_run(model, inputs_of):
    inputs, schedule = inputs_of(model), Run()
    model.modulator = Prepass(model, schedule)
    seen = []
    for step in range(6):
        schedule.step_index = step
        torch.manual_seed(step)
        latents = torch.randn_like(inputs["hidden_states"])
        given = {
            **inputs,
            "hidden_states": latents,
            "timestep": (schedule.timesteps[step : step + 1] / 1000).bfloat16(),
        }
        found, done = both_ways(model, given)
        seen.append(done)
    assert seen[1:] == ["captured", *["replayed"] * 4]
    other, done = both_ways(model, {**given, "guidance": given["guidance"] + 1})
    assert done == "replayed"
    assert not torch.equal(found, other)


@torch.no_grad()
def test_two_resolutions_and_batches_take_turns(model, inputs_of):
    kinds = [inputs_of(model), inputs_of(model, side=12), inputs_of(model, batch=2)]
    for inputs in kinds:
        warm(model, inputs)
    for _ in range(2):
        for inputs in kinds:
            assert both_ways(model, inputs)[1] == "replayed"


@torch.no_grad()
def test_adapters_come_change_and_go(model, inputs_of):
    inputs = inputs_of(model)
    warm(model, inputs)
    bare = both_ways(model, inputs)[0]
    attach(model, adapter_of(model), "style", 0.8)
    warm(model, inputs)
    found = [both_ways(model, inputs)]
    for strength in (0.4, -0.3):
        set_scale(model, "style", strength)
        found.append(both_ways(model, inputs))
    assert [done for _, done in found] == ["replayed"] * 3
    assert not torch.equal(found[0][0], found[1][0])
    detach(model, "style")
    warm(model, inputs)
    assert torch.equal(both_ways(model, inputs)[0], bare)


@torch.no_grad()
def test_an_adapter_at_another_strength_is_the_same_as_set_later(model, inputs_of):
    inputs = inputs_of(model)
    attach(model, adapter_of(model), "style", 0.4)
    expected = both_ways(model, inputs)[0]
    detach(model, "style")
    attach(model, adapter_of(model), "style", 1.0)
    warm(model, inputs)
    set_scale(model, "style", 0.4)
    found, done = both_ways(model, inputs)
    assert done == "replayed"
    assert torch.equal(found, expected)


@torch.no_grad()
def test_control_net_residuals(model, inputs_of):
    inputs = inputs_of(model)
    for seed in range(4):
        torch.manual_seed(seed)
        samples = [torch.randn(1, inputs["hidden_states"].shape[1], 512, device="cuda").bfloat16() for _ in range(2)]
        given = {**inputs, "controlnet_block_samples": samples, "controlnet_single_block_samples": samples[:1]}
        done = both_ways(model, given)[1]
    assert done == "replayed"


@torch.no_grad()
def test_streams_take_turns(model, inputs_of):
    inputs, other = inputs_of(model), inputs_of(model)
    other["hidden_states"] = other["hidden_states"] * 0.5
    warm(model, inputs)
    expected = [both_ways(model, each)[0] for each in (inputs, other)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    first = model(**inputs, return_dict=False)[0]
    with torch.cuda.stream(stream):
        second = model(**other, return_dict=False)[0]
    torch.cuda.synchronize()
    assert torch.equal(first, expected[0])
    assert torch.equal(second, expected[1])


@torch.no_grad()
def test_more_shapes_take_hardly_more_memory(model, inputs_of):
    """All graphs share the memory between their kernels; what each has of its own are its inputs."""
    large = inputs_of(model, side=48)
    warm(model, large)
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    for side in (40, 32, 24):
        warm(model, inputs_of(model, side=side))
    assert torch.cuda.memory_reserved() - before < 64 * 2**20
    assert both_ways(model, large)[1] == "replayed"


@torch.no_grad()
def test_memory_comes_back(model, inputs_of):
    inputs = inputs_of(model, side=48)
    model.stepper, stepper = run_step, model.stepper
    model(**inputs)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    model.stepper = stepper
    warm(model, inputs)
    assert torch.cuda.memory_reserved() > before
    stepper.release()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before < 80 * 2**20  # workspaces of libraries stay
