"""Downloads a model, or one file, from the Hugging Face hub into the hub's cache: planned first, then fetched.

Of a repository only what Gossamer reads is wanted: settings, vocabularies, and the weights in one of their formats.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from gossamer.adapters.peft_settings import FOLDER_SETTINGS, FOLDER_WEIGHTS
from gossamer.errors import FileDamagedError, FileMissingError, InvalidOptionError, OutputError, WrongModelError
from gossamer.models.flux_spec import FluxSpec
from gossamer.pipeline.folder import COMPONENTS, MODELS, PIPELINES, SETTINGS_FILE, read_json
from gossamer.pipeline.model import open_folder
from gossamer.pipeline.sources import COMMIT, DIGEST, HUB_ID, MAIN, HubCache, HubFile
from gossamer.pipeline.transfer import TIMEOUT, Origin, Watcher, errors_in_words, is_sound, obtain, size_of
from gossamer.pipeline.versions import VERSION

WEIGHT_NAMES = ("diffusion_pytorch_model", "model")  # of diffusers and of transformers; variants as .fp16 are others
SMALL_ENDINGS = (".json", ".txt", ".model")
FILE_ENDINGS = (".safetensors", ".gguf")
MOST_JSON_BYTES = 50_000_000  # of a file that is read while planning; FLUX's largest index has 0.2 MB
REVISION = re.compile(r"[\w.+-]+(/[\w.+-]+)*")


@dataclass(frozen=True)
class Target:
    """A repository of the hub, or one file in it."""

    repository: str
    file: str | None = None

    def __str__(self) -> str:
        return self.repository if self.file is None else f"{self.repository}/{self.file}"


@dataclass(frozen=True)
class Plan:
    """The files of one commit that are wanted; offline, nothing is fetched, only checked."""

    target: Target
    revision: str
    origin: Origin
    files: tuple[HubFile, ...]
    offline: bool = False

    @property
    def path(self) -> Path:
        """The folder, or the one file, that will be there at the end."""
        return self.origin.folder / (self.target.file or "")

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def bytes_left(self) -> int:
        """Bytes that are not here; what has arrived of a broken download is."""
        return sum(file.size - self.origin.bytes_here(file) for file in self.files)


def plan_pull(model: str, revision: str = MAIN, offline: bool = False) -> Plan:
    """What `model`, an owner/name or owner/name/path/file, needs; only the few small files that say so are fetched."""
    from huggingface_hub import constants

    _require_hub(version("huggingface_hub"))
    target = parse_target(model)
    if not REVISION.fullmatch(revision) or ".." in revision:
        raise InvalidOptionError(
            f"{revision!r} is not a revision.", "A revision is a branch, a tag or a commit.", "Write it like main."
        )
    cache = HubCache.of(target.repository)
    with errors_in_words(str(target)):
        if offline or constants.HF_HUB_OFFLINE:
            return _plan_offline(target, revision, cache)
        commit, listing = _ask_hub(target, revision)
        origin = Origin(target.repository, commit, cache)
        if target.file is not None:
            return Plan(target, revision, origin, _named_files(target, listing))
        return Plan(target, revision, origin, _Chooser(target, origin, listing).choose())


def plan_adapter(repository: str) -> Plan:
    """The adapter of a repository that holds one: its only .safetensors file."""
    from huggingface_hub import constants

    _require_hub(version("huggingface_hub"))
    target, cache = Target(repository), HubCache.of(repository)
    with errors_in_words(repository):
        if constants.HF_HUB_OFFLINE:
            _plan_offline(target, MAIN, cache)  # raises where nothing is there
            raise FileMissingError(
                f"Which file of {repository!r} is the adapter is not known.",
                "Offline the hub's list of its files cannot be read, and the local cache may lack some of them.",
                f"Name the file, as in {repository}/FILE.",
            )
        commit, listing = _ask_hub(target, MAIN)
    names = [name for name in listing if name.endswith(".safetensors")]
    if len(names) != 1:
        raise FileMissingError(
            f"{repository!r} does not say which file is meant: it holds {len(names)} .safetensors files.",
            _weights_in(listing),
            f"Name one file, as in {repository}/FILE.",
        )
    target = Target(repository, names[0])
    return Plan(target, MAIN, Origin(repository, commit, cache), _named_files(target, listing))


def _require_hub(installed: str) -> None:
    """Before version 1 the hub's session was of another library, so a transfer could not be resumed through it."""
    if int(installed.split(".")[0]) < 1:
        raise InvalidOptionError(
            f"`gossamer pull` cannot work with huggingface_hub {installed}.",
            "It resumes downloads through the session that huggingface_hub has had since 1.0.",
            "Run pip install --upgrade huggingface_hub transformers, or give `gossamer run` the model's name: it "
            "downloads too.",
        )


def fetch(plan: Plan, watcher: Watcher | None = None) -> tuple[str, ...]:
    """Make every file of a plan be here, and verify each one; the names of those that were fetched."""
    watcher = watcher or Watcher()
    with errors_in_words(str(plan.target)):
        fetched = _check_all(plan, watcher) if plan.offline else _obtain_all(plan, watcher)
    if plan.target.file is None:
        open_folder(plan.path)
    return fetched


def parse_target(model: str) -> Target:
    """owner/name, or owner/name/path/file.safetensors."""
    parts = model.split("/", 2)
    repository = "/".join(parts[:2])
    if not HUB_ID.fullmatch(repository) or ".." in repository or "--" in repository:
        raise InvalidOptionError(
            f"{model!r} is nothing that the hub could have.",
            "Models have the form owner/name, single files owner/name/path/file.safetensors.",
            "Write it like black-forest-labs/FLUX.1-dev.",
        )
    if len(parts) == 2:
        return Target(repository)
    if not parts[2].endswith(FILE_ENDINGS) or not _is_inside(parts[2]):
        raise InvalidOptionError(
            f"{parts[2]!r} is no file that can be pulled.",
            f"Single files end in {' or '.join(FILE_ENDINGS)}; pickled ones run code when they are opened.",
            "Name the file as the hub shows it, or leave it out to pull the whole model.",
        )
    return Target(repository, parts[2])


# planning


def _plan_offline(target: Target, revision: str, cache: HubCache) -> Plan:
    commit = cache.commit(revision)
    if commit is None or not cache.snapshot(commit).is_dir():
        raise FileMissingError(
            f"Nothing of {str(target)!r} at {revision!r} is in the local cache.",
            f"{str(cache.path)!r} does not have it, and offline nothing is fetched.",
            f"Run `gossamer pull {target}` once with a network, without --offline and HF_HUB_OFFLINE.",
        )
    files = cache.files(commit) or () if target.file is None else _cached_file(target.file, cache, commit)
    missing = [file.name for file in files if cache.find(commit, file) is None]
    if missing:
        raise FileMissingError(
            f"{len(missing)} of the {len(files)} files of {str(target)!r} are not in the local cache.",
            f"Missing are {', '.join(missing[:6])}{' and others' * (len(missing) > 6)}; offline nothing is fetched.",
            f"Run `gossamer pull {target}` with a network: it goes on where it stopped.",
        )
    return Plan(target, revision, Origin(target.repository, commit, cache), files, offline=True)


def _cached_file(name: str, cache: HubCache, commit: str) -> tuple[HubFile, ...]:
    """A single file as the cache has it: the blob that it is a link to is named by its digest."""
    path = cache.snapshot(commit) / name
    digest = path.resolve().name
    return (HubFile(name, size_of(path) or -1, digest if DIGEST.fullmatch(digest) else ""),)


def _ask_hub(target: Target, revision: str) -> tuple[str, dict[str, HubFile]]:
    """The commit, and every file that the repository holds at it; what cannot be verified is left out."""
    from huggingface_hub import HfApi

    api = HfApi(library_name="gossamer", library_version=VERSION)
    try:
        info = api.model_info(target.repository, revision=revision, files_metadata=True, timeout=TIMEOUT)
    except (KeyError, TypeError, AttributeError) as error:  # the client takes an answer apart without looking
        raise _strange(target, f"its answer lacks what belongs there ({error})") from error
    if not COMMIT.fullmatch(info.sha or ""):
        raise _strange(target, f"it names {info.sha!r} as the commit")
    listing = {}
    for entry in info.siblings or ():
        size = entry.lfs.size if entry.lfs is not None else entry.size
        digest = entry.lfs.sha256 if entry.lfs is not None else entry.blob_id
        if _is_inside(entry.rfilename) and type(size) is int and size >= 0 and DIGEST.fullmatch(digest or ""):
            listing[entry.rfilename] = HubFile(entry.rfilename, size, str(digest))
    return str(info.sha), listing


def _named_files(target: Target, listing: Mapping[str, HubFile]) -> tuple[HubFile, ...]:
    """A single file, and for the weights of one of PEFT's folders the settings beside them, which hold its strength."""
    file = listing.get(str(target.file))
    if file is None:
        what = f"There is no file {target.file!r} in {target.repository!r}."
        raise FileMissingError(what, _weights_in(listing), "Name one that is there.")
    path = PurePosixPath(file.name)
    beside = listing.get(path.with_name(FOLDER_SETTINGS).as_posix()) if path.name == FOLDER_WEIGHTS else None
    return (file,) if beside is None else (file, beside)


def _weights_in(listing: Mapping[str, HubFile]) -> str:
    names = sorted(name for name in listing if name.endswith(FILE_ENDINGS))
    return f"Its weight files are: {', '.join(names[:12]) or 'none'}{' and others' * (len(names) > 12)}."


class _Chooser:
    """Picks the files of a diffusers folder that Gossamer reads, and of weights in several formats one."""

    def __init__(self, target: Target, origin: Origin, listing: Mapping[str, HubFile]) -> None:
        self._target = target
        self._origin = origin
        self._listing = listing

    def choose(self) -> tuple[HubFile, ...]:
        self._require_flux()
        names = ["model_index.json", *([SETTINGS_FILE] if SETTINGS_FILE in self._listing else [])]
        for component in COMPONENTS:
            names += self._small_files(component)
            names += self._weights(component) if component in MODELS else []
        return tuple(self._listing[name] for name in dict.fromkeys(names))

    def _require_flux(self) -> None:
        model = self._target.repository
        if "model_index.json" not in self._listing:
            raise WrongModelError(
                f"{model!r} is not a diffusers folder.",
                f"It holds no model_index.json. {_weights_in(self._listing)}",
                f"Name one file, as in `gossamer pull {model}/FILE`, or choose a model in the layout of diffusers.",
            )
        name = self._read("model_index.json").get("_class_name")
        if name not in PIPELINES:
            raise WrongModelError(
                f"{model!r} holds a {name}, not a FLUX.1 text-to-image model.",
                f"Gossamer runs {' and '.join(PIPELINES)}.",
                "Choose a FLUX.1 model, for example black-forest-labs/FLUX.1-dev.",
            )
        if "transformer/config.json" not in self._listing:
            raise self._lacks("transformer/config.json", "It says what the model is.")
        FluxSpec.from_config(self._read("transformer/config.json"))

    def _small_files(self, component: str) -> list[str]:
        """Settings and vocabularies; of the indices of weights only the one that is used comes with them."""
        inside = [name for name in self._listing if PurePosixPath(name).parent.as_posix() == component]
        small = [name for name in inside if name.endswith(SMALL_ENDINGS) and ".index." not in name]
        if not small:
            raise self._lacks(f"{component}/*.json", "A FLUX.1 pipeline needs this folder.")
        return sorted(small)

    def _weights(self, component: str) -> list[str]:
        for stem in WEIGHT_NAMES:
            index = f"{component}/{stem}.safetensors.index.json"
            if index in self._listing:
                return [index, *self._shards(component, index)]
        single = [f"{component}/{stem}.safetensors" for stem in WEIGHT_NAMES]
        found = [name for name in single if name in self._listing]
        if not found:
            raise self._lacks(single[0], f"Gossamer opens no pickled weights. {_weights_in(self._listing)}")
        return found[:1]

    def _shards(self, component: str, index: str) -> list[str]:
        shards = self._read(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise _strange(self._target, f"{index!r} has no weight_map from tensor to file")
        names = [f"{component}/{shard}" for shard in sorted(set(shards.values()))]
        for name, shard in zip(names, sorted(set(shards.values())), strict=True):
            if "/" in shard or not _is_inside(shard) or not shard.endswith(".safetensors"):
                raise _strange(self._target, f"{index!r} leads to {shard!r}, out of its folder or to no weights")
            if name not in self._listing:
                raise self._lacks(name, f"{index!r} names it.")
        return names

    def _read(self, name: str) -> dict[str, Any]:
        file = self._listing[name]
        if file.size > MOST_JSON_BYTES:
            raise _strange(self._target, f"{name!r} has {file.size} bytes, more than a settings file may have")
        _require_space(self._origin, (file,))
        obtain(self._origin, file, Watcher())
        return read_json(self._origin.folder / name)

    def _lacks(self, name: str, why: str) -> FileMissingError:
        return FileMissingError(
            f"{self._target.repository!r} lacks {name!r}.", why, "Choose a complete FLUX.1 model of diffusers."
        )


def _is_inside(name: str) -> bool:
    """Whether a file's name stays in its folder, on any system."""
    parts = name.split("/")
    return not any(part in ("", ".", "..") for part in parts) and not re.search(r'[\\:*?"<>|\x00-\x1f]', name)


# fetching


def _require_space(origin: Origin, files: Sequence[HubFile]) -> None:
    """The disk has room for what is not here yet."""
    wanted = sum(file.size - origin.bytes_here(file) for file in files)
    folder = next(parent for parent in (origin.cache.path, *origin.cache.path.parents) if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise OutputError(
            f"There is too little room on the disk for {origin.repository!r}.",
            f"{wanted / 1e9:.2f} GB are still to be fetched; {str(folder)!r} has {free / 1e9:.2f} GB free.",
            "Make room, or set HF_HOME to a folder on a larger disk.",
        )


def _obtain_all(plan: Plan, watcher: Watcher) -> tuple[str, ...]:
    origin, cache = plan.origin, plan.origin.cache
    _require_space(origin, plan.files)
    if plan.target.file is None:  # before the first byte, so that what is missing can be named after a break
        cache.set_files(origin.commit, plan.files)
    if cache.commit(plan.revision) is None:  # a complete older commit stays in use until the new one is
        cache.set_commit(plan.revision, origin.commit)
    fetched = tuple(file.name for file in plan.files if obtain(origin, file, watcher))
    cache.set_commit(plan.revision, origin.commit)
    return fetched


def _check_all(plan: Plan, watcher: Watcher) -> tuple[str, ...]:
    """Offline: every file has the right bytes; none is fetched, and nothing is written."""
    for file in plan.files:
        watcher.say(f"Checking {file.name}")
        here = plan.origin.cache.find(plan.origin.commit, file)
        if here is None or not is_sound(here, file):
            raise FileDamagedError(
                f"{file.name!r} of {plan.target.repository!r} is damaged.",
                "Its bytes in the local cache are not those that the hub stated: changed, or the disk fails.",
                "Give the same command without --offline: the file is fetched again.",
            )
    return ()


def _strange(target: Target, what: str) -> FileDamagedError:
    return FileDamagedError(
        f"{target.repository!r} cannot be pulled.",
        f"What the hub hands out is not usable: {what}.",
        "Try again later, or choose another model.",
    )
