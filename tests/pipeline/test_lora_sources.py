"""Adapters from the hub: a local path wins, then the cache, then a verified download."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import constants, hf_hub_download

from gossamer.errors import FileDamagedError, FileMissingError, GossamerError
from gossamer.pipeline import transfer
from gossamer.pipeline.lora_sources import locate
from gossamer.pipeline.loras import LoraChoice, parse_lora
from gossamer.pipeline.prepare import read_adapters
from gossamer.pipeline.pull import fetch, plan_pull
from hub_stub import COMMIT, Hub, point_client_at, serving

FILE = "owner/name/styles/ink.safetensors"


@pytest.fixture
def content(adapter_files):
    return adapter_files["pencil"].read_bytes()


@pytest.fixture
def hub(content, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "PAUSE", 0.001)
    monkeypatch.chdir(tmp_path)
    with serving(Hub({"styles/ink.safetensors": content, "README.md": b"ink"})) as hub:
        point_client_at(hub, tmp_path / "cache", monkeypatch)
        yield hub


@pytest.mark.parametrize("source", [FILE, "owner/name"])
def test_fetched_once_and_then_from_the_cache(source, hub, content, embedded_spec):
    path = locate(LoraChoice(source))
    assert path.read_bytes() == content
    assert path.parts[-3:] == (COMMIT, "styles", "ink.safetensors")
    assert [name for name, _ in hub.fetched()] == ["styles/ink.safetensors"]
    hub.asked.clear()
    (named,) = read_adapters([parse_lora(f"{source}:0.5@0-0.5")], embedded_spec)
    assert named.adapter.terms
    assert named.name == ("ink" if source == FILE else "name")
    assert named.use.source == source
    assert hub.asked == []


def test_what_was_pulled_or_fetched_by_another_program_is_used(hub, content, monkeypatch):
    fetch(plan_pull(FILE))
    hub.asked.clear()
    assert locate(LoraChoice(FILE)).read_bytes() == content
    assert hub.asked == []
    hf_hub_download("owner/name", "README.md")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate(LoraChoice(FILE)).read_bytes() == content


def test_a_local_path_always_wins(hub, tmp_path):
    for source in (FILE, "owner/name.d"):
        here = tmp_path / source
        here.parent.mkdir(parents=True, exist_ok=True)
        here.write_bytes(b"mine")
        assert locate(LoraChoice(source)).resolve() == here
    assert hub.asked == []


@pytest.mark.parametrize(
    "source",
    [
        "styles/ink.safetensors",
        "./a/b/ink.safetensors",
        "/a/b/ink.safetensors",
        "a/b/ink.gguf",
        "a/b/c",
        r"a\b\c.safetensors",
    ],
)
def test_what_can_only_be_local_asks_nobody(source, hub):
    with pytest.raises(FileMissingError, match="There is no adapter file"):
        locate(LoraChoice(source))
    assert hub.asked == []


def test_bundled_names_ask_nobody(hub, bundled):
    assert locate(LoraChoice("pencil")) == bundled["pencil"]
    with pytest.raises(GossamerError, match="Did you mean 'pencil'"):
        locate(LoraChoice("pensil"))
    assert hub.asked == []


def test_a_repository_that_holds_several(hub, content):
    """Which one is meant is never guessed, not even when the cache has only one of them."""
    hub.files["other.safetensors"] = content
    locate(LoraChoice(FILE))
    with pytest.raises(FileMissingError, match="it holds 2 ") as caught:
        locate(LoraChoice("owner/name"))
    assert "other.safetensors, styles/ink.safetensors" in caught.value.why
    assert "owner/name/FILE" in caught.value.next_step


def test_the_settings_beside_peft_s_weights_come_too(hub, content, embedded_spec):
    del hub.files["styles/ink.safetensors"]
    hub.files["adapter_model.safetensors"] = content
    hub.files["adapter_config.json"] = json.dumps({"lora_alpha": 8, "r": 4}).encode()
    for source in ("owner/name", "owner/name/adapter_model.safetensors"):
        (named,) = read_adapters([LoraChoice(source)], embedded_spec)
        assert {term.multiplier for term in named.adapter.terms.values()} == {2.0}
    hub.asked.clear()
    assert locate(LoraChoice("owner/name")).name == "adapter_model.safetensors"
    assert hub.asked == []
    locate(LoraChoice("owner/name")).with_name("adapter_config.json").unlink()
    (named,) = read_adapters([LoraChoice("owner/name/adapter_model.safetensors")], embedded_spec)
    assert {term.multiplier for term in named.adapter.terms.values()} == {2.0}, "fetched again"


# what goes wrong ------------------------------------------------------------------------------------------------------


def refused(source, error, match):
    with pytest.raises(error, match=match) as caught:
        locate(LoraChoice(source))
    assert f"There is no file {source!r} on this machine either." in caught.value.why
    assert caught.value.next_step


def test_no_such_file(hub):
    refused("owner/name/inc.safetensors", FileMissingError, "no file 'inc.safetensors' in 'owner/name'")


def test_no_such_repository(hub):
    refused("somebody/else", FileMissingError, "no such repository on the hub")


def test_a_gated_repository(hub):
    hub.gated = True
    refused(FILE, FileMissingError, "is gated")


def test_wrong_bytes(hub, content, tmp_path):
    hub.served["styles/ink.safetensors"] = content[:-1] + b"?"
    refused(FILE, FileDamagedError, "arrived damaged")
    assert not list((tmp_path / "cache").rglob("ink.safetensors"))


def test_offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(FILE, FileMissingError, "in the local cache")
    refused("owner/name", FileMissingError, "in the local cache")
    assert hub.asked == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    locate(LoraChoice(FILE))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("owner/name", FileMissingError, "Which file of 'owner/name' is the adapter is not known")
