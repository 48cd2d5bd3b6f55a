"""A placement carried out on a transformer: results are bit for bit those of resident weights, errors come in time."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gossamer.adapters import Adapter, LowRankTerm, attach, detach, set_scale
from gossamer.bench.random_flux import TINY, Workload, fill, random_adapters, step_inputs
from gossamer.errors import FileDamagedError, FileMissingError, InvalidOptionError
from gossamer.formats import Packed
from gossamer.layers import Difference
from gossamer.memory import offload_host
from gossamer.memory.offload import arrange_blocks, offload
from gossamer.memory.offload_part import block_stations, modulation_linears
from gossamer.memory.placement import Placement
from gossamer.models.flux import FluxTransformer, prepare
from gossamer.models.flux.modulation import Conditions, modulate
from gossamer.models.swap import linear_layers, quantize, weight_bytes

CPU = torch.device("cpu")
CONFIG = {**TINY, "num_layers": 2, "num_single_layers": 3}
FEWER = {"num_layers": 1, "num_single_layers": 2}
WORK = Workload("five small blocks", CONFIG, 0.07, 64, 8, CPU)
INPUTS = step_inputs(WORK, torch.float32)


@cache
def packed(storage, config):
    """Packing takes most of the time, so it is done once a format."""
    work = replace(WORK, config=dict(config))
    with torch.device("meta"):
        model = FluxTransformer.from_config(work.config)
    fill(model, work, torch.float32)
    quantize(model, storage)
    return model.eval()


def built(storage, wish=None, keeps_merged=False, **changes):
    model = copy.deepcopy(packed(storage, tuple({**CONFIG, **changes}.items())))
    if wish is not None:
        prepare(model, wish, keeps_merged=keeps_merged)
    return model


def run(model):
    with torch.no_grad():
        return model(**INPUTS, return_dict=False)[0]


def placed(model, placement, files=()):
    return offload({"transformer": model}, placement, CPU, files)


def adapter(seed=0, config=CONFIG):
    (only,) = random_adapters(replace(WORK, config=config), "r16")
    return Adapter(only.spec, {name: LowRankTerm(t.down, t.up * (1 + seed)) for name, t in only.terms.items()})


# results --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wish", [None, "fp32", "fp8"])
@pytest.mark.parametrize("storage", ["bf16", "fp8", "int8", "nf4", "nf4-dq", "Q4_K", "Q8_0"])
def test_streamed_is_resident_bit_for_bit(storage, wish):
    model = built(storage, wish, **FEWER)
    plain = run(model)
    attach(model, adapter(config={**CONFIG, **FEWER}), "style", 0.7)
    adapted = run(model)
    detach(model, "style")
    handle = placed(model, Placement(1, pinned=storage != "int8"))
    assert torch.equal(run(model), plain)
    attach(model, adapter(config={**CONFIG, **FEWER}), "style", 0.7)
    assert torch.equal(run(model), adapted)
    detach(model, "style")
    assert torch.equal(run(model), plain)
    handle.settle()
    assert torch.equal(run(model), plain)


@pytest.mark.parametrize(("resident", "slots"), [(0, 1), (0, 2), (0, 3), (1, 2), (2, 1), (3, 2), (4, 2), (5, 1)])
def test_any_number_of_blocks_may_stay(resident, slots):
    model = built("nf4")
    expected = run(model)
    handle = placed(model, Placement(resident, slots))
    assert torch.equal(run(model), expected)
    assert torch.equal(run(model), expected)
    handle.settle()


@pytest.mark.parametrize("wish", ["fp8", "int8"])
def test_a_scale_that_changes_between_steps(wish):
    """Row scales of int8 products are measured: of the own bytes, not of those that are in the slot just then."""
    resident, streamed = built("nf4", wish), built("nf4", wish)
    placed(streamed, Placement(0, 1))
    for model in (resident, streamed):
        attach(model, adapter(), "one")
        attach(model, adapter(1), "two", 0.5)
    for scale in (1.0, 0.3, 0.0, -0.5):
        for model in (resident, streamed):
            set_scale(model, "one", scale)
        assert torch.equal(run(streamed), run(resident))


def test_terms_that_no_kernel_adds():
    """Their merged copy is made at each use: kept, it would be the memory that streaming saves."""
    model = built("nf4", "fp32")
    layer = model.single_transformer_blocks[1].attn.to_q
    layer.add(Difference("diff", torch.randn(layer.out_features, layer.in_features)))
    expected = run(model)
    placed(model, Placement(0))
    for _ in range(2):
        assert torch.equal(run(model), expected)
    assert model.single_transformer_blocks[1].first._product._operand is None


def test_no_merged_copy_is_kept_of_streamed_weights():
    model = built("fp8", "fp8", keeps_merged=True)
    handle = placed(model, Placement(2))
    attach(model, adapter(), "style")
    run(model)
    staying = {index for index in range(5) if index not in handle.parts["transformer"]._stations}
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    for index, block in enumerate(blocks):
        kept = {group._product._operand.weight is not None for group in block.groups}
        assert kept == {index in staying}


def test_what_was_made_for_a_product_stays_valid():
    """Row scales, stacked terms and biases are made once, not whenever a block comes."""
    model = built("nf4", "fp8")
    attach(model, adapter(), "style")
    placed(model, Placement(0))
    run(model)
    groups = [group for block in model.transformer_blocks for group in block.groups]
    before = [group._product._operand for group in groups]
    run(model)
    assert all(group._product._operand is operand for group, operand in zip(groups, before, strict=True))
    assert all(group._joined is not None for group in groups if len(group.layers) > 1), "one call decodes a group"


def test_blocks_compile_one_by_one():
    model = built("nf4", "fp32", num_layers=0, num_single_layers=2)
    expected = run(model)
    placed(model, Placement(0, slots=1))
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend="eager")
    for _ in range(3):
        assert torch.equal(run(model), expected)


def test_a_block_that_is_left_out_is_not_copied():
    model = built("nf4")
    handle = placed(model, Placement(0, slots=1))
    run(model)
    part = handle.parts["transformer"]
    copied = []
    start = part._carousel._start
    part._carousel._start = lambda index: (copied.append(index), start(index))
    part._carousel._schedule = lambda index: (0,) if index else (4,)

    def first_and_last(step, state):
        if step.index in (0, 4):
            step(state)

    model.runner = first_and_last
    run(model)
    run(model)
    assert set(copied) <= {0, 4}


# memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2])
def test_the_device_holds_the_slots_and_what_stays(slots):
    model = built("nf4", "fp32")
    handle = placed(model, Placement(1, slots))
    addresses = {tensor.untyped_storage().data_ptr() for tensor in _kept(model)}
    sizes = {}

    def look(step, state):
        step(state)
        tensors = [tensor for stored in _streamed(step.block) for tensor in stored.placed.tensors.values()]
        sizes.update({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors})

    model.runner = look
    run(model)
    assert not set(sizes) & addresses, "what is read is never the host's copy"
    largest = max(station.nbytes for station in handle.parts["transformer"]._stations.values())
    assert sum(sizes.values()) == slots * largest == handle.device_bytes["transformer"]


def _kept(model):
    return [tensor for layer in linear_layers(model).values() for tensor in layer.stored.kept.tensors.values()]


def _streamed(block):
    layers = {name: layer for name, layer in linear_layers(block).items() if not name.startswith("norm")}
    return [layer.stored for layer in layers.values() if layer.stored.slot is not None]


def test_saving_and_counting_see_the_weights():
    model = built("nf4")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count = weight_bytes(model)
    placed(model, Placement(0))
    run(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert weight_bytes(model) == count


def test_a_block_cannot_be_run_without_its_weights():
    model = built("nf4", "fp32")
    placed(model, Placement(0))
    run(model)
    block = model.single_transformer_blocks[0]
    with pytest.raises(RuntimeError, match="through the seam"):
        block.last(SimpleNamespace(values=torch.zeros(1, 4, 5 * 256), scale=None))


def test_a_placement_may_change_in_place():
    model = built("nf4")
    expected = run(model)
    handle = placed(model, Placement(0))
    for resident in (5, 2, 0):
        arrange_blocks(handle.parts["transformer"], Placement(resident), 5)
        assert torch.equal(run(model), expected)


# modulation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
@pytest.mark.parametrize("adapted", [False, True])
def test_modulation_from_the_host_is_bit_equal(storage, adapted):
    model = built(storage)
    if adapted:
        attach(model, adapter(), "style")
    steps = 7
    given = Conditions(torch.linspace(0.1, 1, steps), torch.full((steps,), 3.5), torch.randn(steps, 64), torch.float32)
    with torch.no_grad():
        expected = modulate(model, given)
        handle = placed(model, Placement(5))
        found = modulate(model, given)
    _same_vectors(found, expected)
    assert handle.parts["modulation"]._carousel._memory == {}, "nothing of it is on the device behind the pre-pass"
    sizes = [station.nbytes for station in handle.parts["modulation"]._stations.values()]
    assert handle.device_bytes["modulation"] == 2 * max(sizes)


def _same_vectors(found, expected):
    if isinstance(found, torch.Tensor):
        assert torch.equal(found, expected)
        return
    parts = found if isinstance(found, tuple) else vars(found).values()
    others = expected if isinstance(expected, tuple) else vars(expected).values()
    for part, other in zip(parts, others, strict=True):
        _same_vectors(part, other)


def test_the_modulation_comes_in_the_order_in_which_it_is_read():
    model = built("nf4")
    called = []
    for place, linear in enumerate(modulation_linears(model)):
        linear.register_forward_pre_hook(lambda *_, place=place: called.append(place))
    run(model)
    assert called == list(range(7))


def test_modulation_may_stay():
    model = built("nf4")
    expected = run(model)
    handle = placed(model, Placement(0, modulation="resident"))
    assert "modulation" not in handle.parts
    assert torch.equal(run(model), expected)


# from a file ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mapped(tmp_path):
    """A model whose block weights are views of a mapped file."""
    model = built("nf4", "fp32")
    layers = [layer for name, layer in linear_layers(model).items() if "transformer_blocks." in name]
    parts = [(layer.stored, role, tensor) for layer in layers for role, tensor in layer.stored.kept.tensors.items()]
    path = tmp_path / "weights.bin"
    path.write_bytes(b"head" * 3 + b"".join(tensor.numpy().tobytes() for _, _, tensor in parts))
    data = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
    start = 12
    views = {}
    for stored, role, tensor in parts:
        size = tensor.numel() * tensor.itemsize
        views.setdefault(stored, {})[role] = data[start : start + size].view(tensor.dtype).view(tensor.shape)
        start += size
    expected = run(model)
    for stored, tensors in views.items():
        stored.adopt(tensors)
    return SimpleNamespace(model=model, expected=expected, file=SimpleNamespace(path=path, data=data))


def test_weights_are_read_from_their_file(mapped):
    handle = placed(mapped.model, Placement(1, pinned=False), [mapped.file])
    assert torch.equal(run(mapped.model), mapped.expected)
    pieces = [piece for s in handle.parts["transformer"]._stations.values() for piece in s.home.pieces]
    assert {type(piece).__name__ for piece in pieces} == {"FilePiece"}
    assert torch.equal(run(mapped.model), mapped.expected)


def test_a_file_that_loses_its_name_is_read_on(mapped):
    placed(mapped.model, Placement(0, pinned=False), [mapped.file])
    mapped.file.path.unlink()
    assert torch.equal(run(mapped.model), mapped.expected)


def test_a_file_that_is_cut_off_is_an_error(mapped):
    placed(mapped.model, Placement(0, pinned=False), [mapped.file])
    run(mapped.model)
    whole = mapped.file.path.read_bytes()
    os.truncate(mapped.file.path, 1000)
    with pytest.raises(FileDamagedError, match="changed while its weights were streamed") as caught:
        run(mapped.model)
    assert "load the model again" in caught.value.next_step
    assert len(whole) > 1000


def test_a_disk_that_stops_answering_is_an_error(mapped, monkeypatch):
    placed(mapped.model, Placement(0, pinned=False), [mapped.file])
    run(mapped.model)

    def gone(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", gone)
        with pytest.raises(FileMissingError, match="cannot be read any more"):
            run(mapped.model)
    assert torch.equal(run(mapped.model), mapped.expected), "once the disk answers again, the model goes on"


def test_a_file_that_is_gone_before_is_an_error(mapped):
    mapped.file.path.unlink()
    with pytest.raises(FileMissingError):
        placed(mapped.model, Placement(0, pinned=False), [mapped.file])
    assert all(layer.stored.slot is None for layer in linear_layers(mapped.model).values())


# checks ---------------------------------------------------------------------------------------------------------------


def test_too_little_host_memory_is_said_before_anything_moves(monkeypatch):
    model = built("nf4")
    monkeypatch.setattr(offload_host, "available_host_bytes", lambda: 1000)
    with pytest.raises(InvalidOptionError, match="not enough host memory") as caught:
        placed(model, Placement(0))
    assert "GB are available" in caught.value.why
    assert all(layer.stored.slot is None for layer in linear_layers(model).values())


@pytest.mark.parametrize(
    ("meminfo", "limit", "used", "expected"),
    [
        ("MemTotal: 9 kB\nMemAvailable:    2000 kB\n", None, 0, 2_048_000),
        ("MemAvailable: 2000 kB\n", "max", 0, 2_048_000),
        ("MemAvailable: 2000 kB\n", "1000000", 400_000, 650_000),
        ("MemTotal: 9 kB\n", None, 0, None),
    ],
)
def test_available_memory(tmp_path, monkeypatch, meminfo, limit, used, expected):
    (tmp_path / "meminfo").write_text(meminfo)
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit + "\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        (tmp_path / "memory.stat").write_text("anon 1\nfile 50000\n")
    monkeypatch.setattr(offload_host, "MEMINFO", Path(tmp_path / "meminfo"))
    monkeypatch.setattr(offload_host, "CGROUP", Path(tmp_path))
    assert offload_host.available_host_bytes() == expected


@pytest.mark.parametrize("placement", [Placement(6), Placement(-1), Placement(0, slots=0)])
def test_a_placement_for_another_model_is_refused(placement):
    with pytest.raises(InvalidOptionError, match="no placement for this model"):
        placed(built("nf4"), placement)


def test_weights_of_a_group_lie_side_by_side():
    model = built("nf4")
    station = block_stations(model, CPU, [0])[0]
    pieces = {(piece.stored, piece.role): piece for piece in station._layout.pieces}
    attn = model.transformer_blocks[0].attn
    for role in ("codes", "absmax"):
        first, second = (pieces[layer.stored, role] for layer in (attn.to_q, attn.to_k))
        assert second.offset == first.offset + first.nbytes
    assert isinstance(attn.to_q.packed, Packed)
