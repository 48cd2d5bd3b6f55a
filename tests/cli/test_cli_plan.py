import json

import pytest

from gossamer.cli import plan_drawing
from gossamer.cli.main import main
from gossamer.pipeline import sources

ASKED = ["plan", "FLUX.1-dev", "--vram", "6GB", "--ram", "24GB", "--gpu", "RTX 3060 12GB"]
KEYS = {
    "storage",
    "compute",
    "placement",
    "resident_blocks",
    "peak_gpu_bytes",
    "host_bytes",
    "step_seconds",
    "total_seconds",
    "fits",
    "reasons",
}


@pytest.fixture(autouse=True)
def plenty_of_disk(monkeypatch):
    monkeypatch.setattr("gossamer.cli.plan._free_disk", lambda: 10**12)


def answer(capsys, *argv: str) -> dict:
    assert main([*argv, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *argv: str) -> dict:
    assert main([*argv, "--format", "json"]) == 2
    out = capsys.readouterr()
    assert "Traceback" not in out.err
    error = json.loads(out.out)["error"]
    assert all(error[part] for part in ("code", "what", "why", "next"))
    return error


def test_json(capsys):
    document = answer(capsys, *ASKED)
    assert set(document) == {"chosen", "plans", "refused", "notes"}
    assert document["plans"][0] == document["chosen"]
    for each in document["plans"]:
        assert set(each) >= KEYS
        assert each["reasons"]
        assert each["fits"] == (each["peak_gpu_bytes"] <= 5.35e9 and each["host_bytes"] <= 22e9)
    assert document["chosen"]["fits"]
    assert {tuple(refused) for refused in document["refused"]} == {("what", "why", "instead")}
    assert {each["placement"] for each in document["plans"]} == {"resident", "partial", "streamed"}


def test_text(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main([*ASKED, "--storage", "nf4", "--offload", "sequential"]) == 0
    text = capsys.readouterr().out
    assert "Chosen: nf4 weights, bf16 products, 0 of 57 blocks resident" in text
    assert "--offload sequential: sequential offload: nothing stays" in text
    assert "Predicted, not measured: FLUX.1-dev on RTX 3060 12GB" in text
    assert "Instead: The pre-pass" in text
    bars = [line for line in text.splitlines() if line.startswith("  denoise")]
    assert len(bars) == 1
    assert bars[0].split("|")[1].count("=") >= 2


def test_the_bar_adds_up():
    parts = {"resident blocks": 400, "slots": 100, "VAE": 1}
    bar = plan_drawing.bar(parts, gpu=1000, reserve=100)
    assert len(bar) == plan_drawing.BAR
    assert (bar.count("#"), bar.count("="), bar.count("v"), bar.count(".")) == (24, 6, 0, 6)
    over = plan_drawing.bar({"resident blocks": 5000}, gpu=1000, reserve=100)
    assert over == "#" * plan_drawing.BAR


def test_the_embedded_model_is_planned_from_its_own_files(capsys):
    document = answer(capsys, "plan", "embedded", "--gpu", "1660", "--ram", "8GB")
    assert document["chosen"]["blocks"] == 6
    assert document["chosen"]["disk_bytes"] == 0
    assert document["chosen"]["peak_gpu_bytes"] < 1.4e8  # of which 70 MB are workspaces of cuBLAS


def test_bundled_adapter_files(capsys, adapter_files):
    asked = ["plan", "embedded", "--gpu", "1660", "--ram", "8GB", "--storage", "nf4"]
    plain = answer(capsys, *asked)["chosen"]
    adapted = answer(capsys, *asked, "--lora", str(adapter_files["pencil"]))["chosen"]
    assert adapted["step_seconds"] > plain["step_seconds"]
    assert adapted["gpu_bytes"]["denoise"]["adapters"] > 0


def test_without_a_card_one_is_assumed_and_said_to_be(capsys):
    document = answer(capsys, "plan", "black-forest-labs/FLUX.1-schnell", "--vram", "8GiB", "--ram", "32GB")
    assert any("times are those of an RTX 3060 12GB" in note for note in document["notes"])
    assert document["chosen"]["peak_gpu_bytes"] < 8 * 2**30


def test_size_batch_and_steps(capsys):
    one = answer(capsys, *ASKED, "--storage", "nf4", "--size", "512x512", "--steps", "10")["chosen"]
    four = answer(capsys, *ASKED, "--storage", "nf4", "--size", "512x512", "--steps", "10", "--batch", "4")["chosen"]
    assert 3 * one["step_seconds"] < four["step_seconds"] < 4 * one["step_seconds"]
    assert 10 * one["step_seconds"] < one["total_seconds"] < 20 * one["step_seconds"]


def test_a_hub_id_that_is_unknown_is_not_fetched(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sources.HubCache, "pulled", lambda self: None)
    monkeypatch.setattr(sources.HubRepository, "fetch", lambda *_: pytest.fail("nothing may be downloaded"))
    error = refusal(capsys, "plan", "somebody/another-flux", "--gpu", "3060")
    assert error["code"] == "file-missing"
    assert "gossamer pull somebody/another-flux" in error["next"]


def test_nothing_to_plan_for(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "--gpu" in refusal(capsys, "plan", "FLUX.1-dev")["next"]


@pytest.mark.parametrize(
    ("extra", "code", "hint"),
    [
        (["--vram", "1GB"], "invalid-option", "--vram 1."),
        (["--ram", "2GB", "--storage", "nf4"], "invalid-option", "--ram "),
        (["--vram", "6"], "invalid-option", "6GB"),
        (["--vram=-6GB"], "invalid-option", "6GB"),
        (["--ram", "lots"], "invalid-option", "6GB"),
        (["--gpu", "RTX 3065"], "unknown-option", "Did you mean"),
        (["--size", "1000x1000"], "invalid-option", "992x992"),
        (["--batch", "0"], "invalid-option", "--batch 1"),
        (["--steps", "-3"], "invalid-option", "--steps 1"),
        (["--steps", "many"], "invalid-option", "20"),
        (["--storage", "nf5"], "unknown-storage", "nf4"),
        (["--storage", "IQ2_S"], "invalid-option", "--storage"),
        (["--text-storage", "nf5"], "unknown-storage", "nf4"),
        (["--compute", "fp4"], "unknown-option", "auto"),
        (["--compute", "fp8", "--storage", "nf4"], "invalid-option", "auto"),
        (["--offload", "modle"], "unknown-option", "model"),
        (["--offload", "balanced"], "invalid-option", "auto"),
        (["--least-fidelity", "bst"], "unknown-option", "good"),
        (["--lora", "nothing.safetensors"], "file-missing", "path"),
        (["--measure"], "invalid-option", "Leave --measure out"),
        (["--vrma", "6GB"], "unknown-option", "--vram"),
    ],
)
def test_mistakes(capsys, extra, code, hint):
    error = refusal(capsys, *ASKED, *extra)
    assert error["code"] == code
    assert hint in error["next"]


@pytest.mark.parametrize("model", ["FLUX.9", "no/such/folder", ""])
def test_models_that_are_none(capsys, model):
    assert refusal(capsys, "plan", model, "--gpu", "3060")["code"] in ("file-missing", "invalid-option")


def test_refusals_are_printed_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert main([*ASKED, "--least-fidelity", "exact"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Accept it with --least-fidelity nf4" in text
