import contextlib
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gossamer
from gossamer.demo.embedded import adapter_paths, model_folder
from gossamer.errors import FileDamagedError, FileMissingError, WrongModelError
from gossamer.pipeline import sources
from gossamer.pipeline.folder import MODELS, component_hashes
from gossamer.pipeline.model import open_folder
from gossamer.pipeline.options import LoadOptions
from gossamer.pipeline.prepare import prepare
from gossamer.pipeline.quiet import NOISY, quiet_loading
from gossamer.pipeline.sources import Embedded, HubRepository, LocalPath, find_source

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the embedded model whose files can be changed one by one."""
    return Path(shutil.copytree(model_folder(), tmp_path / "model"))


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def test_the_embedded_folder():
    model = open_folder(model_folder())
    assert model.profile.picture_side == 256
    assert model.profile.max_sequence_length == 64
    assert model.stored == dict.fromkeys(MODELS, "bf16")
    assert not model.is_control
    assert all(path.is_file() for path in adapter_paths().values())


def test_hashes_follow_every_byte(copy):
    before = component_hashes(copy)
    assert before == component_hashes(model_folder()) == open_folder(copy).hashes()
    edit_json(copy / "scheduler" / "scheduler_config.json", shift=2.0)
    changed = {name for name, value in component_hashes(copy).items() if value != before[name]}
    assert changed == {"scheduler"}


def shard(copy: Path) -> Path:
    return sorted((copy / "transformer").glob("*.safetensors"))[0]


DAMAGES = {
    "cut weights": lambda copy: os.truncate(shard(copy), 100_000),
    "no bytes": lambda copy: os.truncate(shard(copy), 0),
    "no shard": lambda copy: shard(copy).unlink(),
    "no autoencoder": lambda copy: shutil.rmtree(copy / "vae"),
    "no text weights": lambda copy: (copy / "text_encoder_2" / "model.safetensors").unlink(),
    "no index": lambda copy: (copy / "model_index.json").unlink(),
    "config is no JSON": lambda copy: (copy / "transformer" / "config.json").write_text("{"),
    "config is a list": lambda copy: (copy / "vae" / "config.json").write_text("[]"),
    "config lacks a size": lambda copy: edit_json(copy / "transformer" / "config.json", num_layers=None),
    "other model": lambda copy: edit_json(copy / "model_index.json", _class_name="StableDiffusionXLPipeline"),
    "Fill model": lambda copy: edit_json(copy / "transformer" / "config.json", in_channels=384, out_channels=64),
    "length too long": lambda copy: edit_json(copy / "gossamer.json", max_sequence_length=4096),
    "unknown key": lambda copy: edit_json(copy / "gossamer.json", max_sequence=64),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_refused_before_loading(copy, damage):
    damage(copy)
    with pytest.raises((FileDamagedError, FileMissingError, WrongModelError)) as caught:
        open_folder(copy)
    assert str(copy) in caught.value.what + caught.value.why


def test_a_folder_of_another_librarys_quantisation_is_refused(copy):
    edit_json(copy / "transformer" / "config.json", quantization_config={"quant_method": "torchao"})
    with pytest.raises(WrongModelError, match="quantised by torchao"):
        open_folder(copy)


def test_mixed_types_are_stored_without_loss(copy):
    file = copy / "text_encoder" / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert open_folder(copy).stored["text_encoder"] == "fp16"
    assert prepare(LoadOptions(model=str(copy))).storage.text == "stored"
    tensors = load_file(file)
    name = next(name for name in tensors if "fc1.weight" in name)
    save_file(tensors | {name: tensors[name].float()}, file, {"format": "pt"})
    assert open_folder(copy).stored["text_encoder"] == "stored"
    encoder = gossamer.load(copy).components["text_encoder"]
    formats = {name: layer.packed.format for name, layer in gossamer.linear_layers(encoder).items()}
    assert {name for name, storage in formats.items() if storage == "fp32"} == {
        layer for layer in formats if name.removesuffix(".weight").endswith(layer)
    }
    assert set(formats.values()) == {"fp16", "fp32"}


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_every_tensor_is_used_and_found(copy, change):
    file = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "fc1.weight" in name)
    if change == "missing":
        del tensors[name]
    else:
        name = "extra.weight"
        tensors[name] = torch.zeros(2, 2)
    save_file(tensors, file, {"format": "pt"})
    words = "missing keys" if change == "missing" else "1 of the 37 tensors"
    with pytest.raises(FileDamagedError, match=f"{words}.*{name.split('.')[-2]}"):
        gossamer.load(copy)


def test_a_config_that_the_weights_do_not_fit(copy):
    edit_json(copy / "text_encoder" / "config.json", intermediate_size=64)
    with pytest.raises(FileDamagedError):
        gossamer.load(copy)


def test_sources(tmp_path):
    assert find_source("embedded") == Embedded()
    assert find_source(str(tmp_path)) == LocalPath(tmp_path)
    assert find_source("black-forest-labs/FLUX.1-dev") == HubRepository("black-forest-labs/FLUX.1-dev")
    for missing in ("flux", "./a/b", "/no/such/folder", "a/b/c"):
        with pytest.raises(FileMissingError, match="no model"):
            find_source(missing)
    file = tmp_path / "flux.safetensors"
    file.touch()
    assert find_source(str(file)) == LocalPath(file)


def hub_errors():
    from huggingface_hub import errors

    def response(kind: type) -> Exception:
        # the constructors want an HTTP response, whose library differs between versions; none of it is looked at
        return kind.__new__(kind)

    return {
        "is gated": response(errors.GatedRepoError),
        "no such repository": response(errors.RepositoryNotFoundError),
        "hub cannot be reached": errors.LocalEntryNotFoundError("offline"),
        "could not be fetched": errors.HFValidationError("bad name"),
    }


@pytest.mark.parametrize("words", ["is gated", "no such repository", "hub cannot be reached", "could not be fetched"])
def test_hub_errors_have_three_parts(words, monkeypatch):
    def fail(*_args, **_options):
        raise hub_errors()[words]

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(FileMissingError, match=words) as caught:
        HubRepository("owner/name").fetch()
    assert "owner/name" in caught.value.what
    assert caught.value.next_step


def test_no_pickle_is_ever_asked_for(monkeypatch, tmp_path):
    asked = {}

    def record(name, allow_patterns):
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", record)
    assert sources.find_source("owner/name").fetch() == tmp_path
    endings = {pattern.rsplit(".", 1)[1] for pattern in asked["owner/name"]}
    assert endings == {"json", "txt", "model", "safetensors"}


def test_quiet_loading_leaves_every_setting_as_it_was():
    with quiet_loading():
        pass
    before = {name: logging.getLogger(name).level for name in NOISY}
    inside = contextlib.ExitStack()
    inside.enter_context(quiet_loading())
    assert {logging.getLogger(name).level for name in NOISY} == {logging.ERROR}
    inside.close()
    assert {name: logging.getLogger(name).level for name in NOISY} == before
