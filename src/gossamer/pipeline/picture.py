"""PNG files that carry their settings: written whole or not at all, and read back with care.

parameters   tEXt or iTXt, the text that A1111 and its successors read: prompt, then one line of `name: value, ...`
gossamer     tEXt, JSON: {"recipe", "versions", "device", "threads", "pixels_sha256"}
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gossamer.errors import FileDamagedError, FileMissingError, OutputError
from gossamer.pipeline.recipe import Recipe, from_json, to_json
from gossamer.pipeline.versions import VERSION, versions

PARAMETERS = "parameters"
RECORD = "gossamer"
RECORD_FIELDS = {"recipe", "versions", "device", "threads", "pixels_sha256"}
MOST_THREADS = 1024
SHORT_HASH = 10  # hexadecimal digits that A1111 shows


@dataclass(frozen=True)
class Machine:
    """What a picture was painted on: the device, and the CPU threads, which decide the order of sums on a CPU."""

    device: str
    threads: int


@dataclass(frozen=True, eq=False)
class PictureRecord:
    """What a picture says of itself, and its pixels as they are now."""

    recipe: Recipe
    versions: Mapping[str, str]
    machine: Machine
    pixels_sha256: str
    image: Image.Image


def describe(recipe: Recipe, image: Image.Image, machine: Machine) -> dict[str, str]:
    """Both text chunks of a picture, by name."""
    record = {
        "recipe": to_json(recipe),
        "versions": versions(),
        "device": machine.device,
        "threads": machine.threads,
        "pixels_sha256": pixels_sha256(image),
    }
    return {PARAMETERS: parameters_text(recipe), RECORD: json.dumps(record)}


def pixels_sha256(image: Image.Image) -> str:
    """SHA-256 over width, height and the RGB bytes."""
    return hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.convert("RGB").tobytes()).hexdigest()


def parameters_text(recipe: Recipe) -> str:
    """The settings in A1111's form."""
    fields: dict[str, str] = {
        "Steps": str(recipe.steps),
        "Sampler": "Euler flow match",
        "CFG scale": f"{recipe.guidance:g}",
        "Seed": str(recipe.seed),
        "Size": f"{recipe.width}x{recipe.height}",
    }
    if recipe.model.components is not None:
        fields["Model hash"] = recipe.model.components["transformer"][:SHORT_HASH]
    fields["Model"] = recipe.model.source
    if recipe.adapters:
        hashes = (f"{adapter.name}: {(adapter.sha256 or 'none')[:SHORT_HASH]}" for adapter in recipe.adapters)
        fields["Lora hashes"] = ", ".join(hashes)
    windows = [f"{use.name}: {use.start:g}-{use.end:g}" for use in recipe.adapters if (use.start, use.end) != (0, 1)]
    if windows:
        fields["Lora windows"] = ", ".join(windows)
    fields["Version"] = f"gossamer {VERSION}"
    return f"{recipe.prompt}\n" + ", ".join(f"{name}: {_quote(value)}" for name, value in fields.items())


def _quote(value: str) -> str:
    """A1111 reads values with separators in them only as JSON strings."""
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",:\n") else value


def save(image: Image.Image, path: str | Path) -> Path:
    """Write a picture with its settings as PNG: under a temporary name first, so that no half of one is ever left."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise OutputError(
            f"{str(path)!r} is not the name of a PNG file.",
            "Pictures are written as PNG, which keeps the pixels exactly and carries their settings.",
            "Let the name end in .png.",
        )
    chunks = PngInfo()
    for name in (PARAMETERS, RECORD):
        if name in image.info:
            chunks.add_text(name, image.info[name])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(image, path, chunks)
    except OSError as error:
        raise OutputError(
            f"The picture {str(path)!r} cannot be written.",
            f"The system says: {error.strerror or error}.",
            "Choose another place with --output, or make room there.",
        ) from error
    return path


def _write_whole(image: Image.Image, path: Path, chunks: PngInfo) -> None:
    part = path.with_name(f".{path.stem[:40]}-{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            image.save(file, format="PNG", pnginfo=chunks)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_picture(path: str | Path) -> PictureRecord:
    """The settings and the pixels of a picture that Gossamer painted."""
    where = str(path)
    if not os.path.isfile(path):
        raise FileMissingError(
            f"There is no picture {where!r}.",
            "The path does not exist, seen from the current folder, or is not a file.",
            "Give the path of a PNG that Gossamer painted.",
        )
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            image = picture.convert("RGB")
            text = picture.info.get(RECORD)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise FileDamagedError(
            f"{where!r} cannot be read as a PNG picture.",
            f"The picture reader says: {error}.",
            "Give the file as Gossamer wrote it.",
        ) from error
    content = _record(text, where)
    return PictureRecord(
        recipe=from_json(content["recipe"], where),
        versions=_texts(content["versions"], where),
        machine=_machine(content, where),
        pixels_sha256=str(content["pixels_sha256"]),
        image=image,
    )


def _texts(content: object, where: str) -> dict[str, str]:
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise _no_settings(where, "The versions in it are not a table of texts.")
    return content


def _machine(content: Mapping[str, Any], where: str) -> Machine:
    device, threads = content["device"], content["threads"]
    if not isinstance(device, str) or type(threads) is not int or not 1 <= threads <= MOST_THREADS:
        raise _no_settings(where, "The device or the number of threads in it makes no sense.")
    return Machine(device, threads)


def _record(text: object, where: str) -> dict[str, Any]:
    why = "It has no chunk of that name."
    if isinstance(text, str):
        try:
            content = json.loads(text)
            if isinstance(content, dict) and set(content) == RECORD_FIELDS:
                return content
            why = f"The chunk has to hold exactly: {', '.join(sorted(RECORD_FIELDS))}."
        except (ValueError, RecursionError) as error:
            why = f"The chunk is not valid JSON: {error}."
    raise _no_settings(where, why)


def _no_settings(where: str, why: str) -> FileDamagedError:
    return FileDamagedError(
        f"{where!r} carries no settings of Gossamer that can be read.",
        why,
        "Other programs often drop such chunks; give the file as Gossamer wrote it.",
    )
