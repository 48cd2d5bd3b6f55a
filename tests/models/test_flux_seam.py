"""The seam: runners that count, skip, replace and cache blocks."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from functools import partial

import pytest
import torch

from gossamer.kernels.pointwise.backends import TORCH
from gossamer.models.flux import Operators, from_diffusers, run_block
from gossamer.models.flux.operators import attention


@pytest.fixture
def ours(make_diffusers):
    return from_diffusers(make_diffusers())


@torch.inference_mode()
def test_a_runner_sees_every_block_in_order(ours, make_inputs):
    seen = []

    def counting(step, state):
        assert state.tokens.shape == (1, 29, 64)
        assert (state.text.shape[1], state.image.shape[1]) == (5, 24)
        seen.append((step.index, step.count, step.kind, step.block))
        step(state)

    inputs = make_inputs(ours.config)
    expected = ours(**inputs).sample
    ours.runner = counting
    assert torch.equal(ours(**inputs).sample, expected)
    blocks = [*ours.transformer_blocks, *ours.single_transformer_blocks]
    kinds = ["double"] * 2 + ["single"] * 3
    assert seen == [(index, 5, kind, block) for index, (kind, block) in enumerate(zip(kinds, blocks, strict=True))]


@torch.inference_mode()
def test_a_skipped_block_is_as_if_it_were_not_there(ours, make_diffusers, make_inputs):
    def skipping(step, state):
        if step.index not in (1, 3):
            step(state)

    ours.runner = skipping
    shorter = make_diffusers()
    del shorter.transformer_blocks[1]
    del shorter.single_transformer_blocks[1]
    inputs = make_inputs(ours.config)
    torch.testing.assert_close(ours(**inputs).sample, shorter(**inputs).sample, rtol=1e-4, atol=1e-5)
    ours.runner = run_block
    assert (ours(**inputs).sample - shorter(**inputs).sample).abs().max() > 0.01


@torch.inference_mode()
def test_a_residual_belongs_to_its_block(ours, make_inputs):
    inputs = make_inputs(ours.config)
    samples = [torch.full((1, 24, 64), 5.0)] * 2
    ours.runner = lambda step, state: None
    without = ours(**inputs).sample
    assert torch.equal(ours(**inputs, controlnet_block_samples=samples).sample, without)


@torch.inference_mode()
def test_what_all_blocks_add_can_be_kept_and_added_again(ours, make_inputs):
    class Cache:
        """Keeps what the blocks behind the first one add in the first call, and adds it in later ones."""

        def __init__(self):
            self.first = self.added = None
            self.ran = 0

        def __call__(self, step, state):
            if step.index == 0 or self.added is None:
                step(state)
                self.ran += 1
            if step.index == 0:
                self.first = state.tokens.clone()
            if step.index == step.count - 1:
                if self.added is None:
                    self.added = state.tokens - self.first
                else:
                    state.tokens.add_(self.added)

    cache = ours.runner = Cache()
    inputs = make_inputs(ours.config)
    first = ours(**inputs).sample
    torch.testing.assert_close(ours(**inputs).sample, first)
    assert cache.ran == 5 + 1


@torch.inference_mode()
def test_the_branch_of_the_guidance_is_in_the_state(ours, make_inputs):
    branches = []
    ours.runner = lambda step, state: branches.append(state.branch) if step.index == 0 else None
    inputs = make_inputs(ours.config)
    with ours.cache_context("cond"):
        ours(**inputs)
        with ours.cache_context("uncond"):
            ours(**inputs)
        ours(**inputs)
    ours(**inputs)
    assert branches == ["cond", "uncond", "cond", None]


def test_a_runner_is_no_part_of_the_weights(ours):
    names = set(ours.state_dict())
    ours.runner = lambda step, state: None
    assert set(ours.state_dict()) == names


@torch.inference_mode()
def test_every_function_goes_through_the_operators(ours, make_inputs):
    calls = Counter()

    def counted(name, function, *arguments):
        calls[name] += 1
        return function(*arguments)

    functions = {known.name: getattr(TORCH, known.name) for known in fields(TORCH) if known.name != "name"}
    pointwise = replace(TORCH, **{name: partial(counted, name, function) for name, function in functions.items()})
    expected = ours(**make_inputs(ours.config)).sample
    ours.operators = Operators(pointwise, partial(counted, "attention", attention))
    assert torch.equal(ours(**make_inputs(ours.config)).sample, expected)
    # 2 double blocks of two streams, 3 single blocks, and the norm after the last
    assert calls == {
        # residuals wait for the next norm of the same tokens: not from double to single blocks, and not at the end
        "norm_modulate": 2 + 1 + 1,
        "residual_gate_norm_modulate_": 2 * 2 + 2 + 2,
        "residual_gate_": 2 + 1,
        "qk_norm_rope_": 2 + 3,
        "gelu_rows": 2 * 2,
        "gelu_concat": 3,
        "attention": 2 + 3,
    }
