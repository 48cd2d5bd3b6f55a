"""Where a model comes from: the embedded one, a diffusers folder, or a repository on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from gossamer.demo.embedded import model_folder
from gossamer.errors import FileMissingError, GossamerError, WrongModelError
from gossamer.pipeline.folder import COMPONENTS, SETTINGS_FILE
from gossamer.pipeline.options import EMBEDDED

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Embedded:
    """The model that comes with the package."""

    def fetch(self) -> Path:
        """Its folder."""
        return model_folder()


@dataclass(frozen=True)
class LocalFolder:
    """A diffusers folder on this machine."""

    path: Path

    def fetch(self) -> Path:
        """Its folder."""
        return self.path


@dataclass(frozen=True)
class HubRepository:
    """A repository of the Hugging Face hub, by its owner/name."""

    name: str

    def fetch(self) -> Path:
        """The folder of its newest version, downloaded where the local cache lacks it; never a pickled file."""
        from huggingface_hub import snapshot_download

        patterns = [f"{component}/*{ending}" for component in COMPONENTS for ending in (".json", ".txt", ".model")]
        patterns += [f"{component}/*.safetensors" for component in COMPONENTS]
        try:
            return Path(snapshot_download(self.name, allow_patterns=["model_index.json", SETTINGS_FILE, *patterns]))
        except (OSError, ValueError) as error:
            raise _hub_error(self.name, error) from error


Source = Embedded | LocalFolder | HubRepository


def find_source(model: str) -> Source:
    """What `--model` means: 'embedded', else an existing folder, else something that reads as a hub id."""
    path = Path(model).expanduser()
    if model == EMBEDDED:
        return Embedded()
    if os.path.isdir(path):
        return LocalFolder(path)
    if os.path.isfile(path):
        raise WrongModelError(
            f"{model!r} is a file; a model is a folder.",
            "Single-file checkpoints hold the transformer only, or name their tensors in another way.",
            "Give a diffusers folder (the one that holds model_index.json) or a hub id.",
        )
    if HUB_ID.fullmatch(model):
        return HubRepository(model)
    raise FileMissingError(
        f"There is no model {model!r}.",
        "It is neither 'embedded', nor a folder that exists, nor a hub id of the form owner/name.",
        "Check the path, or leave --model out to use the embedded model.",
    )


def _hub_error(name: str, error: OSError | ValueError) -> GossamerError:
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
