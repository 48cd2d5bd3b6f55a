"""Strengths that change over the steps of a run, and are what they were whatever ends it."""

from __future__ import annotations

import pytest
import torch

from gossamer.adapters import attach, attached, detach, set_scale
from gossamer.adapters.schedule import over_steps
from gossamer.errors import AdapterError
from gossamer.layers import QuantLinear
from gossamer.models.swap import linear_layers


@pytest.fixture
def model(quantized, make_adapter):
    model = quantized("nf4")
    for seed, name in enumerate(("style", "other", "third")):
        attach(model, make_adapter(multiplier=0.5, seed=seed), name, 0.8)
    return model


def scales(model):
    """Every scale there is: on record, and on each layer."""
    layers = linear_layers(model).items()
    return (
        {name: record.scale for name, record in attached(model).items()},
        {(place, term.name): term.scale for place, layer in layers for term in layer.adapters()},
    )


def test_each_step_has_its_strength(model, paint):
    before = scales(model)
    factors = {"style": lambda step: float(step >= 1), "other": lambda step: 1 - step / 4}
    with over_steps(model, factors) as at_step:
        for step in (0, 1, 1, 3, 2):  # in any order, as often as wanted
            at_step(step)
            found = paint(model)
            by_hand = {"style": 0.8 * (step >= 1), "other": 0.8 * (1 - step / 4), "third": 0.8}
            assert scales(model)[0] == pytest.approx(by_hand)
            for name, scale in by_hand.items():
                set_scale(model, name, scale)
            assert torch.equal(paint(model), found)
    assert scales(model) == before


def test_nothing_is_done_where_nothing_changes(model):
    with over_steps(model, {"style": lambda step: float(step < 2)}) as at_step:
        at_step(0)
        revisions = [layer.revision for layer in linear_layers(model).values()]
        at_step(1)
        assert revisions == [layer.revision for layer in linear_layers(model).values()]
        at_step(2)
        assert all(layer.revision > then for layer, then in zip(linear_layers(model).values(), revisions, strict=True))


def run(model, factors, action):
    with over_steps(model, factors) as at_step:
        action(at_step)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_end_in_the_middle(model, error):
    def fail(at_step):
        at_step(0)
        assert scales(model) != before
        raise error

    before = scales(model)
    with pytest.raises(error):
        run(model, {"style": lambda _: 0.0, "other": lambda _: 0.5}, fail)
    assert scales(model) == before


def test_an_interruption_in_the_middle_of_a_change(model, monkeypatch, paint):
    """Some layers were told of the new scale by then, and none has it."""
    before, picture, calls, change = scales(model), paint(model), [], QuantLinear.changed

    def interrupted(layer):
        calls.append(layer)
        if len(calls) == 5:
            raise KeyboardInterrupt
        change(layer)

    monkeypatch.setattr(QuantLinear, "changed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, {"style": lambda _: 0.0}, lambda at_step: at_step(0))
    assert len(calls) == 5
    assert scales(model) == before
    assert torch.equal(paint(model), picture)
    set_scale(model, "style", 0.0)
    assert {scale for (_, name), scale in scales(model)[1].items() if name == "style"} == {0.0}


def test_an_adapter_that_is_not_there(model):
    with pytest.raises(AdapterError, match="'neon', whose strength changes"):
        run(model, {"neon": float}, lambda _: None)

    def lose(at_step):
        adapter = detach(model, "third")
        try:
            at_step(0)
        finally:
            attach(model, adapter, "third", 0.8)

    before = scales(model)
    with pytest.raises(AdapterError, match="'third', whose strength changes"):
        run(model, {"other": lambda _: 0.0, "third": lambda _: 0.0}, lose)
    assert scales(model) == before
