"""Where the pictures of a run go, which of them are there already, and whether the rest can be written."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR

from gossamer.errors import FileDamagedError, FileMissingError, InvalidOptionError, OutputError
from gossamer.pipeline.options import RunOptions
from gossamer.pipeline.picture import read_picture
from gossamer.pipeline.recipe import Recipe

DEFAULT_FOLDER = "outputs"
SLUG_LENGTH = 40  # characters; four bytes each still make a file name
OTHER_PICTURES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


@dataclass(frozen=True)
class Job:
    """One picture to make."""

    prompt: str
    seed: int
    path: Path


@dataclass(frozen=True)
class Division:
    """Jobs still to do, and jobs whose picture is there with the very same settings."""

    todo: tuple[Job, ...]
    done: tuple[Job, ...]


def plan_jobs(options: RunOptions) -> tuple[Job, ...]:
    """Every prompt with every seed, and the file of each; places that cannot be written to raise."""
    prompts = [options.prompt] if options.prompt is not None else read_prompts(Path(options.prompts or ""))
    single = _single_file(options.output, len(prompts) * len(options.seeds))
    if single is not None:
        jobs = [Job(prompts[0], options.seeds[0], single)]
    else:
        folder = Path(options.output or DEFAULT_FOLDER)
        names = _names(prompts)
        jobs = [
            Job(prompt, seed, folder / f"{name}-{seed}.png")
            for prompt, name in zip(prompts, names, strict=True)
            for seed in options.seeds
        ]
    for job in jobs:
        _require_free(job.path)
    _require_writable(jobs[0].path.parent)  # all pictures of a run share a folder
    return tuple(jobs)


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file, one a line, each once; blank lines and lines that begin with # are skipped."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except OSError as error:
        raise FileMissingError(
            f"The prompts file {str(path)!r} cannot be read.",
            f"The system says: {error.strerror or error}.",
            "Give the path of a text file with one prompt a line.",
        ) from error
    except UnicodeDecodeError as error:
        raise FileDamagedError(
            f"The prompts file {str(path)!r} is not text.",
            f"It is not UTF-8: {error.reason}.",
            "Save it as UTF-8 text.",
        ) from error
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts or any("\0" in prompt for prompt in prompts):
        raise InvalidOptionError(
            f"The prompts file {str(path)!r} holds no prompts.",
            "Every line is blank or a comment, or the file is not text.",
            "Write one prompt a line.",
        )
    return list(dict.fromkeys(prompts))


def divide(jobs: Sequence[Job], recipe_of: Callable[[Job], Recipe], overwrite: bool) -> Division:
    """Which pictures are there already; one that other settings painted raises, unless it may be overwritten."""
    existing = [job for job in jobs if os.path.exists(job.path)]
    done = {job for job in existing if _is_done(job, recipe_of)}
    different = [job for job in existing if job not in done]
    if different and not overwrite:
        raise OutputError(
            f"{str(different[0].path)!r} exists and is not what this run would paint there"
            + (f", nor are {len(different) - 1} others." if len(different) > 1 else "."),
            "It was painted with other settings, or is no whole picture of Gossamer.",
            "Choose another --output, or replace it with --overwrite.",
        )
    return Division(tuple(job for job in jobs if job not in done), tuple(job for job in existing if job in done))


def _is_done(job: Job, recipe_of: Callable[[Job], Recipe]) -> bool:
    try:
        found = read_picture(job.path).recipe
    except FileDamagedError:
        return False  # not a picture of ours: never the one that this job would paint
    return found.same_pixels(recipe_of(job))


# names


def slug(prompt: str) -> str:
    """A short file name from a prompt: lower case words with hyphens."""
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", prompt).lower())
    return "-".join(words)[:SLUG_LENGTH].strip("-_") or "picture"


def _names(prompts: Sequence[str]) -> list[str]:
    """A slug for each prompt; prompts that share one get a checksum of their text, so that order never matters."""
    slugs = [slug(prompt) for prompt in prompts]
    shared = {name for name, count in Counter(slugs).items() if count > 1}
    return [
        f"{name}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}" if name in shared else name
        for prompt, name in zip(prompts, slugs, strict=True)
    ]


# places


def _single_file(output: str | None, count: int) -> Path | None:
    """The one file that --output names, or None when it names a folder."""
    if output is None or os.path.isdir(output):
        return None
    ending = Path(output).suffix.lower()
    if ending in OTHER_PICTURES:
        raise InvalidOptionError(
            f"{output!r} would be a {ending} file.",
            "Pictures are written as PNG, which keeps the pixels exactly and carries their settings.",
            "Let --output end in .png, or name a folder.",
        )
    if ending != ".png":
        return None
    if count > 1:
        raise InvalidOptionError(
            f"{output!r} is one file, but {count} pictures are to be painted.",
            "There are several seeds or prompts.",
            "Name a folder with --output.",
        )
    return Path(output)


def require_place(path: Path) -> None:
    """One picture can be written to `path`."""
    _require_free(path)
    _require_writable(path.parent)


def _require_free(path: Path) -> None:
    """No folder has that name, and the system accepts the name at all."""
    try:
        is_folder = S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise _cannot_write(path, f"The system says: {error.strerror or error}.") from error
    if is_folder:
        raise _cannot_write(path, "It is a folder.")


def _require_writable(folder: Path) -> None:
    """A file can be made in `folder`, or in the nearest folder above it that exists; nothing is left behind."""
    try:
        place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise _cannot_write(folder, f"The system says: {error.strerror or error}.") from error


def _cannot_write(path: Path, why: str) -> OutputError:
    return OutputError(f"{str(path)!r} cannot be written.", why, "Choose another place with --output.")
