from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import FluxTransformer2DModel

from gossamer.adapters import attach
from gossamer.bench.metrics import relative_error
from gossamer.bench.random_flux import (
    ADAPTERS,
    FLUX_DEV,
    Workload,
    adapter_bytes,
    block_linears,
    fill,
    full_size,
    random_adapters,
    random_tensor,
    reference,
    step_inputs,
    tiny,
    weight_shapes,
)
from gossamer.models.flux import FluxTransformer
from gossamer.models.swap import quantize


@pytest.fixture(scope="module")
def work() -> Workload:
    return tiny(torch.device("cpu"))


def test_names_and_shapes_are_those_of_diffusers():
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(FLUX_DEV)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert weight_shapes(full_size(torch.device("cpu")).spec) == expected
    assert not dict(model.named_buffers())


def test_a_tensor_follows_from_its_name(work):
    one, two = (random_tensor(name, (64, 64), work) for name in ("a.weight", "b.weight"))
    assert torch.equal(one, random_tensor("a.weight", (64, 64), work))
    assert not torch.equal(one, two)
    assert one.dtype == torch.bfloat16
    assert float(one.float().std()) == pytest.approx(work.std, rel=0.05)


def test_norm_scales_lie_around_one(work):
    scale = random_tensor("transformer_blocks.0.attn.norm_q.weight", (4096,), work)
    assert float(scale.float().mean()) == pytest.approx(1.0, abs=0.01)
    assert abs(float(random_tensor("norm_out.linear.weight", (4096,), work).float().mean())) < 0.01


def test_the_full_size_step_has_4608_tokens():
    inputs = step_inputs(replace(full_size(torch.device("cpu")), config={**FLUX_DEV, "joint_attention_dim": 8}))
    assert inputs["hidden_states"].shape == (1, 4096, 64)
    assert inputs["encoder_hidden_states"].shape[1] == 512
    assert inputs["img_ids"].shape == (4096, 3)
    assert inputs["img_ids"][65].tolist() == [0.0, 1.0, 1.0]


def test_a_thousand_times_guidance_and_timestep_are_bf16_numbers(work):
    inputs = step_inputs(work)
    for name in ("timestep", "guidance"):
        exact = inputs[name].double() * 1000
        assert torch.equal(exact.to(torch.bfloat16).double(), exact)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_are_on_every_linear_inside_the_blocks(work, kind):
    adapters = random_adapters(work, kind)
    assert [{term.rank for term in adapter.terms.values()} for adapter in adapters] == [{r} for r in ADAPTERS[kind]]
    assert all(set(adapter.terms) == set(block_linears(work.spec)) for adapter in adapters)
    values_per_rank = sum(rows + width for rows, width in block_linears(work.spec).values())
    assert adapter_bytes(adapters) == 2 * sum(ADAPTERS[kind]) * values_per_rank


def test_adapters_of_one_kind_differ(work):
    name = "single_transformer_blocks.0.proj_mlp"
    one, two = (adapter.terms[name] for adapter in random_adapters(work, "4xr16")[:2])
    assert not torch.equal(one.down, two.down)


@pytest.mark.parametrize("kind", ["none", "r16", "4xr16"])
def test_our_float32_forward_meets_the_reference(work, kind):
    with torch.device("meta"):
        model = FluxTransformer.from_config(work.config)
    fill(model, work, torch.float32)
    quantize(model, "fp32", compute=torch.float32)
    for place, adapter in enumerate(random_adapters(work, kind)):
        attach(model, adapter, str(place))
    with torch.no_grad():
        sample = model(**step_inputs(work, torch.float32), return_dict=False)[0]
    expected = reference(work, kind)
    assert relative_error(sample, expected) < 1e-5
    assert kind == "none" or relative_error(reference(work, "none"), expected) > 0.05, "the adapters do nothing"
