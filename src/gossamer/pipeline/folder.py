"""Folders in the standard diffusers layout of a FLUX.1 pipeline: what is in them, and the settings that they hold.

model_index.json                the pipeline's class
scheduler/ tokenizer/ tokenizer_2/ text_encoder/ text_encoder_2/ transformer/ vae/
gossamer.json                   optional: {"max_sequence_length": text tokens that the model was trained with}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.checkpoints.safetensors_file import sha256_file
from gossamer.errors import FileDamagedError, FileMissingError, WrongModelError

MODELS = ("transformer", "text_encoder", "text_encoder_2", "vae")
COMPONENTS = ("scheduler", "tokenizer", "tokenizer_2", *MODELS)
PIPELINES = ("FluxPipeline", "FluxControlPipeline")
SETTINGS_FILE = "gossamer.json"
MAX_SEQUENCE_LENGTH = 512  # diffusers' default for FLUX
INDEX_FILE = "model_index.json"
TRANSFORMER_CLASSES = ("FluxTransformer2DModel",)
READ_QUANTISATION = ("bitsandbytes",)  # libraries whose files in a component folder are read


@dataclass(frozen=True)
class Profile:
    """Defaults that belong to a model: side of a picture in pixels, and text tokens."""

    picture_side: int
    max_sequence_length: int


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise missing(path, f"The system says: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"It is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise damaged(path, "It is JSON, but not an object.")
    return content


def max_sequence_length(path: Path) -> int:
    """Text tokens that a model was trained with, as its gossamer.json says; 512 where there is none."""
    file = path / SETTINGS_FILE
    if not file.exists():
        return MAX_SEQUENCE_LENGTH
    settings = read_json(file)
    length = settings.pop("max_sequence_length", MAX_SEQUENCE_LENGTH)
    if settings or type(length) is not int or not 1 <= length <= MAX_SEQUENCE_LENGTH:
        raise damaged(file, f"It may hold max_sequence_length, from 1 to {MAX_SEQUENCE_LENGTH}, and nothing else.")
    return length


def component_hashes(path: Path) -> dict[str, str]:
    """SHA-256 of each component over the names and contents of its files."""
    return {component: hash_folder(path / component) for component in COMPONENTS}


def hash_folder(path: Path) -> str:
    """SHA-256 over the names and contents of all files in a folder."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return hash_lines((sha256_file(file), file.relative_to(path).as_posix()) for file in files)


def hash_lines(named: Iterable[tuple[str, str]]) -> str:
    """SHA-256 over pairs of a file's SHA-256 and its name."""
    return hashlib.sha256("".join(f"{digest}  {name}\n" for digest, name in named).encode()).hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a component; weights that another library quantised must be of a kind that is read."""
    config = read_json(folder / "config.json")
    quantisation = config.get("quantization_config")
    if quantisation is None:
        return config
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
    if method not in READ_QUANTISATION:
        raise WrongModelError(
            f"{str(folder)!r} holds weights that were quantised by {method or 'an unnamed library'}.",
            f"Of quantised folders Gossamer reads those of {', '.join(READ_QUANTISATION)}.",
            "Choose the unquantised model, and let Gossamer quantise it with --storage; or a GGUF file of it.",
        )
    return config


def is_pipeline(path: Path) -> bool:
    """Whether a folder is one of a whole pipeline."""
    return (path / INDEX_FILE).is_file()


def is_transformer(path: Path) -> bool:
    """Whether a folder is the transformer component of a FLUX.1 pipeline, handed over alone."""
    file = path / "config.json"
    return file.is_file() and read_json(file).get("_class_name") in TRANSFORMER_CLASSES


def require_pipeline(path: Path, allowed: tuple[str, ...] = PIPELINES) -> None:
    """Refuse folders that are not of a FLUX.1 pipeline of these classes."""
    index = path / INDEX_FILE
    if not index.is_file():
        raise FileMissingError(
            f"{str(path)!r} is not a diffusers folder.",
            f"It holds no {INDEX_FILE}.",
            f"Give the folder that holds {INDEX_FILE}, a checkpoint file, or leave --model out to use the embedded "
            "model.",
        )
    name = read_json(index).get("_class_name")
    if name not in allowed:
        raise WrongModelError(
            f"{str(path)!r} holds a {name}, not a FLUX.1 text-to-image model.",
            f"Gossamer runs {' and '.join(PIPELINES)}.",
            "Choose a FLUX.1 model, for example black-forest-labs/FLUX.1-dev.",
        )


def missing(path: Path, why: str) -> FileMissingError:
    """The error for a file or folder that a model needs."""
    return FileMissingError(
        f"The model lacks {str(path)!r}.", why, "Download the model again, or check that the folder is complete."
    )


def damaged(path: Path, why: str) -> FileDamagedError:
    """The error for a settings file that cannot be used."""
    return FileDamagedError(f"{str(path)!r} cannot be used.", why, "Download the model again.")
