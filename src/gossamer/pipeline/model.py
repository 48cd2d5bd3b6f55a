"""What a model is made of, found and checked before anything is loaded: each part's weights and settings.

    open_model("FLUX.1-dev-folder")                     a diffusers folder has every part
    open_model("flux1-dev-Q4_K_S.gguf", "FOLDER")       a file has the transformer, perhaps text encoders and the
                                                        autoencoder; the rest comes from a base model
    open_transformer("flux1-fill-dev.safetensors")      the transformer alone

Tokenizers, the scheduler and the configs of text encoders and autoencoder are in no checkpoint file, so a file always
needs a base model: a diffusers folder, a hub id, or the embedded model for files of its sizes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from gossamer.checkpoints.checkpoint import Checkpoint, Component, open_checkpoint, open_component
from gossamer.checkpoints.families import other_family, parts_in_words
from gossamer.checkpoints.safetensors_file import sha256_file
from gossamer.errors import FileMissingError, InvalidOptionError, WrongModelError
from gossamer.formats.gguf import BLOCK_TYPES
from gossamer.kernels.decode_support import why_not_decodable
from gossamer.models.flux_config import FLUX_AXES, axes_of, config_from_weights
from gossamer.models.flux_spec import FluxSpec
from gossamer.pipeline.folder import (
    COMPONENTS,
    MODELS,
    PIPELINES,
    Profile,
    hash_folder,
    hash_lines,
    is_pipeline,
    is_transformer,
    max_sequence_length,
    read_config,
    read_json,
    require_pipeline,
)
from gossamer.pipeline.model_checks import WORDS, picture_side, require_fitting_texts, require_whole
from gossamer.pipeline.sources import find_source
from gossamer.pipeline.stored import stored_format

TRANSFORMER = "transformer"
BASE_PIPELINES = (*PIPELINES, "FluxFillPipeline", "FluxKontextPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")


@dataclass(frozen=True, eq=False)
class Model:
    """Every part of a FLUX.1 pipeline; `config` is the transformer's, `homes` are the folders of the parts' settings.

    `unneeded` tells why some tensors of the files have no use.
    """

    config: Mapping[str, Any]
    profile: Profile
    weights: Mapping[str, Component]
    homes: Mapping[str, Path]
    unneeded: Mapping[str, str]

    @cached_property
    def spec(self) -> FluxSpec:
        """Sizes of the transformer."""
        return FluxSpec.from_config(self.config)

    @cached_property
    def stored(self) -> dict[str, str]:
        """The one storage format that keeps every weight of a part as it is; "stored" where it takes several."""
        return {name: stored_format(component) for name, component in self.weights.items()}

    @property
    def is_control(self) -> bool:
        """Whether the model itself reads a control picture: twice the channels that it writes."""
        return self.spec.in_channels == 2 * self.spec.out_channels

    def remarks(self) -> list[str]:
        """What a user should know of the files: tensors without a use, and weights that no kernel decodes."""
        unused = [f"The tensor {name!r} is not used: {reason}." for name, reason in self.unneeded.items()]
        kinds = Counter(self.weights[TRANSFORMER].storage().values())
        slow = [kind for kind in kinds if kind in BLOCK_TYPES and why_not_decodable(kind, self.spec.width) is not None]
        return unused + [
            f"{kinds[kind]} weights stay as {kind}, which is decoded in torch on every device: no kernel reads it."
            for kind in slow
        ]

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each part over the names and contents of its files; of all-in-one files each is read once."""
        known: dict[Path, str] = {}
        return {component: self._hash(component, known) for component in COMPONENTS}

    def _hash(self, component: str, known: dict[Path, str]) -> str:
        home = self.homes.get(component)
        files = self.weights[component].source.files if component in self.weights else ()
        if home is not None and all(file.parent == home for file in files):
            return hash_folder(home)
        for file in files:
            known.setdefault(file, known.get(file) or sha256_file(file))
        named = [(known[file], f"weights {number}") for number, file in enumerate(files)]
        if home is not None:
            named.append((sha256_file(home / "config.json"), "config.json"))
        return hash_lines(named)


@dataclass
class _Found:
    """Parts as they are found, here and there."""

    weights: dict[str, Component] = field(default_factory=dict)
    homes: dict[str, Path] = field(default_factory=dict)
    unneeded: dict[str, str] = field(default_factory=dict)

    def add(self, checkpoint: Checkpoint) -> None:
        """Take the parts of a checkpoint that are not there yet."""
        self.weights = {**checkpoint.components, **self.weights}
        self.unneeded |= checkpoint.unneeded

    @property
    def missing(self) -> list[str]:
        """Parts without weights, and parts without settings; a transformer's follow from its weights."""
        return [
            name
            for name in COMPONENTS
            if (name in MODELS and name not in self.weights) or (name != TRANSFORMER and name not in self.homes)
        ]


def open_model(model: str, base: str | None = None) -> Model:
    """Find and check all parts of a model; no weights are read but a few small ones that tell sizes."""
    path = find_source(model).fetch()
    found = _find(path)
    root, missing = path, found.missing
    if missing:
        root = _add_base(found, model, base)
    elif base is not None:
        raise InvalidOptionError(
            f"A base model was given, but {model!r} has every part itself.",
            f"{base!r} would be ignored.",
            "Leave --base out.",
        )
    config = _config(found, root)
    _require_base_of_same_kind(found, config, root)
    require_fitting_texts(found.homes, config)
    profile = Profile(picture_side(found.homes["vae"], model, config), max_sequence_length(root))
    return Model(config, profile, found.weights, found.homes, found.unneeded)


def open_folder(path: Path) -> Model:
    """Find and check all parts in a diffusers folder."""
    require_pipeline(path)
    return open_model(str(path))


def open_transformer(path: Path) -> tuple[dict[str, Any], Component]:
    """Config and weights of the transformer in a file, in its component folder, or in a pipeline's folder."""
    found = _Found()
    if path.is_dir() and is_pipeline(path):
        require_pipeline(path, BASE_PIPELINES)
        _add_component(found, path / TRANSFORMER, TRANSFORMER)
    else:
        found = _find(path)
    return _config(found, path), found.weights[TRANSFORMER]


# finding --------------------------------------------------------------------------------------------------------------


def _find(path: Path) -> _Found:
    """What is at a path: a pipeline's folder, a transformer's, or a file."""
    found = _Found()
    if path.is_dir() and not is_pipeline(path) and is_transformer(path):
        _add_component(found, path, TRANSFORMER)
    elif path.is_dir():
        require_pipeline(path)
        for component in COMPONENTS:
            if (path / component).is_dir():
                _add_component(found, path / component, component)
    else:
        found.add(_open_file(path))
    return found


def _add_component(found: _Found, folder: Path, component: str) -> None:
    found.homes[component] = folder
    if component not in MODELS:
        return
    read_config(folder)
    checkpoint = open_component(folder, component)
    checkpoint.require_known()
    found.add(checkpoint)


def _open_file(path: Path) -> Checkpoint:
    checkpoint = open_checkpoint(path)
    names = list(checkpoint.source.entries)
    family = other_family(names)
    if family is not None:
        raise WrongModelError(
            f"{str(path)!r} is not a FLUX.1 checkpoint.",
            f"By the names of its tensors it holds {family}.",
            "Attach it with --lora." if family == "an adapter" else "Choose a file of FLUX.1 dev, schnell or Control.",
        )
    if TRANSFORMER not in checkpoint.components:
        parts = parts_in_words(checkpoint.components)
        raise WrongModelError(
            f"{str(path)!r} holds no FLUX.1 transformer.",
            f"It holds {parts} alone." if parts else f"Its first tensor is {names[0]!r}." if names else "It is empty.",
            "Give the file of the transformer, or a diffusers folder.",
        )
    checkpoint.require_known()
    return checkpoint


def _add_base(found: _Found, model: str, base: str | None) -> Path:
    """Take the missing parts from the base model; its folder."""
    missing = found.missing
    words = ", ".join(WORDS[name] if name not in found.weights else f"{WORDS[name]}'s config" for name in missing)
    if base is None:
        raise FileMissingError(
            f"{model!r} is not a whole model: it lacks {words}.",
            "A picture needs all of them. Files hold the transformer, at most with text encoders and autoencoder.",
            "Name a model that has them with --base (in Python: base=): a diffusers folder, a hub id such as "
            "black-forest-labs/FLUX.1-dev, or 'embedded'.",
        )
    wanted = [name for name in MODELS if name not in found.weights]
    root = find_source(base).fetch(wanted)
    if not root.is_dir():
        raise WrongModelError(
            f"{base!r} cannot be a base model.",
            "It is a file; the settings of text encoders and autoencoder are only in folders.",
            "Give a diffusers folder or a hub id.",
        )
    require_pipeline(root, BASE_PIPELINES)
    for name in missing:
        if not (root / name).is_dir():
            raise FileMissingError(
                f"The base model lacks {str(root / name)!r}.",
                f"{model!r} needs {WORDS[name]} from it.",
                "Name a whole FLUX.1 model with --base.",
            )
        if name in wanted:
            _add_component(found, root / name, name)
        else:
            found.homes[name] = root / name
    return root


# checking -------------------------------------------------------------------------------------------------------------


def _config(found: _Found, root: Path) -> dict[str, Any]:
    """The transformer's config, as a folder states it or as the weights tell it; every tensor has to be there."""
    transformer, home = found.weights[TRANSFORMER], found.homes.get(TRANSFORMER)
    if home is not None:
        config = {name: value for name, value in read_config(home).items() if not name.startswith("_")}
        config.pop("quantization_config", None)
    else:
        stated = _base_config(root)
        axes = axes_of(stated)
        head = stated.get("attention_head_dim")
        config = config_from_weights(transformer, axes if head == sum(axes) == _head(transformer) else FLUX_AXES)
    try:
        spec = FluxSpec.from_config(config)
    except WrongModelError as error:
        raise WrongModelError(f"{str(home)!r}: {error.what}", error.why, error.next_step) from error
    require_whole(transformer, spec)
    return config


def _base_config(root: Path) -> dict[str, Any]:
    """The config of a base model's own transformer, where the base model states one."""
    file = root / TRANSFORMER / "config.json"
    return read_json(file) if root.is_dir() and file.is_file() else {}


def _head(transformer: Component) -> int | None:
    """Channels of a head, by the first norm scale."""
    norms = [name for name in transformer.names if name.endswith("attn.norm_q.weight")]
    return next((transformer.shape(name)[0] for name in norms if len(transformer.shape(name)) == 1), None)


def _require_base_of_same_kind(found: _Found, config: Mapping[str, Any], root: Path) -> None:
    """dev and schnell step through other noise levels, and a file does not bring the scheduler that knows them."""
    if TRANSFORMER in found.homes:
        return
    guided = _base_config(root).get("guidance_embeds")
    if guided is not None and guided != config["guidance_embeds"]:
        kinds = {True: "a guided model, as FLUX.1-dev is", False: "a model without guidance, as FLUX.1-schnell is"}
        raise WrongModelError(
            f"{str(root)!r} cannot be the base of this checkpoint.",
            f"The checkpoint is {kinds[config['guidance_embeds']]}; the base model, whose scheduler would be used, is "
            f"{kinds[guided]}.",
            f"Name a base model of the same kind, such as black-forest-labs/FLUX.1-{'schnell' if guided else 'dev'}.",
        )
