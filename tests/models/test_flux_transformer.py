"""Our forward against diffusers' own, over configs, types, batches and every optional input."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from gossamer.errors import InvalidOptionError, UnknownOptionError, UnsupportedShapeError
from gossamer.models.flux import FluxTransformer, from_diffusers
from gossamer.models.flux.modulation import Conditions
from gossamer.models.swap import quantize

CONFIGS = {
    "dev": {},
    "schnell": {"guidance_embeds": False},
    "fill": {"in_channels": 40, "out_channels": 16},
    "patches of 2": {"patch_size": 2, "out_channels": 4},
    "heads of 16, four axes": {"attention_head_dim": 16, "axes_dims_rope": (4, 4, 4, 4)},
    "no single blocks": {"num_single_layers": 0},
    "no double blocks": {"num_layers": 0},
}


def relative_error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("batch", [1, 3])
@torch.inference_mode()
def test_float32_equals_diffusers(make_diffusers, make_inputs, changes, batch):
    theirs = make_diffusers(**changes)
    inputs = make_inputs(theirs.config, batch)
    if len(theirs.config.axes_dims_rope) == 4:
        inputs |= {name: torch.nn.functional.pad(inputs[name], (1, 0), value=2.0) for name in ("img_ids", "txt_ids")}
    assert relative_error(from_diffusers(theirs)(**inputs).sample, theirs(**inputs).sample) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_half_types_are_no_further_from_float32_than_diffusers(make_diffusers, make_inputs, dtype):
    theirs = make_diffusers().to(dtype)
    inputs = make_inputs(theirs.config, batch=2, dtype=dtype)
    in_type, ours = theirs(**inputs).sample, from_diffusers(theirs)(**inputs).sample
    assert ours.dtype == dtype
    wide = {name: tensor.float() for name, tensor in inputs.items()}
    exact = theirs.float()(**wide).sample
    assert 0 < relative_error(ours, exact) <= 1.1 * relative_error(in_type, exact)


@pytest.mark.parametrize(("text_tokens", "side"), [(1, 1), (17, 5), (0, 3)])
@torch.inference_mode()
def test_any_number_of_tokens(make_diffusers, make_inputs, text_tokens, side):
    theirs = make_diffusers()
    inputs = make_inputs(theirs.config, text_tokens=text_tokens, side=side)
    assert relative_error(from_diffusers(theirs)(**inputs).sample, theirs(**inputs).sample) <= 1e-5


@torch.inference_mode()
def test_ids_with_a_batch_dimension_and_a_tuple(make_diffusers, make_inputs):
    ours = from_diffusers(make_diffusers())
    inputs = make_inputs(ours.config, batch=2)
    result = ours(**inputs)
    assert isinstance(result, Transformer2DModelOutput)
    batched = {name: inputs[name].expand(2, -1, -1) for name in ("img_ids", "txt_ids")}
    (sample,) = ours(**inputs | batched, return_dict=False)
    assert torch.equal(sample, result.sample)


@pytest.mark.parametrize("repeated", [False, True], ids=["spread", "repeated"])
@pytest.mark.parametrize(("double", "single"), [(2, 3), (1, 2), (2, 0), (0, 1)])
@torch.inference_mode()
def test_controlnet_residuals(make_diffusers, make_inputs, double, single, repeated):
    theirs = make_diffusers(num_layers=3, num_single_layers=4)
    inputs = make_inputs(theirs.config, batch=2)
    generator = torch.Generator().manual_seed(2)
    tokens = inputs["hidden_states"].shape[1]

    def residuals(count):
        return [torch.randn(2, tokens, 64, generator=generator) for _ in range(count)] or None

    inputs |= {
        "controlnet_block_samples": residuals(double),
        "controlnet_single_block_samples": residuals(single),
        "controlnet_blocks_repeat": repeated,
    }
    expected = theirs(**inputs).sample
    assert relative_error(from_diffusers(theirs)(**inputs).sample, expected) <= 1e-5
    assert relative_error(theirs(**make_inputs(theirs.config, batch=2)).sample, expected) > 0.01


@torch.inference_mode()
def test_inputs_are_left_as_they_were(make_diffusers, make_inputs):
    ours = from_diffusers(make_diffusers())
    inputs = make_inputs(ours.config)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    weights = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    ours(**inputs)
    assert all(torch.equal(inputs[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in weights.items())


@torch.inference_mode()
def test_packed_linears_give_what_they_give_in_diffusers(make_diffusers, make_inputs):
    theirs = make_diffusers()
    quantize(theirs, {"*.proj_mlp": "int8", "*": "nf4"}, compute=torch.float32)
    inputs = make_inputs(theirs.config, batch=2)
    assert relative_error(from_diffusers(theirs)(**inputs).sample, theirs(**inputs).sample) <= 1e-5


def test_layerwise_casting_casts_what_it_casts_in_diffusers(make_diffusers, make_inputs):
    theirs, ours = make_diffusers(), from_diffusers(make_diffusers())
    inputs = make_inputs(theirs.config)
    with torch.no_grad():
        before = ours(**inputs).sample
        for model in (theirs, ours):
            model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        types = {name: parameter.dtype for name, parameter in theirs.named_parameters()}
        assert {name: parameter.dtype for name, parameter in ours.named_parameters()} == types
        assert relative_error(ours(**inputs).sample, theirs(**inputs).sample) <= 1e-5
        assert relative_error(ours(**inputs).sample, before) > 1e-3


@torch.inference_mode()
def test_modulation_of_several_steps_at_once(make_diffusers, make_inputs):
    ours = from_diffusers(make_diffusers())
    inputs = make_inputs(ours.config, batch=3)
    arguments = (inputs["timestep"], inputs["guidance"], inputs["pooled_projections"])
    together = ours.modulation(ours.condition(Conditions(*arguments, torch.float32)))
    for row in range(3):
        one = Conditions(*(argument[row : row + 1] for argument in arguments), torch.float32)
        alone = ours.modulation(ours.condition(one))
        torch.testing.assert_close(alone.double[1].text.mlp_gate[0], together.double[1].text.mlp_gate[row])
        torch.testing.assert_close(alone.single[2].norm.shift[0], together.single[2].norm.shift[row])
        torch.testing.assert_close(alone.out.scale[0], together.out.scale[row])


@torch.inference_mode()
def test_compiles_without_a_graph_break(make_diffusers, make_inputs):
    ours = from_diffusers(make_diffusers())
    inputs = make_inputs(ours.config, batch=2)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    assert relative_error(compiled(**inputs).sample, ours(**inputs).sample) <= 1e-5


def test_a_saved_model_loads_again(make_diffusers, make_inputs, tmp_path):
    ours = from_diffusers(make_diffusers())
    ours.save_pretrained(tmp_path)
    again = FluxTransformer.from_pretrained(tmp_path)
    inputs = make_inputs(ours.config)
    assert torch.equal(again(**inputs).sample, ours(**inputs).sample)


# what is refused


@pytest.mark.parametrize("guidance_embeds", [True, False])
def test_guidance_has_to_fit_the_model(make_diffusers, make_inputs, guidance_embeds):
    ours = from_diffusers(make_diffusers(guidance_embeds=guidance_embeds))
    inputs = make_inputs(ours.config) | {"guidance": None if guidance_embeds else torch.ones(1)}
    with pytest.raises(InvalidOptionError, match="guidance value"):
        ours(**inputs)


def test_ids_have_to_fit_the_tokens(make_diffusers, make_inputs):
    ours = from_diffusers(make_diffusers())
    inputs = make_inputs(ours.config)
    with pytest.raises(UnsupportedShapeError):
        ours(**inputs | {"img_ids": inputs["img_ids"][1:]})
    with pytest.raises(InvalidOptionError, match="4 axes"):
        ours(**inputs | {name: torch.nn.functional.pad(inputs[name], (0, 1)) for name in ("img_ids", "txt_ids")})


def test_entries_that_nothing_reads_are_refused(make_diffusers, make_inputs):
    ours = from_diffusers(make_diffusers())
    inputs = make_inputs(ours.config)
    with pytest.raises(UnknownOptionError, match="ip_adapter_image_embeds"):
        ours(**inputs, joint_attention_kwargs={"ip_adapter_image_embeds": []})
    with pytest.raises(InvalidOptionError, match="no adapter"):
        ours(**inputs, joint_attention_kwargs={"scale": 0.5})
    with pytest.raises(InvalidOptionError, match="cannot be enabled"):
        ours.enable_cache(object())
    with pytest.raises(ValueError, match="group offloading"):
        ours.enable_group_offload(torch.device("cpu"))
