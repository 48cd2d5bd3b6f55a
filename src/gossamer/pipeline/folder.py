"""A model folder, checked before anything is loaded: the standard diffusers layout of a FLUX.1 pipeline.

model_index.json                the pipeline's class
scheduler/ tokenizer/ tokenizer_2/ text_encoder/ text_encoder_2/ transformer/ vae/
gossamer.json                   optional: {"max_sequence_length": text tokens that the model was trained with}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.checkpoints.safetensors_file import read_header, sha256_file
from gossamer.errors import FileDamagedError, FileMissingError, InvalidOptionError, WrongModelError
from gossamer.models.flux_spec import FluxSpec

MODELS = ("transformer", "text_encoder", "text_encoder_2", "vae")
COMPONENTS = ("scheduler", "tokenizer", "tokenizer_2", *MODELS)
PIPELINES = ("FluxPipeline", "FluxControlPipeline")
SETTINGS_FILE = "gossamer.json"
MAX_SEQUENCE_LENGTH = 512  # diffusers' default for FLUX
STORAGE_OF_DTYPE = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}


@dataclass(frozen=True)
class Profile:
    """Defaults that belong to a model: side of a picture in pixels, and text tokens."""

    picture_side: int
    max_sequence_length: int


@dataclass(frozen=True)
class ModelFolder:
    """A folder that has every file a FLUX.1 pipeline needs; `stored` is the storage format of each model's files."""

    path: Path
    spec: FluxSpec
    profile: Profile
    stored: Mapping[str, str]

    @property
    def is_control(self) -> bool:
        """Whether the model itself reads a control picture: twice the channels that it writes."""
        return self.spec.in_channels == 2 * self.spec.out_channels


def open_folder(path: Path) -> ModelFolder:
    """Check the layout, every JSON file that is used and every weight file's header; no tensor is read."""
    _require_flux(path)
    for component in COMPONENTS:
        if not (path / component).is_dir():
            raise _missing(path / component, "A FLUX.1 pipeline needs this folder.")
    config = read_json(path / "transformer" / "config.json")
    try:
        spec = FluxSpec.from_config(config)
    except WrongModelError as error:
        raise WrongModelError(f"{str(path)!r}: {error.what}", error.why, error.next_step) from error
    profile = Profile(_picture_side(path, spec), max_sequence_length(path))
    return ModelFolder(path, spec, profile, {model: _stored_type(path / model) for model in MODELS})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise _missing(path, f"The system says: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"It is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise _damaged(path, "It is JSON, but not an object.")
    return content


def max_sequence_length(path: Path) -> int:
    """Text tokens that a model was trained with, as its gossamer.json says; 512 where there is none."""
    file = path / SETTINGS_FILE
    if not file.exists():
        return MAX_SEQUENCE_LENGTH
    settings = read_json(file)
    length = settings.pop("max_sequence_length", MAX_SEQUENCE_LENGTH)
    if settings or type(length) is not int or not 1 <= length <= MAX_SEQUENCE_LENGTH:
        raise _damaged(file, f"It may hold max_sequence_length, from 1 to {MAX_SEQUENCE_LENGTH}, and nothing else.")
    return length


def component_hashes(path: Path) -> dict[str, str]:
    """SHA-256 of each component over the names and contents of its files."""
    return {component: _hash_folder(path / component) for component in COMPONENTS}


def _hash_folder(path: Path) -> str:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = [f"{sha256_file(file)}  {file.relative_to(path).as_posix()}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _require_flux(path: Path) -> None:
    index = path / "model_index.json"
    if not index.is_file():
        raise FileMissingError(
            f"{str(path)!r} is not a diffusers folder.",
            "It holds no model_index.json.",
            "Give the folder that holds model_index.json, or leave --model out to use the embedded model.",
        )
    name = read_json(index).get("_class_name")
    if name not in PIPELINES:
        raise WrongModelError(
            f"{str(path)!r} holds a {name}, not a FLUX.1 text-to-image model.",
            f"Gossamer runs {' and '.join(PIPELINES)}.",
            "Choose a FLUX.1 model, for example black-forest-labs/FLUX.1-dev.",
        )


def _picture_side(path: Path, spec: FluxSpec) -> int:
    """Side of the pictures that the autoencoder was made for; its latents must be what the transformer reads."""
    file = path / "vae" / "config.json"
    config = read_json(file)
    side, channels = config.get("sample_size"), config.get("latent_channels")
    if type(side) is not int or type(channels) is not int or side % 16 or side <= 0:
        raise _damaged(file, "It does not state sample_size, divisible by 16, and latent_channels.")
    patch = 4 * channels
    if spec.in_channels not in (patch, 2 * patch):
        raise WrongModelError(
            f"{str(path)!r} holds a transformer of {spec.in_channels} input channels.",
            f"Text-to-image reads patches of {patch} channels, or {2 * patch} with a control picture.",
            "Choose a FLUX.1 dev, schnell, Canny or Depth model.",
        )
    return side


# weight files


def _stored_type(folder: Path) -> str:
    """The plain format that holds a component's weights, those of more than one dimension, without loss."""
    read_json(folder / "config.json")
    entries = [entry for file in _weight_files(folder) for entry in read_header(file).tensors.values()]
    dtypes = {entry.dtype for entry in entries if len(entry.shape) > 1}
    if not dtypes or not dtypes <= set(STORAGE_OF_DTYPE):
        raise InvalidOptionError(
            f"{str(folder)!r} holds weights of type {', '.join(sorted(dtypes)) or 'nothing'}.",
            f"Gossamer loads folders in {', '.join(STORAGE_OF_DTYPE)}, and quantises them itself.",
            "Choose the folder of the unquantised model.",
        )
    return one_type({STORAGE_OF_DTYPE[dtype] for dtype in dtypes})


def one_type(formats: set[str]) -> str:
    """The plain format that holds weights of all the given plain formats without loss."""
    return next(iter(formats)) if len(formats) == 1 else "fp32"


def _weight_files(folder: Path) -> list[Path]:
    """The files that diffusers and transformers will read: the one an index lists, or the single one."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if not indices:
        single = [file for name in ("diffusion_pytorch_model", "model") for file in folder.glob(f"{name}.safetensors")]
        if not single:
            raise _missing(folder, "It holds no .safetensors weights.")
        return single[:1]
    shards = read_json(indices[0]).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise _damaged(indices[0], "It has no weight_map from tensor to file.")
    return [folder / name for name in sorted(set(shards.values()))]


def _missing(path: Path, why: str) -> FileMissingError:
    return FileMissingError(
        f"The model lacks {str(path)!r}.", why, "Download the model again, or check that the folder is complete."
    )


def _damaged(path: Path, why: str) -> FileDamagedError:
    return FileDamagedError(f"{str(path)!r} cannot be used.", why, "Download the model again.")
