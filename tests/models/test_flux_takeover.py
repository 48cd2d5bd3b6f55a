"""Taking over diffusers' model: names, sharing, config, and what is refused."""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig

from gossamer.adapters import Adapter, LowRankTerm, attach, detach
from gossamer.errors import InvalidOptionError, WrongModelError
from gossamer.models.flux import FluxTransformer, from_diffusers
from gossamer.models.flux_spec import FluxSpec, linear_shapes, norm_shapes
from gossamer.models.swap import linear_layers, quantize


def test_parameters_are_shared_under_the_same_names(make_diffusers):
    theirs = make_diffusers()
    ours = from_diffusers(theirs)
    expected = dict(theirs.named_parameters())
    assert set(dict(ours.named_parameters())) == set(expected)
    assert all(parameter is expected[name] for name, parameter in ours.named_parameters())
    assert not list(ours.buffers())


@pytest.mark.parametrize("changes", [{}, {"guidance_embeds": False}, {"in_channels": 384, "out_channels": 64}])
def test_a_new_model_has_the_tensors_of_diffusers(changes):
    with torch.device("meta"):
        ours, theirs = FluxTransformer(**changes), FluxTransformer2DModel(**changes)
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == {
        name: tensor.shape for name, tensor in theirs.state_dict().items()
    }
    spec = FluxSpec.from_config(ours.config)
    assert len(ours.state_dict()) == 2 * len(linear_shapes(spec)) + len(norm_shapes(spec))


def test_packed_linears_are_shared(make_diffusers):
    theirs = make_diffusers()
    quantize(theirs, "nf4")
    ours = from_diffusers(theirs)
    expected = linear_layers(theirs)
    assert set(linear_layers(ours)) == set(expected)
    assert all(layer is expected[name] for name, layer in linear_layers(ours).items())


def test_constructor_and_forward_have_the_arguments_of_diffusers():
    for ours, theirs in (
        (FluxTransformer.__init__, FluxTransformer2DModel.__init__),
        (FluxTransformer.forward, FluxTransformer2DModel.forward),
    ):
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)


def test_config_type_and_device(make_diffusers):
    theirs = make_diffusers(in_channels=40, out_channels=16).to(torch.bfloat16)
    ours = from_diffusers(theirs)
    assert {name: ours.config[name] for name in theirs.config if not name.startswith("_")} == {
        name: theirs.config[name] for name in theirs.config if not name.startswith("_")
    }
    assert (ours.dtype, ours.device.type, ours.training) == (torch.bfloat16, "cpu", False)
    ours.register_to_config(in_channels=48)
    assert ours.config.in_channels == 48
    assert theirs.config.in_channels == 40


@torch.inference_mode()
def test_adapters_of_ours_attach_and_detach(make_diffusers, make_inputs):
    theirs = make_diffusers()
    quantize(theirs, "fp32")
    ours, inputs = from_diffusers(theirs), make_inputs(theirs.config)
    before = ours(**inputs).sample
    spec = FluxSpec.from_config(ours.config)
    terms = {
        name: LowRankTerm(0.1 * torch.randn(2, shape[1]), 0.1 * torch.randn(shape[0], 2))
        for name, shape in linear_shapes(spec).items()
    }
    attach(ours, Adapter(spec, terms), "style")
    adapted = ours(**inputs).sample
    torch.testing.assert_close(adapted, theirs(**inputs).sample, rtol=1e-4, atol=1e-5)
    assert (adapted - before).norm() > 0.01 * before.norm()
    with pytest.raises(InvalidOptionError, match="adapters attached: style"):
        from_diffusers(theirs)
    detach(ours, "style")
    assert torch.equal(ours(**inputs).sample, before)


@torch.inference_mode()
def test_adapters_of_peft_go_by_the_same_names(make_diffusers, make_inputs):
    theirs = make_diffusers()
    ours = from_diffusers(make_diffusers())
    inputs = make_inputs(theirs.config)
    targets = ["to_q", "add_k_proj", "to_out.0", "proj_mlp", "net.0.proj", "norm1.linear"]
    for model in (theirs, ours):
        model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    ours.load_state_dict(theirs.state_dict())
    full, half, none = (
        (theirs(**inputs, joint_attention_kwargs=kwargs).sample, ours(**inputs, joint_attention_kwargs=kwargs).sample)
        for kwargs in ({"scale": 1.0}, {"scale": 0.5}, None)
    )
    for expected, got in (full, half, none):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert (full[1] - half[1]).norm() > 0.01 * full[1].norm()
    assert torch.equal(full[1], none[1])
    with pytest.raises(InvalidOptionError, match="adapters attached: default"):
        from_diffusers(theirs)


# what is refused


def test_another_model():
    with pytest.raises(WrongModelError, match="Linear cannot be taken over"):
        from_diffusers(torch.nn.Linear(2, 2))


def test_hooks_and_replaced_forwards(make_diffusers):
    hooked = make_diffusers()
    hooked.transformer_blocks[0].register_forward_hook(lambda *arguments: None)
    with pytest.raises(InvalidOptionError, match="hooks"):
        from_diffusers(hooked)
    replaced = make_diffusers()
    replaced.forward = lambda **inputs: None
    with pytest.raises(InvalidOptionError, match="replaced forward"):
        from_diffusers(replaced)


def test_the_hooks_of_a_linear_go_along(make_diffusers, make_inputs):
    theirs = make_diffusers()
    called = []
    theirs.transformer_blocks[0].attn.to_q.register_forward_hook(lambda *arguments: called.append("to_q"))
    from_diffusers(theirs)(**make_inputs(theirs.config))
    assert called == ["to_q"]


def test_another_attention(make_diffusers):
    theirs = make_diffusers()
    theirs.set_attention_backend("native")
    with pytest.raises(InvalidOptionError, match="not the default one"):
        from_diffusers(theirs)


def test_fused_projections(make_diffusers):
    theirs = make_diffusers()
    theirs.fuse_qkv_projections()
    with pytest.raises(WrongModelError, match="to_qkv"):
        from_diffusers(theirs)
