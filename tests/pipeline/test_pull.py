import errno
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, hf_hub_download, scan_cache_dir, snapshot_download
from safetensors.torch import save

from gossamer.checkpoints.safetensors_file import read_header
from gossamer.demo.embedded import model_folder
from gossamer.errors import FileDamagedError, FileMissingError, InvalidOptionError, OutputError, WrongModelError
from gossamer.pipeline import pull, transfer
from gossamer.pipeline.model import open_folder
from gossamer.pipeline.pull import Target, fetch, parse_target, plan_pull
from gossamer.pipeline.sources import HubCache, find_source
from gossamer.pipeline.transfer import Watcher
from hub_stub import COMMIT, Hub, point_client_at, serving

MODEL = "owner/name"
SHARDS = [f"transformer/diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
SHARD = SHARDS[0]
NOT_NEEDED = dict.fromkeys(
    (
        "README.md",
        "flux1-dev.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "transformer/diffusion_pytorch_model.fp16.safetensors.index.json",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/pytorch_model.bin",
        "text_encoder_2/model.safetensors.index.fp16.json",
        "vae/onnx/config.json",
        "tokenizer/training.log",
    ),
    b"not needed, and served only if somebody asks" * 9,
)


def weights(name: str, rows: int) -> bytes:
    """The tensors of a file of the embedded model, all but the first of them tiny: a pull checks names, not shapes."""
    generator = torch.Generator().manual_seed(rows)
    first, *others = read_header(model_folder() / name).tensors
    tensors = {first: torch.randn(rows, 512, generator=generator).to(torch.bfloat16)}
    return save(tensors | {other: torch.zeros(1, 2, dtype=torch.bfloat16) for other in others})


@pytest.fixture(scope="session")
def needed() -> dict[str, bytes]:
    """A FLUX folder with the settings of the embedded model and small weights."""
    folder = model_folder()
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {name: (folder / name).read_bytes() for name in names if not name.endswith(".safetensors")}
    weight_names = [name for name in names if name.endswith(".safetensors")]
    assert set(SHARDS) < set(weight_names)
    return files | {name: weights(name, 300 + 10 * number) for number, name in enumerate(weight_names)}


@pytest.fixture
def hub(needed, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "PAUSE", 0.001)
    with serving(Hub({**needed, **NOT_NEEDED})) as hub:
        point_client_at(hub, tmp_path / "cache", monkeypatch)
        yield hub


class Counter(Watcher):
    def __init__(self, stop_after: int | None = None) -> None:
        self.count = 0
        self.said: list[str] = []
        self._stop_after = stop_after

    def say(self, text: str) -> None:
        self.said.append(text)

    def advance(self, count: int) -> None:
        self.count += count
        if self._stop_after is not None and self.count > self._stop_after:
            raise KeyboardInterrupt


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def leftovers() -> list[Path]:
    return list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))


def spans(hub: Hub, name: str) -> list[str]:
    return [span for asked, span in hub.fetched() if asked == name]


# what is fetched


def test_exactly_what_a_flux_folder_needs_arrives(hub, needed):
    plan = plan_pull(MODEL)
    assert plan.size == sum(map(len, needed.values()))
    index = "transformer/diffusion_pytorch_model.safetensors.index.json"
    known = {"model_index.json", "transformer/config.json", index}
    assert {name for name, _ in hub.fetched()} == known, "planning reads no weights"
    assert plan.bytes_left() == plan.size - sum(len(needed[name]) for name in known)
    watcher, left = Counter(), plan.bytes_left()
    assert set(fetch(plan, watcher)) == set(needed) - known
    assert contents(plan.path) == needed
    assert watcher.count == left
    assert f"Fetching {SHARD}" in watcher.said
    assert plan.path == Path(constants.HF_HUB_CACHE) / "models--owner--name" / "snapshots" / COMMIT
    assert sorted(name for name, _ in hub.fetched()) == sorted(needed), "each file once"
    assert not leftovers()


def test_a_rerun_fetches_nothing_and_the_model_is_found(hub, monkeypatch):
    plan = plan_pull(MODEL)
    fetch(plan)
    hub.asked.clear()
    again = plan_pull(MODEL)
    assert again.bytes_left() == 0
    assert fetch(again) == ()
    assert hub.fetched() == []
    hub.asked.clear()
    assert find_source(MODEL).fetch() == plan.path, "a pulled model is used as it is"
    assert hub.asked == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_folder(find_source(MODEL).fetch()).homes["vae"] == plan.path / "vae"


def test_other_programs_find_the_files(hub):
    plan = plan_pull(MODEL, "v1")
    fetch(plan)
    assert snapshot_download(MODEL, revision="v1", local_files_only=True) == str(plan.path)
    hub.asked.clear()
    assert Path(hf_hub_download(MODEL, SHARD)).read_bytes() == hub.files[SHARD]
    assert hub.fetched() == []
    assert not scan_cache_dir(constants.HF_HUB_CACHE).warnings


def test_what_other_programs_fetched_is_not_fetched_again(hub):
    hf_hub_download(MODEL, SHARD)
    assert SHARD not in fetch(plan_pull(MODEL))


def test_a_single_file(hub):
    plan = plan_pull(f"{MODEL}/{SHARD}")
    assert fetch(plan) == (SHARD,)
    assert plan.path.read_bytes() == hub.files[SHARD]
    assert contents(plan.origin.folder) == {SHARD: hub.files[SHARD]}
    assert HubCache.of(MODEL).pulled() is None, "one file is no model"
    assert fetch(plan_pull(f"{MODEL}/{SHARD}", offline=True)) == ()
    assert [name for name, _ in hub.fetched()] == [SHARD]


def test_an_unfinished_update_leaves_the_old_model_in_use(hub):
    old = plan_pull(MODEL)
    fetch(old)
    hub.commit, hub.files[SHARD] = "f" * 40, weights(SHARD, 17)
    new = plan_pull(MODEL)
    with pytest.raises(KeyboardInterrupt):
        fetch(new, Counter(stop_after=1000))
    assert find_source(MODEL).fetch() == old.path
    assert fetch(plan_pull(MODEL)) == (SHARD,)
    assert find_source(MODEL).fetch() == new.path


# bad days


@pytest.mark.parametrize("resets", [False, True])
def test_a_cut_connection_is_taken_up_where_it_broke(hub, needed, resets):
    hub.cuts, hub.resets = {SHARD: [100_000, 70_000, 0]}, resets
    plan = plan_pull(MODEL)
    fetch(plan)
    assert contents(plan.path) == needed
    first, *others = spans(hub, SHARD)
    assert first == ""
    assert len(others) == 3
    assert all(span.startswith("bytes=") for span in others) or resets, "a reset may lose what was under way"


def test_a_rerun_resumes_a_broken_download(hub, needed):
    hub.cuts = {SHARD: [100_000, *[0] * transfer.ATTEMPTS]}
    plan = plan_pull(MODEL)
    with pytest.raises(FileMissingError, match="cannot be reached") as caught:
        fetch(plan)
    assert "goes on where it stopped" in caught.value.next_step
    (partial,) = leftovers()
    assert partial.read_bytes() == needed[SHARD][:100_000]
    assert HubCache.of(MODEL).pulled() is None
    hub.asked.clear()
    plan = plan_pull(MODEL)
    assert plan.origin.bytes_here(next(file for file in plan.files if file.name == SHARD)) == 100_000
    fetch(plan)
    assert spans(hub, SHARD) == ["bytes=100000-"]
    assert contents(plan.path) == needed
    assert not leftovers()


def test_an_interrupted_pull_resumes(hub, needed):
    plan = plan_pull(MODEL)
    before = plan.bytes_left()
    with pytest.raises(KeyboardInterrupt):
        fetch(plan, Counter(stop_after=before // 2))
    assert 0 < plan.bytes_left() < before
    hub.asked.clear()
    watcher = Counter()
    left = (plan := plan_pull(MODEL)).bytes_left()
    fetch(plan, watcher)
    assert contents(plan.path) == needed
    assert watcher.count == left < before


def test_a_server_without_ranges_starts_again(hub, needed):
    hub.cuts, hub.ranges = {SHARD: [100_000]}, False
    watcher, plan = Counter(), plan_pull(MODEL)
    left = plan.bytes_left()
    fetch(plan, watcher)
    assert contents(plan.path) == needed
    assert watcher.count == left


def test_a_silent_connection_is_given_up(hub, needed, monkeypatch):
    monkeypatch.setattr(transfer, "TIMEOUT", 0.5)
    hub.cuts, hub.stall = {SHARD: [100_000]}, threading.Event()
    fetch(plan := plan_pull(MODEL))
    assert contents(plan.path) == needed
    assert {"", "bytes=100000-"} == set(spans(hub, SHARD))


def test_two_pulls_at_once_fetch_each_file_once(hub, needed):
    plans = [plan_pull(MODEL), plan_pull(MODEL)]
    threads = [threading.Thread(target=fetch, args=(plan,)) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents(plans[0].path) == needed
    assert sorted(name for name, _ in hub.fetched()) == sorted(needed)


def test_a_busy_server_is_asked_again(hub, needed):
    hub.statuses = {SHARD: [503, 429, 500]}
    fetch(plan := plan_pull(MODEL))
    assert contents(plan.path) == needed


@pytest.mark.parametrize("name", [SHARD, "vae/config.json"], ids=["LFS", "git"])
def test_wrong_bytes_are_removed(hub, needed, name):
    hub.served = {name: bytes(reversed(needed[name]))}
    plan = plan_pull(MODEL)
    with pytest.raises(FileDamagedError, match="arrived damaged and was removed") as caught:
        fetch(plan)
    assert name in caught.value.what
    assert not (plan.path / name).exists()
    assert not leftovers()
    assert HubCache.of(MODEL).pulled() is None
    hub.served = {}
    fetch(plan_pull(MODEL))
    assert contents(plan.path) == needed


def test_a_rotten_beginning_is_not_kept(hub, needed):
    hub.cuts = {SHARD: [100_000, *[0] * transfer.ATTEMPTS]}
    with pytest.raises(FileMissingError):
        fetch(plan_pull(MODEL))
    (partial,) = leftovers()
    partial.write_bytes(bytes(100_000))
    with pytest.raises(FileDamagedError):
        fetch(plan_pull(MODEL))
    fetch(plan := plan_pull(MODEL))
    assert contents(plan.path) == needed


@pytest.mark.parametrize("change", [lambda data: data[:-7], lambda data: data + b"more"], ids=["shorter", "longer"])
@pytest.mark.parametrize("begun", [False, True])
def test_wrong_sizes_are_removed(hub, needed, change, begun):
    if begun:
        hub.cuts = {SHARD: [1000]}
    hub.served = {SHARD: change(needed[SHARD])}
    with pytest.raises(FileDamagedError, match="arrived damaged"):
        fetch(plan_pull(MODEL))
    assert not leftovers()


def test_a_longer_leftover_is_no_beginning(hub, needed):
    plan = plan_pull(MODEL)
    shard = next(file for file in plan.files if file.name == SHARD)
    plan.origin.partial(shard).write_bytes(bytes(shard.size + 1))
    fetch(plan)
    assert contents(plan.path) == needed


def test_a_damaged_cache_is_mended(hub, needed):
    fetch(plan := plan_pull(MODEL))
    blob = (plan.path / SHARD).resolve()
    blob.write_bytes(bytes(len(needed[SHARD])))
    (plan.path / "vae" / "config.json").resolve().unlink()
    with pytest.raises(FileMissingError, match=r"1 of the .* files .* not in the local cache"):
        plan_pull(MODEL, offline=True)
    assert set(fetch(plan_pull(MODEL))) == {SHARD, "vae/config.json"}
    assert contents(plan.path) == needed
    blob.write_bytes(bytes(len(needed[SHARD])))
    with pytest.raises(FileDamagedError, match="without --offline"):
        fetch(plan_pull(MODEL, offline=True))
    assert blob.exists(), "offline nothing is removed"


# no network


def test_offline_asks_nobody(hub, needed, monkeypatch):
    with pytest.raises(FileMissingError, match="Nothing of 'owner/name' at 'main'"):
        plan_pull(MODEL, offline=True)
    with pytest.raises(KeyboardInterrupt):
        fetch(plan_pull(MODEL), Counter(stop_after=1000))
    hub.asked.clear()
    with pytest.raises(FileMissingError, match="files of 'owner/name' are not in the local cache") as caught:
        plan_pull(MODEL, offline=True)
    assert "and others" in caught.value.why
    with pytest.raises(FileMissingError, match="1 of the 1 files"):
        plan_pull(f"{MODEL}/{SHARD}", offline=True)
    assert hub.asked == []
    fetch(plan_pull(MODEL))
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(plan := plan_pull(MODEL)) == ()
    assert contents(plan.path) == needed
    assert hub.asked == []


def test_a_cache_that_another_program_filled_serves_offline(hub):
    snapshot = Path(hf_hub_download(MODEL, "model_index.json")).parent
    with pytest.raises(FileMissingError, match="lacks"):
        fetch(plan_pull(MODEL, offline=True))
    for name in hub.files.keys() - NOT_NEEDED.keys():
        hf_hub_download(MODEL, name)
    plan = plan_pull(MODEL, offline=True)
    assert (fetch(plan), plan.path, plan.files) == ((), snapshot, ())


def test_an_unreachable_hub(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(FileMissingError, match="cannot be reached") as caught:
        plan_pull(MODEL)
    assert "network" in caught.value.next_step


# what cannot be had


def test_the_token_stays_with_the_hub(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    hub.cdn = hub.endpoint.replace("127.0.0.1", "localhost")
    fetch(plan_pull(f"{MODEL}/{SHARD}"))
    assert set(hub.told) == {("127.0.0.1", "Bearer hf_of_nobody"), ("localhost", "")}


def test_a_gated_model_says_where_and_how(hub):
    hub.gated = True
    with pytest.raises(FileMissingError, match="is gated") as caught:
        plan_pull(MODEL)
    assert "https://huggingface.co/owner/name" in caught.value.next_step
    assert "hf auth login" in caught.value.next_step
    with pytest.raises(FileMissingError, match="is gated"):
        fetch(plan_pull(f"{MODEL}/{SHARD}"))


@pytest.mark.parametrize(
    ("model", "revision", "kind", "words"),
    [
        ("owner/other", "main", FileMissingError, "no such repository"),
        (MODEL, "v9", FileMissingError, "no such revision"),
        (MODEL, "../../x", InvalidOptionError, "not a revision"),
        (f"{MODEL}/transformer/none.safetensors", "main", FileMissingError, "flux1-dev.safetensors"),
        (f"{MODEL}/text_encoder/pytorch_model.bin", "main", InvalidOptionError, "pickled"),
        (f"{MODEL}/../../x.safetensors", "main", InvalidOptionError, "no file that can be pulled"),
        (f"{MODEL}/C:\\x.safetensors", "main", InvalidOptionError, "no file that can be pulled"),
        ("embedded", "main", InvalidOptionError, "owner/name"),
        ("a--b/c", "main", InvalidOptionError, "owner/name"),
        ("../name", "main", InvalidOptionError, "owner/name"),
    ],
)
def test_unknown_names(hub, model, revision, kind, words):
    with pytest.raises(kind) as caught:
        plan_pull(model, revision)
    assert words in str(caught.value)
    assert caught.value.next_step
    assert not Path(constants.HF_HUB_CACHE).exists(), "an error leaves nothing behind"


def change_index(hub: Hub, **changes: object) -> None:
    name = "transformer/diffusion_pytorch_model.safetensors.index.json"
    hub.files[name] = json.dumps(json.loads(hub.files[name]) | changes).encode()


BROKEN = {
    "no index": (lambda hub: hub.files.pop("model_index.json"), WrongModelError, "flux1-dev.safetensors"),
    "other model": (
        lambda hub: hub.files.update({"model_index.json": b'{"_class_name": "StableDiffusionXLPipeline"}'}),
        WrongModelError,
        "StableDiffusionXLPipeline",
    ),
    "other width": (
        lambda hub: hub.files.update({"transformer/config.json": b'{"in_channels": "many"}'}),
        (FileDamagedError, WrongModelError),
        "",
    ),
    "no autoencoder": (lambda hub: [hub.files.pop(n) for n in list(hub.files) if n.startswith("vae/")], None, "vae/"),
    "pickles only": (lambda hub: hub.files.pop("text_encoder/model.safetensors"), None, "pickled"),
    "no shard": (lambda hub: hub.files.pop(SHARD), None, SHARD),
    "shard outside": (
        lambda hub: change_index(hub, weight_map={"a": "../../x.safetensors"}),
        FileDamagedError,
        "out of its folder",
    ),
    "shard elsewhere": (
        lambda hub: change_index(hub, weight_map={"a": "../vae/diffusion_pytorch_model.safetensors"}),
        FileDamagedError,
        "out of its folder",
    ),
    "no map": (lambda hub: change_index(hub, weight_map=[1]), FileDamagedError, "weight_map"),
    "huge settings": (lambda hub: hub.changes.update({"model_index.json": {"size": 10**12}}), None, "settings"),
    "no commit": (lambda hub: setattr(hub, "commit", "../../elsewhere"), FileDamagedError, "as the commit"),
    "no digest": (
        lambda hub: hub.changes.update({SHARD: {"lfs": {"sha256": "../x", "size": 3, "pointerSize": 3}}}),
        FileMissingError,
        SHARD,
    ),
    "half an answer": (lambda hub: hub.changes.update({SHARD: {"lfs": {"size": 3}}}), FileDamagedError, "lacks what"),
}


@pytest.mark.parametrize(("spoil", "kind", "words"), BROKEN.values(), ids=BROKEN)
def test_a_repository_that_is_no_sound_model(hub, spoil, kind, words):
    spoil(hub)
    with pytest.raises(kind or (FileMissingError, FileDamagedError)) as caught:
        plan_pull(MODEL)
    assert words in str(caught.value)
    assert not any(name.endswith(".safetensors") for name, _ in hub.fetched())


def test_names_that_lead_out_of_the_folder_are_not_known(hub, tmp_path):
    hub.files |= {"../../../x.safetensors": b"x", "/x.safetensors": b"x", "a\\..\\x.safetensors": b"x"}
    _, listing = pull._ask_hub(Target(MODEL), "main")
    assert not any("x.safetensors" in name for name in listing)
    assert parse_target("owner/name/a/b.gguf") == Target(MODEL, "a/b.gguf")


# the disk


def test_too_little_room_is_known_beforehand(hub, monkeypatch):
    plan = plan_pull(MODEL)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(pull.shutil, "disk_usage", lambda _path: usage._replace(free=plan.bytes_left() - 1))
    hub.asked.clear()
    with pytest.raises(OutputError, match="too little room"):
        fetch(plan)
    assert hub.asked == []
    monkeypatch.setattr(pull.shutil, "disk_usage", lambda _path: usage._replace(free=plan.bytes_left()))
    fetch(plan)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_fills_up(hub):
    plan = plan_pull(MODEL)
    shard = next(file for file in plan.files if file.name == SHARD)
    plan.origin.partial(shard).symlink_to("/dev/full")
    with pytest.raises(OutputError, match="the disk is full") as caught:
        fetch(plan)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC


def test_a_cache_that_cannot_be_made(hub, tmp_path):
    (tmp_path / "cache").write_text("a file stands here")
    with pytest.raises(OutputError, match="cannot be written"):
        fetch(plan_pull(MODEL))


def test_a_truncated_file_of_the_cache_counts_as_missing(hub, needed):
    fetch(plan := plan_pull(MODEL))
    (plan.path / SHARD).resolve().write_bytes(needed[SHARD][:-1])
    assert plan.bytes_left() == len(needed[SHARD])
    with pytest.raises(FileMissingError, match="not in the local cache"):
        plan_pull(MODEL, offline=True)
    assert fetch(plan_pull(MODEL)) == (SHARD,)
    assert contents(plan.path) == needed


def test_an_old_hub_library_is_refused(monkeypatch):
    monkeypatch.setattr("gossamer.pipeline.pull.version", lambda _: "0.36.0")
    with pytest.raises(InvalidOptionError, match=r"cannot work with huggingface_hub 0\.36\.0"):
        plan_pull("owner/name")
