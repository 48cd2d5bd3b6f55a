"""Attach, scale, detach: exact arithmetic on every storage format, and no trace afterwards."""

from __future__ import annotations

import copy
from itertools import permutations

import pytest
import torch

from gossamer.adapters import Adapter, LowRankTerm, attach, attached, base_spec, detach, set_scale
from gossamer.errors import AdapterError, WrongModelError
from gossamer.formats import packing_names
from gossamer.models.swap import linear_layers


def state_of(model):
    """Every byte of the model, its config, and the identity of its parameters."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return tensors, dict(model.config), {name: id(parameter) for name, parameter in model.named_parameters()}


def assert_same_state(model, state):
    tensors, config, identities = state_of(model)
    assert config == state[1]
    assert identities == state[2]
    assert tensors.keys() == state[0].keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == state[0][name].dtype
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), state[0][name].reshape(-1).view(torch.uint8)), name
    assert all(not layer.names() for layer in linear_layers(model).values())
    assert not attached(model)


def dense(model, make_model, adapters):
    """The same computation by plain torch: decoded weights plus scale * multiplier * up @ down, in plain linears."""
    reference = make_model(in_channels=model.config.in_channels, out_channels=64)
    for name, layer in linear_layers(model).items():
        linear = reference.get_submodule(name)
        weight = torch.zeros(linear.weight.shape)
        stored = layer.stored.unpack(torch.float32)
        weight[:, : stored.shape[1]] = stored
        bias = layer.bias.clone()
        for adapter, scale in adapters:
            if name in adapter.terms:
                term = adapter.terms[name]
                strength = scale * term.multiplier
                weight[:, : term.down.shape[1]] += strength * (term.up.float() @ term.down.float())
                bias += 0 if term.bias is None else strength * term.bias.float()
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    for adapter, _ in adapters:
        for name, values in adapter.replacements.items():
            reference.get_parameter(name).copy_(values)
    return reference


@pytest.mark.parametrize("storage", packing_names())
def test_same_effect_on_every_storage_and_no_trace(storage, quantized, make_model, make_adapter, control, paint):
    style = make_adapter(multiplier=0.5)
    # the widened layer, both ends, and every kind of attention projection; searching scales for all takes long
    model = quantized({"x_embedder": storage, "norm_out.linear": storage, "proj_out": storage, "*.attn.*": storage})
    before, plain = state_of(model), paint(model)
    attach(model, style, "style", 0.8)
    torch.testing.assert_close(paint(model), paint(dense(model, make_model, [(style, 0.8)])), rtol=1e-5, atol=1e-5)
    attach(model, control, "control", 1.2)
    both = dense(model, make_model, [(style, 0.8), (control, 1.2)])
    torch.testing.assert_close(paint(model, 128), paint(both, 128), rtol=1e-5, atol=1e-5)
    detach(model, "style")
    detach(model, "control")
    assert_same_state(model, before)
    assert torch.equal(paint(model), plain)


@pytest.mark.parametrize("order_in", list(permutations(("style", "neon", "control"))))
def test_order_does_not_matter(order_in, quantized, make_model, make_adapter, control, paint):
    adapters = {"style": make_adapter(seed=1), "neon": make_adapter(seed=2, rank=2), "control": control}
    model = quantized("nf4")
    before = state_of(model)
    for name in order_in:
        attach(model, adapters[name], name, 0.5)
    assert model.config.in_channels == 128
    reference = dense(model, make_model, [(adapter, 0.5) for adapter in adapters.values()])
    torch.testing.assert_close(paint(model, 128), paint(reference, 128), rtol=1e-5, atol=1e-5)
    for name in ("control", "style", "neon"):
        detach(model, name)
        assert model.config.in_channels == 64
    assert_same_state(model, before)


def test_style_stays_right_when_control_goes(quantized, make_model, make_adapter, control, paint):
    style = make_adapter(seed=1)
    model = quantized("int8")
    attach(model, control, "control")
    attach(model, style, "style")
    assert detach(model, "control") is control
    torch.testing.assert_close(paint(model), paint(dense(model, make_model, [(style, 1.0)])), rtol=1e-5, atol=1e-5)


def test_scale_changes_between_calls(quantized, make_model, make_adapter, paint):
    style = make_adapter(multiplier=0.5)
    model = quantized("nf4")
    plain = paint(model)
    attach(model, style, "style", 1.0)
    set_scale(model, "style", 0.3)
    assert attached(model)["style"].scale == 0.3
    torch.testing.assert_close(paint(model), paint(dense(model, make_model, [(style, 0.3)])), rtol=1e-5, atol=1e-5)
    set_scale(model, "style", 0.0)
    assert torch.equal(paint(model), plain)


def test_half_precision_factors_are_kept_and_added_in_float32(quantized, make_model, make_adapter, paint):
    source = make_adapter()
    terms = {name: LowRankTerm(term.down.bfloat16(), term.up.half()) for name, term in source.terms.items()}
    adapter = Adapter(source.spec, terms)
    model = quantized("nf4")
    attach(model, adapter, "half")
    low_rank = next(linear_layers(model)["proj_out"].adapters())
    assert (low_rank.down.dtype, low_rank.up.dtype) == (torch.bfloat16, torch.float16)
    torch.testing.assert_close(paint(model), paint(dense(model, make_model, [(adapter, 1.0)])), rtol=1e-5, atol=1e-5)


def test_plain_adapter_on_a_model_that_reads_more_channels(quantized, make_model, make_adapter, paint):
    style = make_adapter()
    model = quantized("fp8", in_channels=128, out_channels=64)
    attach(model, style, "style")
    assert model.config.in_channels == 128
    torch.testing.assert_close(
        paint(model, 128), paint(dense(model, make_model, [(style, 1.0)]), 128), rtol=1e-5, atol=1e-5
    )


def test_originals_follow_the_model_through_a_cast(quantized, control):
    model = quantized("nf4")
    attach(model, control, "control")
    model.to(torch.bfloat16)
    detach(model, "control")
    assert model.transformer_blocks[0].attn.norm_q.weight.dtype == torch.bfloat16


def test_a_copied_model_is_independent(quantized, control, paint):
    model = quantized("nf4")
    before = state_of(model)
    attach(model, control, "control")
    twin = copy.deepcopy(model)
    detach(model, "control")
    assert_same_state(model, before)
    assert list(attached(twin)) == ["control"]
    detach(twin, "control")
    assert torch.equal(paint(twin), paint(model))


def test_base_spec_ignores_control(quantized, control, spec):
    model = quantized()
    attach(model, control, "control")
    assert base_spec(model) == spec


def unchanged_by(model, call, error, match):
    before = copy.deepcopy(list(attached(model))), model.config.in_channels
    names = {name: layer.names() for name, layer in linear_layers(model).items()}
    with pytest.raises(error, match=match) as caught:
        call()
    assert caught.value.why
    assert caught.value.next_step
    assert (list(attached(model)), model.config.in_channels) == before
    assert {name: layer.names() for name, layer in linear_layers(model).items()} == names


def test_a_name_twice(quantized, make_adapter):
    model = quantized()
    attach(model, make_adapter(), "style")
    unchanged_by(model, lambda: attach(model, make_adapter(seed=3), "style"), AdapterError, "already attached")


def test_unknown_names(quantized, make_adapter):
    model = quantized()
    attach(model, make_adapter(), "style")
    unchanged_by(model, lambda: detach(model, "neon"), AdapterError, r"'neon'[\s\S]*Attached: style")
    unchanged_by(model, lambda: set_scale(model, "neon", 1.0), AdapterError, "'neon'")


def test_two_adapters_that_replace_the_same_norms(quantized, control):
    model = quantized()
    attach(model, control, "canny")
    unchanged_by(model, lambda: attach(model, control, "depth"), AdapterError, "norm scales that 'canny'")


def test_a_model_that_was_not_swapped(make_model, make_adapter):
    with pytest.raises(AdapterError, match="cannot take an adapter"):
        attach(make_model(), make_adapter(), "style")


def test_a_model_with_one_plain_linear(quantized, make_adapter):
    model = quantized()
    model.transformer_blocks[0].attn.to_q = torch.nn.Linear(256, 256)
    unchanged_by(
        model, lambda: attach(model, make_adapter(), "style"), AdapterError, r"1 layers[\s\S]*blocks\.0\.attn\.to_q"
    )


def test_a_model_of_another_size(quantized, make_adapter):
    model = quantized(num_layers=2)
    unchanged_by(model, lambda: attach(model, make_adapter(), "style"), WrongModelError, "another model")


def test_a_term_that_was_removed_behind_our_back(quantized, make_adapter):
    model = quantized()
    attach(model, make_adapter(), "style")
    linear_layers(model)["proj_out"].remove("style")
    unchanged_by(model, lambda: detach(model, "style"), AdapterError, "'proj_out'")
