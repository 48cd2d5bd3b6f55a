"""Plans of a load: what is told and what is found, and what a plan means for the formats that are recorded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gossamer.errors import InvalidOptionError, UnknownOptionError
from gossamer.memory.budget import Budget
from gossamer.memory.cards import card_of, find_card
from gossamer.memory.model_specs import DEV
from gossamer.memory.picture import Job
from gossamer.memory.request import PlanRequest
from gossamer.memory.subject import known_subject
from gossamer.pipeline import fit as fits
from gossamer.pipeline.fit import Fit, NoPlan, fit, fit_request, subject_of
from gossamer.pipeline.model import open_model
from gossamer.pipeline.options import AUTO, LoadOptions, PaintOptions, make
from gossamer.pipeline.prepare import prepare

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GB = 10**9
MB = 10**6


def request(gpu: float, host: float | None = 64, card: str = "RTX 3060", **named) -> PlanRequest:
    budget = Budget(int(gpu * GB), None if host is None else int(host * GB))
    return PlanRequest(known_subject(DEV), find_card(card), budget, Job(), **named)


# told and found -------------------------------------------------------------------------------------------------------


def test_a_budget_that_nobody_named_changes_no_format_where_everything_fits():
    found = fit_request(request(60, card="H200"), is_promise=False)
    assert (found.chosen.storage, found.chosen.text_storage) == ("bf16", "bf16")
    assert (found.chosen.kind, found.chosen.placement.text, found.chosen.placement.vae) == (
        "resident",
        "resident",
        "whole",
    )
    assert found.chosen.placement.modulation == "prepass", "27 % of the weights leave all the same"
    assert found.leaves_formats == (True, True)
    assert found.limit is None


def test_where_it_does_not_fit_the_planner_chooses():
    found = fit_request(request(12, card="RTX 4070"), is_promise=False)
    assert found.chosen.storage != "bf16"
    assert found.chosen.fits


def test_a_promise_is_planned_for_speed_and_is_a_limit():
    told = fit_request(request(60, card="H200"), is_promise=True)
    assert told.chosen.storage == "fp8"
    assert told.limit == 60 * GB - told.request.budget.gpu_reserve
    assert told.chosen.peak_gpu_bytes < told.request.budget.gpu_free < told.limit
    assert told.leaves_formats[0] is False


def test_a_named_format_is_not_chosen_again():
    for is_promise in (True, False):
        found = fit_request(request(60, card="H200", storage="nf4", text_storage="Q8_0"), is_promise)
        assert (found.chosen.storage, found.chosen.text_storage) == ("nf4", "Q8_0")


def test_a_named_offload_is_carried_out():
    found = fit_request(request(60, card="H200", offload="sequential"), is_promise=False)
    assert (found.chosen.placement.resident_blocks, found.chosen.placement.text) == (0, "streamed")


def test_a_host_without_room_for_the_modulation_leaves_it_on_the_gpu():
    found = fit_request(request(60, 6, card="H200", storage="nf4"), is_promise=True)
    assert found.chosen.placement.modulation == "resident"
    assert any("host has no room" in reason for reason in found.chosen.reasons)
    with_room = fit_request(request(60, 12, card="H200", storage="nf4"), is_promise=True)
    assert with_room.chosen.placement.modulation == "prepass"
    assert with_room.chosen.peak_gpu_bytes < found.chosen.peak_gpu_bytes - 3 * GB


def test_too_little_for_anything_is_an_error_that_names_the_smallest():
    with pytest.raises(InvalidOptionError, match="does not fit") as error:
        fit_request(request(1), is_promise=True)
    assert "--vram " in error.value.next_step


# smaller plans --------------------------------------------------------------------------------------------------------


def test_smaller_plans_keep_the_formats_and_end():
    found = fit_request(request(60, card="H200"), is_promise=True)
    seen = [found.chosen]

    def on_and_on(found):
        while True:
            found = found.smaller(None)
            assert (found.chosen.storage, found.chosen.text_storage) == (seen[0].storage, seen[0].text_storage)
            assert found.chosen.peak_gpu_bytes <= 0.9 * seen[-1].peak_gpu_bytes
            seen.append(found.chosen)

    with pytest.raises(InvalidOptionError, match="too little memory left") as error:
        on_and_on(found)
    assert 3 <= len(seen) < 40
    assert seen[-1].placement.resident_blocks == 0
    assert "GB of the GPU" in error.value.next_step


def test_what_another_process_left_is_what_the_next_plan_is_for():
    found = fit_request(request(60, card="H200", storage="nf4"), is_promise=True)
    assert found.smaller(3 * GB).chosen.peak_gpu_bytes <= 3 * GB
    with pytest.raises(InvalidOptionError, match="too little memory left"):
        found.smaller(int(0.5 * GB))


# of real models -------------------------------------------------------------------------------------------------------


@pytest.fixture
def a_gpu(monkeypatch):
    """What an RTX 3060 says of itself, with so much of it free."""
    free = SimpleNamespace(bytes=4 * GB)
    card = card_of(find_card("RTX 3060").capability, 28)
    monkeypatch.setattr(fits, "card_here", lambda device: card)
    monkeypatch.setattr(fits, "unused_bytes", lambda device: free.bytes)
    monkeypatch.setattr(fits, "available_host_bytes", lambda: 16 * GB)
    monkeypatch.setattr("gossamer.pipeline.prepare.pick_device", lambda name: CUDA)
    return free


def test_the_subject_has_the_sizes_of_its_configs():
    subject = subject_of(open_model("embedded"), "embedded")
    assert subject.is_here
    assert (subject.spec.t5.layers, subject.spec.clip.layers) == (2, 2)
    assert (subject.spec.side, subject.spec.text_tokens) == (256, 64)


def test_a_picture_decides_the_plan(a_gpu):
    a_gpu.bytes = 4 * GB
    small = prepare(LoadOptions(), PaintOptions("a", size=(64, 64), steps=3)).fit
    large = prepare(LoadOptions(), PaintOptions("a", size=(1024, 1024), steps=3)).fit
    assert isinstance(small, Fit)
    assert isinstance(large, Fit)
    assert small.request.job == Job(64, 64, 1, 3, small.request.subject.spec.text_tokens)
    assert small.chosen.peak_gpu_bytes < large.chosen.peak_gpu_bytes


def test_the_formats_of_the_plan_are_recorded_as_if_they_had_been_named(a_gpu):
    paint = PaintOptions("a")
    free = prepare(LoadOptions(), paint)
    assert (free.storage.transformer, free.storage.text) == ("bf16", "bf16")
    chosen = prepare(LoadOptions(vram=800 * MB, least_fidelity="any", compute="exact"), paint)
    assert isinstance(chosen.fit, Fit)
    assert chosen.storage.transformer == chosen.fit.chosen.storage
    named = prepare(LoadOptions(storage="nf4", text_storage="Q8_0"), paint)
    assert (named.storage.transformer, named.storage.text) == ("nf4", "Q8_0")
    assert prepare(LoadOptions(storage=named.storage.transformer, text_storage="Q8_0"), paint).recipe(
        paint
    ) == named.recipe(paint)


def test_adapters_are_planned_for(a_gpu, bundled):
    a_gpu.bytes = 2 * GB
    plain, adapted = (prepare(make(LoadOptions, {"loras": loras})).fit for loras in ((), ("pencil",)))
    assert isinstance(plain, Fit)
    assert isinstance(adapted, Fit)
    assert adapted.request.rank == 4
    assert adapted.chosen.gpu_bytes["denoise"]["adapters"] > 0
    assert "adapters" not in plain.chosen.gpu_bytes["denoise"]


def test_a_promise_that_is_more_than_there_is_counts_as_what_there_is(a_gpu):
    a_gpu.bytes = 2 * GB
    found = prepare(LoadOptions(vram=100 * GB)).fit
    assert isinstance(found, Fit)
    assert found.limit == 2 * GB


def test_an_unknown_card_runs_without_a_plan_unless_one_was_asked_for(a_gpu, monkeypatch):
    def unknown(device):
        raise InvalidOptionError("This card is unknown.", "It is new.", "Name another.")

    monkeypatch.setattr(fits, "card_here", unknown)
    found = prepare(LoadOptions())
    assert found.fit == NoPlan("No plan: This card is unknown. It is new. Everything stays on the GPU.")
    assert found.storage.transformer == "bf16"
    for named in ({"vram": GB}, {"ram": 16 * GB}, {"offload": "model"}):
        with pytest.raises(InvalidOptionError, match="unknown"):
            prepare(LoadOptions(**named))


# a CPU ----------------------------------------------------------------------------------------------------------------


def test_on_a_cpu_there_is_no_plan_and_nothing_to_ask_of_one():
    model = open_model("embedded")
    assert fit(LoadOptions(), model, CPU) == NoPlan()
    for named, flag in (({"vram": "6GB"}, "--vram"), ({"ram": "6GB"}, "--ram"), ({"offload": "model"}, "--offload")):
        with pytest.raises(InvalidOptionError, match=f"{flag} cannot be used on the device 'cpu'"):
            fit(make(LoadOptions, named), model, CPU)
    with pytest.raises(UnknownOptionError, match="no level of fidelity"):
        fit(LoadOptions(least_fidelity="bst"), model, CPU)


# options --------------------------------------------------------------------------------------------------------------


def test_options():
    options = make(LoadOptions, {"vram": "6GB", "ram": "16GiB", "offload": "enable_model_cpu_offload"})
    assert (options.vram, options.ram, options.offload) == (6 * GB, 16 * 2**30, "model")
    assert (LoadOptions().storage, LoadOptions().text_storage) == (AUTO, AUTO)
    for wrong in ({"vram": "6"}, {"vram": -1}, {"ram": 0}, {"ram": True}, {"offload": "balanced"}):
        with pytest.raises(InvalidOptionError):
            make(LoadOptions, wrong)
    with pytest.raises(UnknownOptionError):
        make(LoadOptions, {"offload": "sequental"})
