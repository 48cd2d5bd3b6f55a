"""Plans on a GPU: a promise is kept, memory that goes away in mid-run leads to a smaller plan, pixels stay."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import gossamer
from gossamer.cli.main import main
from gossamer.memory.gpu_memory import capped
from gossamer.models.swap import linear_layers
from gossamer.pipeline.options import PaintOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PAINT = PaintOptions("a red cube to the left of a blue sphere", seed=3, steps=4)
FORMATS = {"storage": "nf4", "text_storage": "nf4"}
DEVICE = torch.device("cuda", 0)


def pixels(pipe, on_step=None):
    return np.asarray(pipe.paint(PAINT, on_step).image)


@pytest.fixture(scope="module")
def expected():
    return pixels(gossamer.load(device="cuda", **FORMATS))


def test_without_a_budget_everything_but_the_modulation_is_resident(expected):
    pipe = gossamer.load(device="cuda", **FORMATS)
    assert np.array_equal(pixels(pipe), expected)
    assert pipe.plan is not None
    assert (pipe.plan.kind, pipe.plan.placement.modulation) == ("resident", "prepass")
    for name, layer in linear_layers(pipe.transformer).items():
        streamed = layer.stored.slot is not None
        assert streamed == (".norm" in name), name
    assert pipe.peak_gpu_bytes is not None


@pytest.mark.parametrize("offload", ["auto", "none", "model", "sequential", "group"])
def test_every_offload_keeps_the_promise_and_the_pixels(expected, offload):
    before = torch.cuda.get_per_process_memory_fraction(0)
    torch.cuda.empty_cache()
    pipe = gossamer.load(device="cuda", vram="1GB", offload=offload, **FORMATS)
    torch.cuda.reset_peak_memory_stats()
    assert np.abs(pixels(pipe).astype(int) - expected).max() <= 1, "strips may round otherwise"
    assert torch.cuda.max_memory_reserved() <= 0.5e9
    assert torch.cuda.get_per_process_memory_fraction(0) == before


def test_memory_that_runs_out_in_mid_run():
    """Of the allocator itself: the first step of the first attempt asks for more than the cap allows."""
    formats = {"storage": "bf16", "text_storage": "bf16"}  # in nf4 no plan of so small a model takes clearly less
    expected = pixels(gossamer.load(device="cuda", **formats))
    pipe = gossamer.load(device="cuda", vram="1GB", **formats)
    first, asked = pipe.plan, []

    def on_step(done, total):
        asked.append(done)
        if len(asked) == 1:
            torch.empty(10**9, dtype=torch.uint8, device=DEVICE)

    with pytest.warns(UserWarning, match="ran out of memory"):
        picture = pixels(pipe, on_step)
    assert asked == [1, 1, 2, 3, 4]
    assert np.abs(picture.astype(int) - expected).max() <= 1
    assert pipe.plan.peak_gpu_bytes < first.peak_gpu_bytes


def test_a_cap_is_a_cap():
    with capped(DEVICE, 200 * 10**6), pytest.raises(torch.OutOfMemoryError):
        torch.empty(300 * 10**6, dtype=torch.uint8, device=DEVICE)
    torch.empty(300 * 10**6, dtype=torch.uint8, device=DEVICE)


def test_plan_measure(capsys):
    assert main(["plan", "embedded", "--measure", "--storage", "nf4", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["actual"]["peak_bytes"] > 0
    assert found["actual"]["step_seconds"] > 0
