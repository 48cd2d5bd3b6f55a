"""A checkpoint file with a base model, from the command line."""

from __future__ import annotations

import json

import pytest

import checkpoint_writer as writer
from gossamer.cli.main import main
from gossamer.demo.embedded import model_folder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def file(tmp_path):
    state = writer.to_bfl(writer.read_component(model_folder(), "transformer"))
    types = {name: "Q8_0" for name, tensor in state.items() if tensor.dim() == 2}
    return writer.save_gguf(tmp_path / "flux.gguf", state, types, "flux")


def test_a_picture_from_a_file_can_be_painted_again(file, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    command = ["run", "a red ball", "--model", str(file), "--base", "embedded", "--steps", "1", "--size", "64x64"]
    assert main([*command, "--output", str(picture), "--format", "json"]) == 0
    (painted,) = json.loads(capsys.readouterr().out)["pictures"]
    assert painted["storage"] == "Q8_0"
    assert painted["kept_layers"] == {}
    assert main(["rerun", str(picture), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["identical"]


def test_a_file_without_a_base(file, capsys):
    assert main(["run", "a red ball", "--model", str(file)]) == 2
    said = capsys.readouterr().err
    assert "is not a whole model: it lacks the scheduler" in said
    assert "--base" in said


def test_inspect_says_what_loading_would_use(file, capsys):
    assert main(["inspect", str(file), "--format", "json"]) == 0
    keys = json.loads(capsys.readouterr().out)["keys"]
    assert keys["used"] == keys["total"]
