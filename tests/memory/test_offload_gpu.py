"""Placements on a GPU: bit for bit the results of resident weights, in no more memory than was said."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gossamer.adapters import attach, detach
from gossamer.bench.random_flux import TINY, Workload, fill, random_adapters, step_inputs
from gossamer.formats import pack
from gossamer.layers import LowRank, QuantLinear
from gossamer.memory.activations import CUBLAS_BYTES, captured_bytes
from gossamer.memory.offload import offload
from gossamer.memory.offload_copier import CudaCopier
from gossamer.memory.offload_feed import StraightFeed
from gossamer.memory.offload_host import host_bytes
from gossamer.memory.offload_part import Part, Transport, module_stations
from gossamer.memory.offload_turns import Guest
from gossamer.memory.picture import Job
from gossamer.memory.placement import Placement
from gossamer.models.flux import FluxTransformer, prepare
from gossamer.models.flux.modulation import Conditions, modulate
from gossamer.models.flux.step import run_step
from gossamer.models.swap import linear_layers, quantize

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
# 1024 wide, so that a block's copy takes long enough to be overtaken where a wait is missing
CONFIG = {**TINY, "num_layers": 3, "num_single_layers": 7, "num_attention_heads": 8}


@pytest.fixture
def work():
    return Workload("ten blocks of width 1024", CONFIG, 0.03, 256, 64, CUDA)


def built(work, storage, wish, keeps_merged=False):
    with torch.device("meta"):
        model = FluxTransformer.from_config(work.config)
    fill(model, work)
    quantize(model, storage)
    prepare(model, wish, keeps_merged=keeps_merged)
    return model.eval()


def run(model, work, steps=1):
    inputs = step_inputs(work)
    with torch.no_grad():
        results = [model(**inputs, return_dict=False)[0] for _ in range(steps)]
    torch.cuda.synchronize()
    return results[-1]


@contextmanager
def peak():
    """Bytes allocated at the most inside, beyond what was there before."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    found, before = SimpleNamespace(bytes=0), torch.cuda.memory_allocated()
    yield found
    torch.cuda.synchronize()
    found.bytes = torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize(("storage", "wish"), [("bf16", "bf16"), ("fp8", "fp8"), ("nf4", "fp8"), ("Q4_K", "bf16")])
@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("resident", [0, 4])
def test_streamed_is_resident_bit_for_bit(work, storage, wish, pinned, resident):
    model = built(work, storage, wish)
    plain = run(model, work)
    (adapter,) = random_adapters(work, "r16")
    attach(model, adapter, "style", 0.7)
    adapted = run(model, work)
    detach(model, "style")
    handle = offload({"transformer": model}, Placement(resident, pinned=pinned), CUDA)
    for steps in (1, 5):
        assert torch.equal(run(model, work, steps), plain)
    attach(model, adapter, "style", 0.7)
    model.stepper.tally.clear()
    assert torch.equal(run(model, work, 3), adapted)
    assert model.stepper.tally["replayed"] == pinned, model.stepper.tally
    detach(model, "style")
    assert torch.equal(run(model, work), plain)
    handle.settle()
    assert torch.equal(run(model, work), plain)


@pytest.mark.parametrize("placement", [Placement(0, slots=1), Placement(0), Placement(3, slots=3), Placement(10)])
def test_captured_copies_follow_copies_call_by_call_and_the_other_way_round(work, placement):
    model = built(work, "nf4", "bf16")
    plain = run(model, work)
    placement = replace(placement, text="evicted")
    handle = offload({"transformer": model}, placement, CUDA)
    for _ in range(4):
        assert torch.equal(run(model, work, 4), plain)
        assert model.stepper.last == "replayed"
        model.stepper, graphed = run_step, model.stepper
        for steps in (1, 2):
            assert torch.equal(run(model, work, steps), plain)
        model.stepper = graphed
    assert graphed.tally["captured"] == 1, graphed.tally
    handle.turns.take(None)
    assert not graphed._captured
    assert torch.equal(run(model, work, 4), plain)
    handle.settle()


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_the_peak_is_under_the_bound(work, slots):
    """Weights on the device are what `device_bytes` says, and nothing of the others is allocated in passing."""
    model = built(work, "nf4", "bf16")
    expected = run(model, work)
    model.stepper, graphed = run_step, model.stepper
    with peak() as step:
        run(model, work)
    model.stepper = graphed
    weights = sum(layer.stored.kept.nbytes for layer in linear_layers(model).values())
    before = torch.cuda.memory_allocated()
    handle = offload({"transformer": model}, Placement(0, slots), CUDA)
    gc.collect()
    gone = before - torch.cuda.memory_allocated()
    streamed = sum(part.host_bytes for part in handle.parts.values())
    assert weights * 0.8 < streamed <= gone * 1.01
    with peak() as found:
        assert torch.equal(run(model, work, 3), expected)
    slot_bytes = sum(handle.device_bytes.values())
    # workspaces come anew after a placement, one for captures and one for steps that run call by call
    assert found.bytes <= step.bytes + slot_bytes + captured(work) + CUBLAS_BYTES


def captured(work):
    """What captured steps keep, beside the tensors of a step."""
    return captured_bytes(work.spec, Job(work.side, work.side, 1, 1, work.text_tokens), "bf16")


def test_it_runs_where_resident_weights_do_not_fit(work):
    model = built(work, "bf16", "bf16")
    expected = run(model, work)
    offload({"transformer": model}, Placement(0), CUDA)
    gc.collect()
    torch.cuda.empty_cache()
    run(model, work)
    allowed = torch.cuda.memory_reserved() + captured(work) + CUBLAS_BYTES + 32 * 2**20
    total = torch.cuda.get_device_properties(CUDA).total_memory
    weights = sum(layer.stored.kept.nbytes for layer in linear_layers(model).values())
    assert weights > allowed
    torch.cuda.set_per_process_memory_fraction(allowed / total, CUDA)
    try:
        assert torch.equal(run(model, work, 3), expected)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(weights, dtype=torch.uint8, device=CUDA)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, CUDA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modulation_from_the_host_is_bit_equal(work, dtype):
    with torch.device("meta"):
        model = FluxTransformer.from_config(work.config)
    fill(model, work, dtype)
    quantize(model, "fp32" if dtype == torch.float32 else "bf16")
    steps = 28
    guidance, pooled = torch.full((steps,), 3.5, device=CUDA), torch.randn(steps, 64, device=CUDA, dtype=dtype)
    given = Conditions(torch.linspace(0.1, 1, steps, device=CUDA, dtype=dtype), guidance, pooled, dtype)
    with torch.no_grad():
        expected = modulate(model, given)
        offload({"transformer": model}, Placement(10), CUDA)
        found = modulate(model, given)
    for ours, theirs in zip(found.single, expected.single, strict=True):
        assert torch.equal(ours.gate, theirs.gate)
        assert torch.equal(ours.norm.scale, theirs.norm.scale)
    for ours, theirs in zip(found.double, expected.double, strict=True):
        assert torch.equal(ours.text.mlp.shift, theirs.text.mlp.shift)
        assert torch.equal(ours.image.attention_gate, theirs.image.attention_gate)


def test_blocks_compile_one_by_one(work):
    small = replace(work, config={**CONFIG, "num_layers": 1, "num_single_layers": 2})
    model = built(small, "nf4", "bf16")
    offload({"transformer": model}, Placement(0), CUDA)
    expected = run(model, small)
    torch._dynamo.reset()
    model.compile_repeated_blocks()
    for _ in range(3):
        error = (run(model, small) - expected).norm() / expected.norm()
        assert error < 0.01


class Model(nn.Module):
    """Two layers that come one by one, and a rest with a tensor that two modules share."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(QuantLinear(pack(torch.randn(64, 64), "nf4"), torch.randn(64)) for _ in range(2))
        self.embedding, self.head = nn.Embedding(8, 64), nn.Linear(64, 8, bias=False)
        self.head.weight = self.embedding.weight
        self.other = QuantLinear(pack(torch.randn(64, 64), "int8"))


def test_a_guest_comes_whole_and_leaves_without_a_copy_back():
    model = Model().requires_grad_(False)
    transport = Transport(CUDA, CudaCopier(CUDA), StraightFeed(CudaCopier(CUDA)), True, ())
    part = Part(module_stations(list(model.layers), CUDA), transport)
    part.go_home()
    guest = Guest(model, [part], CUDA)
    addresses = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        guest.bring()
        assert {tensor.device.type for tensor in model.parameters()} == {"cuda"}
        assert model.head.weight is model.embedding.weight
        model.other.add(LowRank("style", torch.randn(2, 64), torch.randn(64, 2)))
        guest.leave()
        assert {t.device.type for term in model.other.adapters() for t in term.tensors()} == {"cpu"}
        model.other.remove("style")
        assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == addresses
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("text", ["evicted", "streamed"])
def test_parts_that_take_turns_leave_nothing_but_the_vae(text):
    import gossamer

    pipe = gossamer.load(storage="nf4", text_storage="nf4", device="cuda")
    options = {"seed": 1, "steps": 3, "size": "64x64"}
    expected = [list(pipe(prompt, **options).getdata()) for prompt in ("a red ball", "two green cones")]
    handle = offload(pipe.components, Placement(1, text=text), CUDA)
    for prompt, picture in zip(("a red ball", "two green cones"), expected, strict=True):
        assert list(pipe(prompt, **options).getdata()) == picture
    devices = {
        name: {tensor.device.type for tensor in part.parameters()}
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module)
    }
    assert devices["vae"] == {"cuda"}
    assert devices["transformer"] == devices["text_encoder"] == devices["text_encoder_2"] == {"cpu"}
    handle.settle()
    assert list(pipe("a red ball", **options).getdata()) == expected[0]


def pools():
    """Of captured graphs."""
    gc.collect()
    torch.cuda.empty_cache()
    return {each["segment_pool_id"] for each in torch.cuda.memory_snapshot()} - {(0, 0)}


@pytest.mark.parametrize("streamed", [0, 1, 3])
def test_steps_are_replayed_in_every_turn_and_leave_no_memory(streamed):
    import gossamer

    others = pools()
    pipe = gossamer.load(storage="nf4", text_storage="nf4", device="cuda")
    transformer, options = pipe.transformer, {"seed": 1, "steps": 5, "size": "64x64"}
    prompts = ("a red ball", "two green cones")
    expected = [list(pipe(prompt, **options).getdata()) for prompt in prompts]
    count = len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)
    handle = offload(pipe.components, Placement(count - streamed, text="evicted"), CUDA)
    tally = transformer.stepper.tally
    for prompt, picture in zip(prompts, expected, strict=True):
        tally.clear()
        assert list(pipe(prompt, **options).getdata()) == picture
        assert (tally["captured"], tally["replayed"]) == (1, 3), tally
        left = {each["segment_pool_id"] for each in torch.cuda.memory_snapshot()} - {(0, 0)}
        assert left <= others, "the decoder had room for what it needs"
    handle.settle()
    assert list(pipe(prompts[0], **options).getdata()) == expected[0]


def test_pinned_memory_takes_no_more_than_was_asked_for():
    memory = host_bytes(135_000_001, CUDA)
    assert memory.numel() == 135_000_001
    assert memory.is_pinned()
    target = torch.empty_like(memory, device=CUDA)
    memory[-1] = 7
    target.copy_(memory, non_blocking=True)
    assert int(target[-1]) == 7
