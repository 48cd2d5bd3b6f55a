"""Where a model comes from: the embedded one, a file or folder, or a repository on the Hugging Face hub.

What was downloaded lies in the cache that all programs of the hub share, one folder a repository:

blobs/DIGEST              the bytes; named by SHA-256, small files by git's SHA-1 of them
snapshots/COMMIT/PATH     links to the blobs, under the names that the files have in the repository
refs/REVISION             the commit that a branch or tag was at
gossamer/COMMIT.json      ours: what `gossamer pull` fetched, or was about to: {"files": [{"name", "size", "digest"}]}
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

from gossamer.demo.embedded import model_folder
from gossamer.errors import FileMissingError, GossamerError
from gossamer.pipeline.folder import COMPONENTS, MODELS, SETTINGS_FILE
from gossamer.pipeline.options import EMBEDDED

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")
DIGEST = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")  # SHA-256, or git's SHA-1
MAIN = "main"  # the branch that is meant where none is named


@dataclass(frozen=True)
class Embedded:
    """The model that comes with the package."""

    def fetch(self, weights: Collection[str] = MODELS) -> Path:
        """Its folder."""
        return model_folder()


@dataclass(frozen=True)
class LocalPath:
    """A diffusers folder or a checkpoint file on this machine."""

    path: Path

    def fetch(self, weights: Collection[str] = MODELS) -> Path:
        """The path."""
        return self.path


@dataclass(frozen=True)
class HubRepository:
    """A repository of the Hugging Face hub, by its owner/name."""

    name: str

    def fetch(self, weights: Collection[str] = MODELS) -> Path:
        """The folder that `gossamer pull` made, without asking the hub; else that of its newest version, downloaded
        where the local cache lacks it. `weights` are the parts whose weights are wanted. Never a pickled file."""
        from httpx import HTTPError
        from huggingface_hub import snapshot_download

        pulled = HubCache.of(self.name).pulled()
        if pulled is not None:
            return pulled
        patterns = [f"{component}/*{ending}" for component in COMPONENTS for ending in (".json", ".txt", ".model")]
        patterns += [f"{component}/*.safetensors" for component in weights]
        try:
            return Path(snapshot_download(self.name, allow_patterns=["model_index.json", SETTINGS_FILE, *patterns]))
        except (OSError, ValueError, HTTPError) as error:
            raise hub_error(self.name, error) from error


Source = Embedded | LocalPath | HubRepository


def find_source(model: str) -> Source:
    """What `--model` and `--base` mean: 'embedded', else what exists at a path, else what reads as a hub id."""
    path = Path(model).expanduser()
    if model == EMBEDDED:
        return Embedded()
    if os.path.exists(path):
        return LocalPath(path)
    if HUB_ID.fullmatch(model):
        return HubRepository(model)
    raise FileMissingError(
        f"There is no model {model!r}.",
        "It is neither 'embedded', nor a file or folder that exists, nor a hub id of the form owner/name.",
        "Check the path, or leave --model out to use the embedded model.",
    )


# the cache


@dataclass(frozen=True)
class HubFile:
    """A file of a repository; `digest` is its SHA-256, or git's SHA-1 where the hub has no other."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class HubCache:
    """The cache folder of one repository."""

    path: Path

    @classmethod
    def of(cls, repository: str) -> HubCache:
        """That of owner/name."""
        from huggingface_hub import constants

        return cls(Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}")

    def commit(self, revision: str) -> str | None:
        """The commit of a branch or tag when it was last fetched; a commit is its own."""
        if COMMIT.fullmatch(revision):
            return revision
        try:
            commit = (self.path / "refs" / revision).read_text("utf-8").strip()
        except (OSError, ValueError):
            return None
        return commit if COMMIT.fullmatch(commit) else None

    def set_commit(self, revision: str, commit: str) -> None:
        """Remember the commit of a branch or tag."""
        if revision != commit:
            _write_whole(self.path / "refs" / revision, commit)

    def snapshot(self, commit: str) -> Path:
        """The folder in which the files have their names."""
        return self.path / "snapshots" / commit

    def blob(self, file: HubFile) -> Path:
        """Where the bytes of a file are."""
        return self.path / "blobs" / file.digest

    def find(self, commit: str, file: HubFile) -> Path | None:
        """The file, if it is there with its size."""
        for path in (self.snapshot(commit) / file.name, self.blob(file)):
            if path.is_file() and path.stat().st_size == file.size:
                return path
        return None

    def link(self, commit: str, file: HubFile) -> None:
        """Give the bytes of a file their name."""
        path, blob = self.snapshot(commit) / file.name, self.blob(file)
        if not blob.is_file() or path.resolve() == blob.resolve():
            return  # where a system has no links, the bytes lie under the name itself, and there is no blob
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        try:
            path.symlink_to(os.path.relpath(blob, path.parent))
        except OSError:
            os.replace(blob, path)

    def files(self, commit: str) -> tuple[HubFile, ...] | None:
        """What `gossamer pull` fetched of a commit, or was about to."""
        try:
            entries = json.loads(self._record(commit).read_text("utf-8"))["files"]
            return tuple(HubFile(**entry) for entry in entries)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def set_files(self, commit: str, files: Sequence[HubFile]) -> None:
        """Remember what is going to be fetched of a commit."""
        _write_whole(self._record(commit), json.dumps({"files": [asdict(file) for file in files]}, indent=1))

    def pulled(self) -> Path | None:
        """The folder of the commit that was pulled last, if every file is there."""
        commit = self.commit(MAIN)
        files = self.files(commit) if commit is not None else None
        if commit is None or files is None:
            return None
        snapshot = self.snapshot(commit)
        return snapshot if all((snapshot / file.name).is_file() for file in files) else None

    def _record(self, commit: str) -> Path:
        return self.path / "gossamer" / f"{commit}.json"


def _write_whole(path: Path, text: str) -> None:
    """Write a small file so that no reader ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid4().hex}.new")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)


# errors


def hub_error(name: str, error: Exception) -> GossamerError:
    """What the hub or its client said, in three parts."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return FileMissingError(
            f"The model {name!r} is gated.",
            "Its owners let in only accounts that have accepted their terms.",
            f"Accept the terms at https://huggingface.co/{name}, run `hf auth login`, then try again.",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return FileMissingError(
            f"There is no model {name!r}: no such folder here, no such repository on the hub.",
            "The hub does not know that name, or it is private and this machine is not logged in.",
            "Check the spelling; for a private repository run `hf auth login` first.",
        )
    if isinstance(error, errors.LocalEntryNotFoundError | ConnectionError) or _is_connection_failure(error):
        return FileMissingError(
            f"The model {name!r} is not on this machine, and the hub cannot be reached.",
            f"No folder has that name, the local cache lacks it, and the download failed: {_first_line(error)}",
            "Connect to the network, or give the path of a downloaded folder, or leave --model out.",
        )
    return FileMissingError(
        f"The model {name!r} could not be fetched from the hub.",
        f"The hub client says: {_first_line(error)}",
        "Try again later, or give the path of a downloaded folder.",
    )


def _is_connection_failure(error: BaseException) -> bool:
    """Whether the transport failed before the hub answered; the client's HTTP library differs between versions."""
    return any(
        kind.__module__.split(".")[0] in ("httpx", "httpcore", "requests", "urllib3") for kind in type(error).mro()
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
