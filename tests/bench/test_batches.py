"""Batches paint what single pictures are, whatever their size."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from gossamer.bench.batches import BatchSettings, paint_batches
from gossamer.errors import InvalidOptionError

PROMPTS = ("a red sphere", "a blue cube", "a green cone to the left of a white ring")
SEEDS = (3, 4, 5)
SMALL = BatchSettings(batch=2, steps=2, side=64)

pytestmark = pytest.mark.usefixtures("one_thread")


def as_bytes(picture: torch.Tensor) -> np.ndarray:
    return picture.permute(1, 2, 0).mul(255).round().to(torch.uint8).numpy()


def test_a_batch_holds_the_pictures_that_the_pipeline_paints(pipe):
    pictures = paint_batches(pipe.components, PROMPTS, SEEDS, SMALL)
    for prompt, seed, picture in zip(PROMPTS, SEEDS, pictures, strict=True):
        single = np.array(pipe(prompt, seed=seed, steps=2, size="64x64"))
        assert np.abs(single.astype(int) - as_bytes(picture).astype(int)).max() <= 1


def test_control_maps_act_as_in_the_pipeline(pipe, adapter_files):
    maps = torch.zeros(2, 3, 64, 64)
    maps[0, :, 20:22], maps[1, :, :, 40:42] = 1.0, 1.0
    name = pipe.attach(str(adapter_files["edges"]))
    try:
        pictures = paint_batches(pipe.components, PROMPTS[:2], SEEDS[:2], SMALL, maps)
        swapped = paint_batches(pipe.components, PROMPTS[:2], SEEDS[:2], SMALL, maps.flip(0))
        for index in range(2):
            guide = Image.fromarray(as_bytes(maps[index]))
            single = pipe(PROMPTS[index], seed=SEEDS[index], steps=2, size="64x64", control=guide, control_kind="map")
            difference = np.array(single).astype(int) - as_bytes(pictures[index]).astype(int)
            assert np.abs(difference).max() <= 1
    finally:
        pipe.detach(name)
    assert not torch.equal(pictures, swapped)


def test_values_that_are_not_finite_are_an_error(pipe):
    bias = pipe.transformer.proj_out.bias
    before = bias.detach().clone()
    try:
        bias.data.fill_(math.nan)
        with pytest.raises(InvalidOptionError, match="first with seed 3"):
            paint_batches(pipe.components, PROMPTS[:1], SEEDS[:1], SMALL)
    finally:
        bias.data.copy_(before)
