"""Plans carried out on the embedded model, on a CPU as the device: the same pixels, smaller plans after faults."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gossamer.demo.embedded import model_folder
from gossamer.errors import FileDamagedError, InvalidOptionError
from gossamer.memory import gpu_memory, offload_host
from gossamer.memory.budget import Budget
from gossamer.memory.cards import find_card
from gossamer.memory.offload_strips import StripDecoder
from gossamer.memory.picture import Job
from gossamer.memory.placement import Placement
from gossamer.memory.plan import plan
from gossamer.memory.request import PlanRequest
from gossamer.models.swap import linear_layers
from gossamer.pipeline import residence as residences
from gossamer.pipeline.components import StorageChoice, load_components
from gossamer.pipeline.fit import Fit, subject_of
from gossamer.pipeline.load import assemble
from gossamer.pipeline.model import open_model
from gossamer.pipeline.options import LoadOptions, PaintOptions, make
from gossamer.pipeline.prepare import prepare
from gossamer.pipeline.residence import surviving

CPU = torch.device("cpu")
PAINT = PaintOptions("a red ball on a cube", seed=1, steps=2, size=(64, 64))
FORMATS = {"storage": "bf16", "text_storage": "bf16"}  # nothing has to be packed
OUT = "CUDA out of memory. Tried to allocate 2.00 GiB."


def fitted(placement: Placement | None = None, **named) -> Fit:
    """A fit for the embedded model whose chosen plan has a placement of the test's own."""
    subject = subject_of(open_model("embedded"), "embedded")
    request = PlanRequest(subject, find_card("RTX 3060"), Budget(6 * 10**9, 16 * 10**9), Job(64, 64, 1, 3, 64), **named)
    planning = plan(request)
    chosen = planning.chosen if placement is None else replace(planning.chosen, placement=placement)
    return Fit(request, planning, chosen)


def prepared(fit: Fit, **options):
    named = make(LoadOptions, {**FORMATS, **options})
    return replace(prepare(named), fit=fit)


def pixels(pipe, options=PAINT):
    return np.asarray(pipe.paint(options).image).astype(int)


@pytest.fixture(scope="module")
def plain(one_thread):
    return pixels(assemble(prepare(LoadOptions(**FORMATS))))


@pytest.fixture
def told():
    return []


# pixels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "placement",
    [
        Placement(6),
        Placement(6, modulation="resident"),
        Placement(2),
        Placement(0, text="evicted"),
        Placement(3, text="streamed", pinned=False),
    ],
)
def test_placements_do_not_change_pixels(plain, placement):
    pipe = assemble(prepared(fitted(placement)))
    assert np.array_equal(pixels(pipe), plain)
    assert np.array_equal(pixels(pipe), plain), "and again"
    assert pipe.device == CPU
    assert pipe.plan is not None
    assert pipe.plan.placement == placement


def test_executions_come_after_the_placement(bundled):
    """The groups of a block are joined where its weights come to, and adapters go into that."""
    named = {"storage": "Q8_0", "compute": "fp8", "loras": "pencil"}
    plain = assemble(prepare(make(LoadOptions, {**FORMATS, **named})))
    expected = pixels(plain)
    for placement in (Placement(6), Placement(2), Placement(1, text="evicted")):
        pipe = assemble(prepared(fitted(placement), **named))
        assert all(layer.execution is not None for layer in linear_layers(pipe.transformer).values())
        assert np.array_equal(pixels(pipe), expected)


def test_decoding_in_strips_is_within_a_rounding(plain):
    pipe = assemble(prepared(fitted(Placement(6, vae="tiled"))))
    assert isinstance(pipe.components["vae"].decoder, StripDecoder)
    assert np.abs(pixels(pipe) - plain).max() <= 1


def test_a_rerun_does_not_depend_on_the_placement(plain):
    ready = prepared(fitted(Placement(0, text="streamed")))
    painting = assemble(ready).paint(PAINT)
    assert painting.recipe == prepare(LoadOptions(**FORMATS)).recipe(PAINT)


def test_adapters_on_modulation_and_blocks_act_while_placed(bundled):
    plain = assemble(prepare(make(LoadOptions, {**FORMATS, "loras": "pencil"})))
    expected = pixels(plain)
    pipe = assemble(prepared(fitted(Placement(1)), loras="pencil"))
    assert np.array_equal(pixels(pipe), expected)
    pipe.detach("pencil")
    pipe.attach("pencil")
    assert np.array_equal(pixels(pipe), expected)


@pytest.mark.parametrize("placement", [Placement(6), Placement(1, text="evicted")])
def test_fusing_lifts_the_placement_and_puts_it_back(bundled, placement):
    expected = assemble(prepare(make(LoadOptions, {**FORMATS, "loras": "pencil"})))
    before = pixels(expected)
    expected.fuse()
    fused = pixels(expected)
    pipe = assemble(prepared(fitted(placement), loras="pencil"))
    pipe.fuse()
    assert np.array_equal(pixels(pipe), fused)
    assert any(layer.stored.slot is not None for layer in linear_layers(pipe.transformer).values())
    pipe.unfuse()
    assert np.array_equal(pixels(pipe), before)


# loading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("placement", "on_host"),
    [
        (Placement(6), "norm"),
        (Placement(6, modulation="resident"), None),
        (Placement(0), "transformer_blocks"),
        (Placement(0, text="evicted"), ""),
    ],
)
def test_loading_takes_to_the_device_only_what_stays_there(placement, on_host):
    """The device is the meta device, so that what goes there can be told from what does not."""
    meta = torch.device("meta")
    parts = load_components(open_model("embedded"), StorageChoice("nf4", "nf4"), meta, placement).parts
    for name, layer in linear_layers(parts["transformer"]).items():
        stays = on_host is None or on_host not in name or (on_host == "norm" and name == "norm_out.linear")
        assert (layer.stored.device == meta) == stays, name
    for name in ("text_encoder", "text_encoder_2"):
        devices = {tensor.device.type for tensor in parts[name].parameters()}
        assert devices == {"cpu" if placement.text != "resident" else "meta"}
    assert {tensor.device.type for tensor in parts["vae"].parameters()} == {"meta"}


def test_unpinned_weights_stay_in_their_file():
    model = open_model("embedded")
    parts = load_components(model, StorageChoice("bf16", "bf16"), CPU, Placement(0, pinned=False)).parts
    files = [(file.data.data_ptr(), file.data.numel()) for file in model.weights["transformer"].source.mapped]
    for name, layer in linear_layers(parts["transformer"]).items():
        address = layer.packed.tensors["values"].data_ptr()
        mapped = any(start <= address < start + size for start, size in files)
        assert mapped == ("transformer_blocks" in name), name


# out of memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(OUT),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_running_out_of_memory_is_known_in_every_dress(error):
    assert gpu_memory.is_out_of_memory(error)
    wrapped = ValueError("while decoding")
    wrapped.__cause__ = error
    assert gpu_memory.is_out_of_memory(wrapped)
    later = RuntimeError("a capture was left behind")
    later.__context__ = error
    assert gpu_memory.is_out_of_memory(later)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        ValueError("out of memory"),
        InvalidOptionError("There is not enough host memory.", "It is out of memory.", "Close programs."),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_are_not_taken_for_it(error):
    assert not gpu_memory.is_out_of_memory(error)


def failing(error, at, times=1):
    """An `on_step` that raises at a step, so many times; the steps that it saw."""
    seen = []

    def on_step(done, total):
        seen.append(done)
        if done == at and seen.count(at) <= times:
            raise error

    return on_step, seen


@pytest.mark.parametrize(
    ("first", "smaller"),
    [
        (Placement(6), Placement(2)),
        (Placement(6), Placement(0, text="streamed")),
        (Placement(4, text="evicted"), Placement(0, text="streamed")),
        (Placement(2, pinned=False), Placement(0, text="evicted")),
    ],
)
def test_memory_that_another_process_takes_in_mid_run(plain, monkeypatch, told, first, smaller):
    """The step begins again with a smaller plan, the pixels are the same, and the smaller plan stays."""
    fit = fitted(first)
    monkeypatch.setattr(
        Fit, "smaller", lambda self, room: replace(self, chosen=replace(self.chosen, placement=smaller))
    )
    pipe = assemble(prepared(fit), told.append)
    on_step, seen = failing(torch.OutOfMemoryError(OUT), at=1)
    assert np.array_equal(np.asarray(pipe.paint(PAINT, on_step).image), plain)
    assert seen == [1, 1, 2]
    assert pipe.plan.placement == smaller
    assert len(told) == 1
    assert told[0].startswith("The GPU ran out of memory")


def test_the_planner_finds_the_smaller_plans_until_there_are_none(plain, told):
    pipe = assemble(prepared(fitted(**FORMATS)), told.append)
    on_step, _ = failing(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), at=1, times=100)
    with pytest.raises(InvalidOptionError, match="too little memory left") as error:
        pipe.paint(PAINT, on_step)
    assert told
    assert "--vram" in error.value.next_step
    assert np.array_equal(pixels(pipe), plain), "the pipeline goes on once there is memory again"


def test_memory_that_runs_out_while_loading(plain, monkeypatch, told):
    original, failed = residences.Residence.__init__, []

    def init(self, parts, fit, *others):
        if not failed:
            failed.append(fit)
            raise torch.OutOfMemoryError(OUT)
        original(self, parts, fit, *others)

    monkeypatch.setattr(residences.Residence, "__init__", init)
    pipe = assemble(prepared(fitted(**FORMATS)), told.append)
    assert len(told) == 1
    assert pipe.plan.peak_gpu_bytes < failed[0].chosen.peak_gpu_bytes
    assert np.array_equal(pixels(pipe), plain)


def test_another_error_passes_at_once():
    calls = []

    def action(fit):
        calls.append(fit)
        raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        surviving(action, fitted(), CPU)
    assert len(calls) == 1


def test_a_program_is_warned_of_a_smaller_plan():
    pipe = assemble(prepared(fitted(**FORMATS)))
    on_step, _ = failing(torch.OutOfMemoryError(OUT), at=1)
    with pytest.warns(UserWarning, match="ran out of memory"):
        pipe.paint(PAINT, on_step)


# the promise ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch):
    """The allocator of a card of 10 GB, as far as a cap looks at it."""
    fake = SimpleNamespace(fraction=0.8, set=[], grow=False)

    def set_fraction(fraction, index):
        fake.fraction = fraction
        fake.set.append(fraction)

    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda index: fake.fraction)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", set_fraction)

    def take_setting(text):
        name, _, value = text.partition(":")
        assert name == "expandable_segments"
        fake.grow = value == "True"

    settings = {"allocator_settings": {"expandable_segments": False}}
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: settings)
    monkeypatch.setattr(gpu_memory, "_set_allocator", take_setting)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=10 * 10**9))
    return fake


def test_the_cap_holds_inside_and_what_was_there_holds_afterwards(cuda):
    device = torch.device("cuda", 0)
    with gpu_memory.capped(device, 6 * 10**9):
        assert (cuda.fraction, cuda.grow) == (0.6, True)
    assert (cuda.fraction, cuda.grow) == (0.8, False)

    def run_out():
        with gpu_memory.capped(device, 20 * 10**9):
            assert cuda.fraction == 1.0
            raise torch.OutOfMemoryError(OUT)

    with pytest.raises(torch.OutOfMemoryError):
        run_out()
    assert (cuda.fraction, cuda.grow) == (0.8, False)


def test_nothing_is_capped_where_nothing_was_promised(cuda):
    with gpu_memory.capped(torch.device("cuda", 0), None), gpu_memory.capped(CPU, 5):
        pass
    assert cuda.set == []


# files and host memory ------------------------------------------------------------------------------------------------


@pytest.fixture
def own_copy(tmp_path):
    """The embedded model in a folder of the test's own, as stored in bf16."""
    folder = shutil.copytree(model_folder(), tmp_path / "model")
    return folder, assemble(prepared(fitted(Placement(0, pinned=False)), model=str(folder)))


def test_a_file_that_vanishes_while_it_is_streamed_can_be_read_to_its_end(own_copy):
    folder, pipe = own_copy
    expected = pixels(pipe)
    for file in (folder / "transformer").glob("*.safetensors"):
        file.unlink()
    assert np.array_equal(pixels(pipe), expected)


def test_a_file_that_changes_while_it_is_streamed_is_an_error(own_copy):
    folder, pipe = own_copy
    for file in (folder / "transformer").glob("*.safetensors"):
        os.utime(file, (1, 1))
    with pytest.raises(FileDamagedError, match="changed while its weights were streamed") as error:
        pipe.paint(PAINT)
    assert all((error.value.what, error.value.why, error.value.next_step))


def test_too_little_host_memory_is_an_error_before_anything_moves(monkeypatch):
    pipe = assemble(prepared(fitted(Placement(6))))
    monkeypatch.setattr(offload_host, "available_host_bytes", lambda: 1000)
    with pytest.raises(InvalidOptionError, match="not enough host memory"):
        assemble(prepared(fitted(Placement(0))))
    monkeypatch.undo()
    assert pixels(pipe).any()
