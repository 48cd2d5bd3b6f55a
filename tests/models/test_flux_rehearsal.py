"""The rehearsal of a first step: one block of each kind, once, and nothing of it stays."""

from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest
import torch

from gossamer.kernels.detect import detect
from gossamer.kernels.rehearsal import under_way
from gossamer.layers.stored import Slot
from gossamer.models.flux import from_diffusers, prepare
from gossamer.models.flux.blocks import DoubleBlock, SingleBlock
from gossamer.models.flux.rehearsal import FirstStep, unrehearsed
from gossamer.models.swap import quantize

WIDE = {"attention_head_dim": 128, "axes_dims_rope": (16, 56, 56), "joint_attention_dim": 64, "in_channels": 64}

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="without Triton there is nothing to rehearse")


@pytest.fixture
def model(make_diffusers):
    """A packed model whose first step is rehearsed, on torch's functions."""
    made = from_diffusers(make_diffusers(**WIDE))
    quantize(made, "nf4")
    prepare(made, "fp32")
    made.rehearsal = FirstStep()
    return made


@pytest.fixture
def blocks_run(monkeypatch):
    """The blocks that run, in order, each marked where it ran in a rehearsal."""
    ran = []
    for kind in (DoubleBlock, SingleBlock):

        def forward(self, *arguments, own=kind.forward):
            ran.append((self, under_way() is not None))
            return own(self, *arguments)

        monkeypatch.setattr(kind, "forward", forward)
    return ran


def rehearsed(blocks_run):
    return [block for block, rehearsal in blocks_run if rehearsal]


@torch.inference_mode()
def test_one_block_of_each_kind_is_rehearsed_before_the_first_step(model, make_inputs, blocks_run):
    inputs = make_inputs(model.config, batch=2)
    model(**inputs)
    first = [model.transformer_blocks[0], model.single_transformer_blocks[0]]
    assert rehearsed(blocks_run) == first
    assert [block for block, _ in blocks_run] == [
        *first,
        *model.transformer_blocks,
        *model.single_transformer_blocks,
    ]
    model(**inputs)
    assert rehearsed(blocks_run) == first


@torch.inference_mode()
def test_nothing_of_it_stays(model, make_inputs):
    plain = copy.deepcopy(model)
    plain.rehearsal = unrehearsed
    inputs = make_inputs(model.config, batch=2)
    before = {name: x.clone() for name, x in inputs.items() if isinstance(x, torch.Tensor)}
    for _ in range(2):
        assert torch.equal(model(**inputs).sample, plain(**inputs).sample)
    assert all(torch.equal(inputs[name], x) for name, x in before.items())


@torch.inference_mode()
def test_a_block_that_streams_or_is_watched_is_left_out(model, make_inputs, blocks_run):
    seen = []
    model.transformer_blocks[0].attn.to_q.register_forward_hook(lambda *_: seen.append(True))
    for block in model.single_transformer_blocks:
        block.proj_out.stored.stream(Slot(torch.device("cpu"), True), block.proj_out.stored.kept.tensors)
    model(**make_inputs(model.config))
    assert rehearsed(blocks_run) == [model.transformer_blocks[1]]


def test_with_gradients_nothing_is_rehearsed_yet(model, make_inputs, blocks_run):
    inputs = make_inputs(model.config)
    with torch.enable_grad():
        model(**inputs)
    assert not rehearsed(blocks_run)
    with torch.no_grad():
        model(**inputs)
    assert len(rehearsed(blocks_run)) == 2


def test_only_models_on_kernels_are_rehearsed(model):
    assert isinstance(model.rehearsal, FirstStep)
    prepare(model, "fp32", detect(torch.device("cpu")))
    assert model.rehearsal is unrehearsed
