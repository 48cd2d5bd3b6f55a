"""One strength for all terms of an adapter: what it costs, whom it reaches, and what is noticed when parts are gone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from gossamer.adapters import Adapter, LowRankTerm, attach, attached, set_scale
from gossamer.adapters.places import Places
from gossamer.errors import AdapterError
from gossamer.layers import LowRank, QuantLinear
from gossamer.models.swap import linear_layers

LAYER = "transformer_blocks.0.attn.to_k"


@pytest.fixture
def model(quantized, make_adapter):
    model = quantized("nf4")
    attach(model, make_adapter(multiplier=0.5), "style", 0.8)
    attach(model, make_adapter(seed=1), "other", 0.3)
    return model


def scales(model, name="style"):
    layers = linear_layers(model).items()
    return {place: term.scale for place, layer in layers for term in layer.adapters() if term.name == name}


def refused(model, scale, match):
    before, others = scales(model), scales(model, "other")
    with pytest.raises(AdapterError, match=match) as caught:
        set_scale(model, "style", scale)
    assert caught.value.why
    assert caught.value.next_step
    assert (scales(model), scales(model, "other")) == (before, others)
    assert attached(model)["style"].scale == 0.8


# what a change does ---------------------------------------------------------------------------------------------------


def test_a_change_looks_into_no_layer(model, monkeypatch):
    for name in ("has", "share", "changed", "adapters"):
        monkeypatch.setattr(QuantLinear, name, None)
    set_scale(model, "style", -0.6)
    monkeypatch.undo()
    assert set(scales(model).values()) == {-0.6 * 0.5}
    assert set(scales(model, "other").values()) == {0.3}


def test_only_layers_that_are_switched_on_or_off_change(spec, quantized):
    names = ("proj_out", LAYER)
    terms = [LowRankTerm(torch.randn(2, 256), torch.randn(out, 2)) for out in (64, 256)]
    without = LowRankTerm(terms[1].down, terms[1].up, multiplier=0.0)
    model = quantized("nf4")
    attach(model, Adapter(spec, dict(zip(names, (terms[0], without), strict=True))), "style", 0.8)
    layers = [linear_layers(model)[name] for name in (*names, "x_embedder")]
    before = [layer.revision for layer in layers]
    set_scale(model, "style", 0.0)
    assert [layer.revision > then for layer, then in zip(layers, before, strict=True)] == [True, False, False]


def test_a_layer_that_was_set_alone_comes_back(model, paint):
    picture = paint(model)
    linear_layers(model)[LAYER].set_scale("style", 3.0)
    assert scales(model)[LAYER] == 3.0
    assert len(set(scales(model).values())) == 2
    assert not torch.equal(paint(model), picture)
    for scale in (0.5, 0.8):
        set_scale(model, "style", scale)
        assert set(scales(model).values()) == {scale * 0.5}
    assert torch.equal(paint(model), picture)


def test_a_term_that_was_replaced_gets_the_strength(model):
    layer = linear_layers(model)[LAYER]
    layer.remove("style")
    layer.add(LowRank("style", torch.randn(2, 256), torch.randn(256, 2), 9.0))
    set_scale(model, "style", 0.5)
    assert set(scales(model).values()) == {0.25}


def test_copies_have_strengths_of_their_own(model, paint):
    picture, twin = paint(model), copy.deepcopy(model)
    set_scale(twin, "style", 0.1)
    assert set(scales(twin).values()) == {0.05}
    assert attached(twin)["style"].scale == 0.1
    assert set(scales(model).values()) == {0.4}
    assert attached(model)["style"].scale == 0.8
    assert torch.equal(paint(model), picture)
    set_scale(model, "style", 0.1)
    assert torch.equal(paint(model), paint(twin))


# what is noticed ------------------------------------------------------------------------------------------------------


def test_a_term_that_is_gone(model):
    set_scale(model, "style", 0.8)
    linear_layers(model)["proj_out"].remove("style")
    refused(model, 0.5, "'proj_out'")


def test_a_term_that_went_to_another_layer(model):
    layers = linear_layers(model)
    target = layers[LAYER.replace("to_k", "to_q")]
    target.remove("style")
    target.add(layers[LAYER].remove("style"))
    refused(model, 0.5, "to_k")


@pytest.mark.parametrize("path", [LAYER, "transformer_blocks.0.attn", "transformer_blocks.0", "transformer_blocks"])
def test_a_module_on_the_way_that_was_replaced(model, path):
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, copy.deepcopy(model.get_submodule(path)))
    refused(model, 0.5, "Parts of the adapter 'style' are gone")


def test_a_layer_that_is_no_longer_there(model):
    del model.transformer_blocks[0].attn.to_k
    refused(model, 0.5, "Parts of the adapter 'style' are gone")


def test_places_hold_until_a_step_is_another_module():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.ReLU())
    places = Places.of(model, {"0.1": model[0][1]})
    model[0][0] = model[1] = nn.Identity()
    assert places.hold(), "neither is on the way"
    kept, model[0][1] = model[0][1], nn.Linear(2, 2)
    assert not places.hold()
    model[0][1] = kept
    assert places.hold()


def test_adapters_on_the_same_layers_share_their_places_while_these_hold(model, make_adapter):
    style, other = (attached(model)[name].places for name in ("style", "other"))
    assert style is other
    model.transformer_blocks[0].attn.to_k = copy.deepcopy(model.transformer_blocks[0].attn.to_k)
    attach(model, make_adapter(seed=2), "third")
    third = attached(model)["third"].places
    assert third is not style
    assert third.hold()
    assert third.layers[LAYER] is model.transformer_blocks[0].attn.to_k


def test_adapters_on_other_layers_have_places_of_their_own(spec, quantized):
    model, down, up = quantized("nf4"), torch.randn(2, 256), torch.randn(256, 2)
    for name in ("to_k", "to_q"):
        attach(model, Adapter(spec, {LAYER.replace("to_k", name): LowRankTerm(down, up)}), name)
    assert attached(model)["to_k"].places.layers.keys() != attached(model)["to_q"].places.layers.keys()


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, -1e39])
def test_scales_that_no_product_can_use(model, scale):
    refused(model, scale, "cannot act at scale")


def test_every_multiplier_counts(spec, quantized):
    """A scale that one term alone cannot have is refused for all."""
    factors = torch.randn(2, 256), torch.randn(256, 2)
    terms = {LAYER: LowRankTerm(*factors, 1.0), LAYER.replace("to_k", "to_q"): LowRankTerm(*factors, -1e30)}
    model = quantized("nf4")
    attach(model, Adapter(spec, terms), "style", 0.8)
    refused(model, 1e10, "Times the factor in its file that is -1e\\+40")
