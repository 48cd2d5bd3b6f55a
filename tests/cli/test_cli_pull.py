import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from gossamer.cli.main import main
from gossamer.demo.embedded import model_folder
from gossamer.pipeline import transfer
from hub_stub import COMMIT, Hub, environment_for, point_client_at, serving

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = "owner/name"
LARGE = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"


@pytest.fixture(scope="session")
def model() -> dict[str, bytes]:
    folder = model_folder()
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(model, tmp_path, monkeypatch):
    """A hub with the embedded model."""
    monkeypatch.setattr(transfer, "PAUSE", 0.001)
    with serving(Hub(dict(model))) as hub:
        point_client_at(hub, tmp_path / "cache", monkeypatch)
        yield hub


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_pulled_paints_without_a_network(hub, model, tmp_path, capsys, monkeypatch):
    assert main(["pull", MODEL]) == 0
    printed = capsys.readouterr()
    folder = Path(printed.out.strip())
    assert contents(folder) == model
    size = f"{sum(map(len, model.values())) / 1e6:.1f} MB"
    assert printed.err.startswith(f"owner/name, main, commit {COMMIT[:12]}: {len(model)} files, {size}; ")
    assert "2 files  18.6 MB" in printed.err or "  transformer  " in printed.err
    assert f"into {constants.HF_HUB_CACHE}" in printed.err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    made = tmp_path / "made.png"
    assert main(["run", "a cone", "--model", MODEL, "--steps", "1", "--size", "64x64", "--output", str(made)]) == 0
    assert made.exists()
    assert hub.asked == []
    capsys.readouterr()
    assert main(["pull", MODEL]) == 0
    assert capsys.readouterr().out.strip() == str(folder)


def test_json(hub, model, capsys):
    assert main(["pull", MODEL, "--format", "json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["model"], first["revision"], first["commit"]) == (MODEL, "main", COMMIT)
    assert first["bytes"] == sum(map(len, model.values()))
    assert {entry["name"] for entry in first["files"]} == set(model)
    assert main(["pull", f"{MODEL}/{LARGE}", "--revision", "v1", "--format", "json"]) == 0
    second = json.loads(capsys.readouterr().out)
    (file,) = second["files"]
    assert file["fetched"] is False
    assert Path(second["path"]).read_bytes() == model[LARGE]
    assert len(file["digest"]) == 64


def test_an_interrupted_process_leaves_what_arrived_and_a_rerun_resumes(hub, model, tmp_path, capsys):
    hub.cuts, hub.stall = {LARGE: [5_000_000]}, threading.Event()
    environment = {**os.environ, **environment_for(hub, tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gossamer", "pull", MODEL, "--format", "json"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    blobs = tmp_path / "cache" / "models--owner--name" / "blobs"
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and running.poll() is None:
            if any(path.stat().st_size > 4_900_000 for path in blobs.glob("*.incomplete")):
                break
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130, err
    assert b"Traceback" not in err
    assert b"run the same command to resume" in err
    document = json.loads(out)
    (partial,) = blobs.glob("*.incomplete")
    start = partial.stat().st_size
    assert model[LARGE].startswith(partial.read_bytes())
    assert document["interrupted"] is True
    hub.asked.clear()
    assert main(["pull", MODEL]) == 0
    assert [span for name, span in hub.fetched() if name == LARGE] == [f"bytes={start}-"]
    assert contents(Path(capsys.readouterr().out.strip())) == model


def gated(hub: Hub) -> None:
    hub.gated = True


def wrong(hub: Hub) -> None:
    hub.served = {LARGE: bytes(len(hub.files[LARGE]))}


@pytest.mark.parametrize(
    ("argv", "spoil", "code", "words"),
    [
        (["owner/other"], None, "file-missing", "no such repository"),
        ([f"{MODEL}/x.safetensors"], None, "file-missing", "There is no file 'x.safetensors'"),
        ([MODEL, "--revision", "v9"], None, "file-missing", "--revision"),
        ([MODEL, "--offline"], None, "file-missing", "without --offline"),
        ([MODEL], gated, "file-missing", "hf auth login"),
        ([MODEL], wrong, "file-damaged", "removed"),
        (["embedded"], None, "invalid-option", "owner/name"),
        ([], None, "invalid-option", "MODEL"),
    ],
)
def test_errors_have_three_parts_and_code_2(hub, argv, spoil, code, words, capsys):
    if spoil is not None:
        spoil(hub)
    assert main(["pull", *argv, "--format", "json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == code
    assert words in " ".join(error.values())
    assert all(error[part] for part in ("what", "why", "next"))
    assert main(["pull", *argv]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"error[{code}]: " in printed.err
