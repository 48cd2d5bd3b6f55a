"""Placements carried out on the whole embedded pipeline: the same pixels, prompt after prompt; and who has its turn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import gossamer
from gossamer.errors import InvalidOptionError
from gossamer.formats import pack
from gossamer.layers import QuantLinear
from gossamer.memory.offload import offload
from gossamer.memory.offload_part import layer_list
from gossamer.memory.offload_turns import Turns
from gossamer.memory.placement import Placement
from gossamer.models.flux.modulation import AdaLN

CPU = torch.device("cpu")
OPTIONS = {"seed": 1, "steps": 2, "size": "64x64"}
PROMPTS = ("a red ball on a cube", "two green cones")


@pytest.fixture(scope="module")
def own(one_thread):
    """A pipeline of this module's own: placements are carried out on its components."""
    pipe = gossamer.load(storage="nf4", text_storage="nf4")
    return pipe, [np.array(pipe(prompt, **OPTIONS)) for prompt in PROMPTS]


@pytest.mark.parametrize("text", ["resident", "evicted", "streamed"])
def test_the_pixels_are_the_same_prompt_after_prompt(own, text):
    pipe, expected = own
    handle = offload(pipe.components, Placement(1, text=text), CPU)
    for prompt, picture in zip(PROMPTS, expected, strict=True):
        assert np.array_equal(np.array(pipe(prompt, **OPTIONS)), picture)
    assert (("text_encoder_2" in handle.parts), ("text_encoder" in handle.parts)) == (text != "resident",) * 2
    handle.settle()
    assert np.array_equal(np.array(pipe(PROMPTS[0], **OPTIONS)), expected[0])
    assert not any(module._forward_pre_hooks for part in handle.models.values() for module in part.modules())


@pytest.mark.parametrize("text", ["resident", "evicted", "streamed"])
def test_the_modulation_is_computed_once_a_picture(own, text):
    """Its weights come and go for that, which is no reason to compute it again."""
    pipe, _ = own
    norms = [part for part in pipe.transformer.modules() if isinstance(part, AdaLN)]
    calls = []
    hooks = [norm.linear.register_forward_hook(lambda *_: calls.append(1)) for norm in norms]
    handle = offload(pipe.components, Placement(1, text=text), CPU)
    for pictures in (1, 2):
        pipe(PROMPTS[0], **OPTIONS)
        assert len(calls) == pictures * len(norms)
    handle.settle()
    for hook in hooks:
        hook.remove()


def test_adapters_come_and_go_while_parts_take_turns(own, bundled):
    pipe, expected = own
    pipe.attach("pencil")
    drawn = np.array(pipe(PROMPTS[0], **OPTIONS))
    pipe.detach("pencil")
    handle = offload(pipe.components, Placement(0, text="streamed"), CPU)
    pipe.attach("pencil")
    assert np.array_equal(np.array(pipe(PROMPTS[0], **OPTIONS)), drawn)
    pipe.detach("pencil")
    assert np.array_equal(np.array(pipe(PROMPTS[0], **OPTIONS)), expected[0])
    handle.settle()


def test_a_tiled_picture_is_the_whole_one(own):
    pipe, expected = own
    handle = offload(pipe.components, Placement(3, vae="tiled"), CPU)
    picture = np.array(pipe(PROMPTS[0], **OPTIONS)).astype(int)
    assert np.abs(picture - expected[0]).max() <= 1, "one rounding to a byte"
    handle.settle()
    assert type(pipe.components["vae"].decoder).__name__ == "Decoder"


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_of_many_layers_two_are_there(slots):
    """Whatever room the transformer's blocks have."""
    encoder = nn.Sequential()
    encoder.layers = nn.ModuleList(QuantLinear(pack(torch.randn(64, 64), "nf4")) for _ in range(5))
    handle = offload({"text_encoder": encoder}, Placement(0, slots=slots, text="streamed"), CPU)
    (size,) = {station.nbytes for station in handle.parts["text_encoder"]._stations.values()}
    assert handle.device_bytes["text_encoder"] == 2 * size
    handle.settle()


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_a_streamed_encoder_holds_two_layers(own, name):
    pipe, _ = own
    encoder = pipe.components[name]
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        expected = encoder(tokens)[0]
        handle = offload({name: encoder}, Placement(0, slots=5, text="streamed"), CPU)
        assert torch.equal(encoder(tokens)[0], expected)
        assert torch.equal(encoder(tokens)[0], expected)
    sizes = [station.nbytes for station in handle.parts[name]._stations.values()]
    assert len(sizes) == 2
    assert handle.device_bytes[name] == sum(sizes)
    assert handle.parts[name]._carousel._memory == {}, "nothing stays behind the last layer"
    handle.settle()


def test_an_encoder_without_packed_layers_is_refused():
    with pytest.raises(InvalidOptionError, match="cannot be streamed"):
        layer_list(nn.Sequential(nn.Linear(4, 4)))


# turns ----------------------------------------------------------------------------------------------------------------


def test_one_guest_at_a_time():
    events = []

    class Noted:
        def __init__(self, name):
            self.name = name

        def bring(self):
            events.append(f"+{self.name}")

        def here(self, value):
            return value

        def leave(self):
            events.append(f"-{self.name}")

    turns, text, transformer = Turns(), Noted("text"), Noted("transformer")
    modules = [nn.Identity() for _ in range(3)]
    for module, guest in zip(modules, (text, transformer, None), strict=True):
        turns.on_call(module, guest)
    for module in itertools.chain(modules, [modules[1], modules[1]], modules[:1]):
        module(torch.zeros(1))
    assert events == ["+text", "-text", "+transformer", "-transformer", "+transformer", "-transformer", "+text"]
