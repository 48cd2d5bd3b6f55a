"""`gossamer run` and `gossamer plan --measure` with a plan: what is said, what the JSON has, what faults lead to."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from gossamer.cli.main import main
from gossamer.memory.budget import Budget
from gossamer.memory.cards import find_card
from gossamer.memory.picture import Job
from gossamer.memory.request import PlanRequest
from gossamer.pipeline import painter
from gossamer.pipeline.fit import fit_request, subject_of
from gossamer.pipeline.options import AUTO

GB = 10**9
RUN = ["run", "a red ball", "--steps", "2", "--size", "64x64"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def planned(monkeypatch):
    """A plan as for a GPU, carried out on the CPU; the requests that were planned for."""
    seen = SimpleNamespace(requests=[], paints=[])

    def fit(options, model, device, paint=None, adapters=()):
        budget = Budget(options.vram or 6 * GB, options.ram or 16 * GB)
        formats = [None if name == AUTO else name for name in (options.storage, options.text_storage)]
        request = PlanRequest(
            subject_of(model, options.model),
            find_card("RTX 3060"),
            budget,
            Job(64, 64, 1, 2, 64),
            storage=formats[0],
            text_storage=formats[1],
            offload=options.offload,
            least_fidelity=options.least_fidelity,
        )
        seen.requests.append(request)
        seen.paints.append(paint)
        return fit_request(request, is_promise=options.vram is not None)

    monkeypatch.setattr("gossamer.pipeline.prepare.fit", fit)
    return seen


def document(capsys, *argv: str) -> tuple[dict, str]:
    assert main([*argv, "--format", "json"]) == 0
    out = capsys.readouterr()
    return json.loads(out.out), out.err


def test_the_plan_is_said_before_and_its_accuracy_afterwards(planned, capsys):
    assert main([*RUN, "--vram", "2GB", "--ram", "8GB"]) == 0
    out = capsys.readouterr()
    said = [line for line in out.err.splitlines() if line.startswith(("Plan: ", "Predicted: ", "It took "))]
    assert [line.split(":")[0].split(" ")[0] for line in said] == ["Plan", "Predicted", "It"]
    assert "s a step (" in said[-1]
    assert planned.requests[0].budget == Budget(2 * GB, 8 * GB)
    assert planned.paints[0].size.width == 64
    assert len(out.out.splitlines()) == 1


def test_json_has_the_whole_plan_and_what_it_took(planned, capsys):
    found, _ = document(capsys, *RUN, "--vram", "2GB", "--storage", "nf4", "--offload", "sequential")
    assert {"chosen", "plans", "refused", "notes"} == set(found["plan"])
    assert found["plan"]["chosen"]["storage"] == found["pictures"][0]["storage"] == "nf4"
    assert found["plan"]["chosen"]["resident_blocks"] == found["actual"]["resident_blocks"] == 0
    assert found["actual"]["step_seconds"] > 0
    assert found["actual"]["peak_bytes"] is None, "a CPU counts nothing"


def test_what_the_plan_chose_is_recorded_as_if_it_had_been_named(planned, capsys):
    found, _ = document(capsys, *RUN, "--vram", "2GB", "--least-fidelity", "any")
    picture = found["pictures"][0]
    chosen = found["plan"]["chosen"]
    assert (picture["storage"], picture["text_storage"]) == (chosen["storage"], chosen["text_storage"])
    again, _ = document(capsys, *RUN, "--storage", chosen["storage"], "--text-storage", chosen["text_storage"])
    assert again["pictures"][0]["painted"] is False, "the same settings, so nothing is left to paint"
    assert "actual" not in again


def test_running_out_of_memory_in_the_second_picture_keeps_the_first(planned, capsys, monkeypatch):
    original, calls = painter.Pipeline._denoise, []

    def denoise(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, *arguments)

    monkeypatch.setattr(painter.Pipeline, "_denoise", denoise)
    found, err = document(capsys, *RUN, "--seed", "0-1", "--output", "pictures")
    assert [picture["painted"] for picture in found["pictures"]] == [True, True]
    assert len(calls) == 3
    assert err.count("The GPU ran out of memory") == 1


def test_when_nothing_smaller_is_left_finished_pictures_stay(planned, capsys, monkeypatch, tmp_path):
    original, calls = painter.Pipeline._denoise, []

    def denoise(self, *arguments):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return original(self, *arguments)

    monkeypatch.setattr(painter.Pipeline, "_denoise", denoise)
    assert main([*RUN, "--seed", "0-1", "--output", "pictures", "--format", "json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "invalid-option"
    assert "too little memory" in error["what"]
    assert "GB of the GPU" in error["next"] or "MB of the GPU" in error["next"]
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1


@pytest.mark.parametrize("flag", [["--vram", "6GB"], ["--ram", "6GB"], ["--offload", "model"]])
def test_on_a_cpu_there_is_nothing_to_plan(capsys, flag):
    assert main([*RUN, "--device", "cpu", *flag, "--format", "json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert flag[0] in error["what"]
    assert "--device cuda" in error["next"]


def test_too_small_a_budget_is_an_error_before_loading(planned, capsys, monkeypatch):
    monkeypatch.setattr("gossamer.pipeline.load.load_components", lambda *_: pytest.fail("a model was loaded"))
    assert main([*RUN, "--vram", "300MB", "--format", "json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert "does not fit" in error["what"]
    assert "--vram 0." in error["next"]


# plan --measure -------------------------------------------------------------------------------------------------------


@pytest.fixture
def a_gpu(planned, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (3 * GB, 4 * GB))
    monkeypatch.setattr("gossamer.pipeline.prepare.pick_device", lambda name: torch.device("cpu"))
    return planned


def test_measuring_stands_beside_the_prediction(a_gpu, capsys):
    found, _ = document(capsys, "plan", "embedded", "--measure", "--size", "64x64", "--storage", "nf4")
    assert found["chosen"]["storage"] == "nf4"
    assert found["actual"]["predicted_step_seconds"] == found["chosen"]["step_seconds"]
    assert found["actual"]["step_seconds"] > 0
    assert a_gpu.requests[0].budget.gpu == 3 * GB, "what is free"


def test_measuring_in_words(a_gpu, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["plan", "embedded", "--measure", "--size", "64x64", "--vram", "2GB"]) == 0
    text = capsys.readouterr().out
    assert "Chosen: " in text
    assert "It took " in text


@pytest.mark.parametrize(
    ("extra", "hint"), [(["--gpu", "3060"], "Leave one of them out"), (["--batch", "2"], "Leave --batch out")]
)
def test_what_cannot_be_measured(a_gpu, capsys, extra, hint):
    assert main(["plan", "embedded", "--measure", *extra, "--format", "json"]) == 2
    assert hint in json.loads(capsys.readouterr().out)["error"]["next"]


def test_nothing_to_measure_on(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["plan", "embedded", "--measure", "--format", "json"]) == 2
    assert "--measure" in json.loads(capsys.readouterr().out)["error"]["next"]


def test_a_model_that_is_not_here_cannot_be_measured(a_gpu, capsys):
    assert main(["plan", "FLUX.1-dev", "--measure", "--format", "json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] in ("file-missing", "invalid-option")
