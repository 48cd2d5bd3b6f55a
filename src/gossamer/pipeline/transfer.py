"""Brings the bytes of a file from the hub to its place in the cache: resumed where a connection broke, and verified.

The transfer is our own: since its version 1 the hub's client deletes what has arrived when a download breaks, so 24 GB
would start again at byte 0. Here the bytes are appended to blobs/DIGEST.incomplete, which gets its real name only when
its digest is the one that the hub states.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gossamer.errors import FileDamagedError, FileMissingError, OutputError
from gossamer.pipeline.sources import HubCache, HubFile, hub_error
from gossamer.pipeline.versions import VERSION

if TYPE_CHECKING:
    import httpx

ATTEMPTS = 5  # in a row that bring not one new byte
PAUSE = 1.0  # seconds before the second attempt, doubled before each further one
TIMEOUT = 20.0  # seconds without an answer or a byte


@dataclass(frozen=True)
class Origin:
    """One commit of a repository, and the cache folder that its files go to."""

    repository: str
    commit: str
    cache: HubCache

    @property
    def folder(self) -> Path:
        """The folder in which the files have their names."""
        return self.cache.snapshot(self.commit)

    def partial(self, file: HubFile) -> Path:
        """Where a file grows until it is whole."""
        blob = self.cache.blob(file)
        return blob.with_name(f"{blob.name}.incomplete")

    def bytes_here(self, file: HubFile) -> int:
        """Bytes of a file that are here, whole or not."""
        whole = self.cache.find(self.commit, file) is not None
        return file.size if whole else min(size_of(self.partial(file)), file.size)


class Watcher:
    """Is told what happens; this one does nothing with it."""

    def say(self, text: str) -> None:
        """What is being done now."""

    def advance(self, count: int) -> None:
        """So many more bytes are here; negative where some had to be given up."""


def obtain(origin: Origin, file: HubFile, watcher: Watcher) -> bool:
    """Make one file be here with the right bytes; whether it had to be fetched."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # exported lazily

    cache = origin.cache
    lock = cache.path.parent / ".locks" / cache.path.name / f"{file.digest}.lock"  # where the hub's client has it too
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        here = cache.find(origin.commit, file)
        if here is not None:
            watcher.say(f"Checking {file.name}")
            if is_sound(here, file):
                cache.link(origin.commit, file)
                return False
            watcher.advance(-file.size)
        for path in (origin.folder / file.name, cache.blob(file)):
            path.unlink(missing_ok=True)
        partial = origin.partial(file)
        partial.parent.mkdir(parents=True, exist_ok=True)
        watcher.say(f"Fetching {file.name}")
        _download(origin, file, partial, watcher)
        watcher.say(f"Checking {file.name}")
        if not is_sound(partial, file):
            partial.unlink()
            raise _wrong_bytes(origin, file, "What arrived has another digest than the one that the hub states.")
        os.replace(partial, cache.blob(file))
        cache.link(origin.commit, file)
        return True


def _download(origin: Origin, file: HubFile, partial: Path, watcher: Watcher) -> None:
    """Append to the partial file until it is whole, through any number of breaks that bring something new."""
    import httpx

    if size_of(partial) > file.size or not file.size:
        partial.write_bytes(b"")
    most, fruitless = size_of(partial), 0
    while size_of(partial) < file.size:
        try:
            _receive(origin, file, partial, watcher)
            reason = "the connection ended before the file did"
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
        except httpx.HTTPError as error:
            if not _is_passing(error):
                raise
            reason = str(error).strip().split("\n")[0]
        if size_of(partial) > most:
            most, fruitless = size_of(partial), 0
        elif size_of(partial) < file.size:
            fruitless += 1
            if fruitless == ATTEMPTS:
                raise _unreachable(origin.repository, f"{reason} ({ATTEMPTS} attempts at {file.name})")
            time.sleep(PAUSE * 2 ** (fruitless - 1))


def _is_passing(error: httpx.HTTPError) -> bool:
    """Whether a server is only busy."""
    response = getattr(error, "response", None)
    return response is not None and (response.status_code in (408, 429) or response.status_code >= 500)


def _receive(origin: Origin, file: HubFile, partial: Path, watcher: Watcher) -> None:
    """One request for the rest of a file."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    start = size_of(partial)
    headers = build_hf_headers(library_name="gossamer", library_version=VERSION)
    headers |= {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    url = hf_hub_url(origin.repository, file.name, revision=origin.commit)
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
        if response.status_code != 416:  # no such range: the file there is shorter than stated
            hf_raise_for_status(response)
        if start and response.status_code == 200:  # the server has no ranges
            partial.write_bytes(b"")
            watcher.advance(-start)
            start = 0
        if not _fits(response, start, file):
            partial.unlink(missing_ok=True)
            raise _wrong_bytes(origin, file, "The server offers another size than the one that the hub states.")
        with partial.open("ab") as content:
            for chunk in response.iter_bytes():
                start += len(chunk)
                if start > file.size:
                    break
                content.write(chunk)
                watcher.advance(len(chunk))
    if start > file.size:
        partial.unlink()
        raise _wrong_bytes(origin, file, f"More arrives than the {file.size} bytes that the hub states.")


def _fits(response: httpx.Response, start: int, file: HubFile) -> bool:
    """Whether an answer is the rest of the file, as far as its headers tell."""
    if response.status_code == 206:
        return response.headers.get("Content-Range", "").replace(" ", "") in (
            f"bytes{start}-{file.size - 1}/{file.size}",
            f"bytes{start}-{file.size - 1}/*",
        )
    length = response.headers.get("Content-Length", "")
    packed = "Content-Encoding" in response.headers  # then the length is not that of the file
    return response.status_code == 200 and (packed or not length.isdecimal() or int(length) == file.size)


# files


def size_of(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def is_sound(path: Path, file: HubFile) -> bool:
    """Whether a file has its size and digest; git's digest of a file covers its length too."""
    if path.stat().st_size != file.size:
        return False
    digest = hashlib.sha1(b"blob %d\0" % file.size) if len(file.digest) == 40 else hashlib.sha256()
    with path.open("rb") as content:
        while chunk := content.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest() == file.digest or not file.digest


# errors


@contextmanager
def errors_in_words(model: str) -> Iterator[None]:
    """Whatever the network, the hub or the disk raises becomes an error of three parts."""
    import httpx
    from huggingface_hub import errors

    repository = "/".join(model.split("/")[:2])
    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise FileMissingError(
            f"{repository!r} has no such revision.",
            "The hub knows the model, but no branch, tag or commit of that name.",
            f"See https://huggingface.co/{repository}/tree/main, or leave --revision out.",
        ) from error
    except (httpx.TransportError, errors.OfflineModeIsEnabled) as error:
        raise _unreachable(model, str(error).split("\n")[0] or type(error).__name__) from error
    except (errors.HfHubHTTPError, httpx.HTTPError, ValueError) as error:
        raise hub_error(repository, error) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise OutputError(
            f"{model!r} cannot be written" + (": the disk is full." if full else "."),
            f"The system says: {error.strerror or error}. What has arrived is kept.",
            "Make room, then give the same command: it goes on where it stopped."
            if full
            else "Check the permissions of the cache folder, or set HF_HOME to another one.",
        ) from error


def _unreachable(model: str, reason: str) -> FileMissingError:
    """The network failed, not the hub."""
    return FileMissingError(
        f"{model!r} could not be fetched: the hub cannot be reached.",
        f"The download failed: {reason}. What has arrived is kept.",
        "Connect to the network and give the same command: it goes on where it stopped.",
    )


def _wrong_bytes(origin: Origin, file: HubFile, why: str) -> FileDamagedError:
    return FileDamagedError(
        f"{file.name!r} of {origin.repository!r} arrived damaged and was removed.",
        why,
        "Give the same command again: every other file is kept. If it stays so, the file is wrong on the server.",
    )
