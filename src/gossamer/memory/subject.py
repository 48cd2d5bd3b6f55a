"""The model of a plan: sizes, and what of them is fixed by files that are there. Headers are read, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from gossamer.checkpoints.checkpoint import Component, open_checkpoint
from gossamer.checkpoints.layouts import TRANSFORMER
from gossamer.errors import InvalidOptionError, WrongModelError
from gossamer.formats import packed_bytes, storage_names
from gossamer.memory.model_cost import (
    PLAIN_BYTES,
    TransformerBytes,
    block_index,
    clip_bytes,
    t5_bytes,
    transformer_bytes,
    vae_bytes,
)
from gossamer.memory.model_specs import DEV, ModelSpec
from gossamer.models.flux_config import config_from_weights
from gossamer.models.flux_spec import FluxSpec, is_modulation, linear_shapes, norm_shapes


@dataclass(frozen=True)
class Subject:
    """A model: its sizes, the bytes of its files, and whether they are on this machine.

    `fixed` are the weights of a transformer that is quantised already: they stay as they are.
    """

    spec: ModelSpec
    disk_bytes: int
    is_here: bool = False
    fixed: TransformerBytes | None = None

    @property
    def stored(self) -> str:
        """The format of the transformer's file."""
        return self.fixed.storage if self.fixed is not None else self.spec.stored

    def transformer(self, storage: str) -> TransformerBytes:
        """Its bytes in a format."""
        if self.fixed is not None and storage == self.fixed.storage:
            return self.fixed
        return transformer_bytes(self.spec.transformer, storage, self.spec.stored)


def known_subject(spec: ModelSpec) -> Subject:
    """A published model that is not on this machine, in the type that its spec says."""
    weights = transformer_bytes(spec.transformer, spec.stored, spec.stored).total
    return Subject(spec, weights + _others(spec))


def _others(spec: ModelSpec) -> int:
    """Bytes of the files besides the transformer's."""
    text = t5_bytes(spec.t5, spec.stored, spec.stored).total + clip_bytes(spec.clip, spec.stored, spec.stored).total
    return text + vae_bytes(spec.vae, spec.stored)


def local_subject(spec: ModelSpec, transformer: Component, others: Iterable[Component] = ()) -> Subject:
    """A model whose transformer is on this machine, with the formats that its files have."""
    weights = _weights(transformer, spec.transformer)
    is_plain = weights.storage in PLAIN_BYTES
    spec = replace(spec, stored=weights.storage) if is_plain else spec
    files = dict.fromkeys(file for part in (transformer, *others) for file in part.source.files)
    return Subject(spec, sum(file.stat().st_size for file in files), True, None if is_plain else weights)


def file_subject(path: Path) -> Subject:
    """The model whose transformer is in a file; text encoders and VAE are taken to be FLUX.1's, in bf16."""
    component = open_checkpoint(path).components.get(TRANSFORMER)
    if component is None:
        raise WrongModelError(
            f"{str(path)!r} holds no FLUX.1 transformer.",
            "A plan is made around the transformer, which takes most of the memory and of the time.",
            "Look at the file with `gossamer inspect`, or name the model.",
        )
    transformer = FluxSpec.from_config(config_from_weights(component))
    if (transformer.joint_attention_dim, transformer.pooled_projection_dim) != (DEV.t5.width, DEV.clip.width):
        raise WrongModelError(
            f"{str(path)!r} is not for FLUX.1's text encoders.",
            f"It reads text of width {transformer.joint_attention_dim} and {transformer.pooled_projection_dim}; T5-XXL "
            f"and CLIP-L have {DEV.t5.width} and {DEV.clip.width}.",
            "Give the diffusers folder of that model, which holds its own.",
        )
    return local_subject(replace(DEV, name=path.name, transformer=transformer), component)


def _weights(component: Component, spec: FluxSpec) -> TransformerBytes:
    """Bytes as they stay in memory: each linear in the format of its file."""
    storages, path = component.storage(), component.source.files[0]
    blocks = [0] * (spec.num_layers + spec.num_single_layers)
    modulation, counts = dict[str, list[int]](), dict[str, int]()
    rest = sum(size for (size,) in norm_shapes(spec).values()) * PLAIN_BYTES["bf16"]
    for name, shape in linear_shapes(spec).items():
        storage = _known(storages.get(f"{name}.weight"), name, path)
        size = packed_bytes(storage, *shape)
        rest += shape[0] * PLAIN_BYTES["bf16"]
        place = block_index(name, spec)
        if place is None:
            rest += size
        elif is_modulation(name):
            modulation.setdefault(storage, []).append(size)
        else:
            blocks[place] += size
            counts[storage] = counts.get(storage, 0) + math.prod(shape)
    vectors = max(modulation, key=lambda each: len(modulation[each]))
    every = [size for sizes in modulation.values() for size in sizes]
    return TransformerBytes(tuple(blocks), sum(every), rest, counts, vectors, max(every))


def _known(storage: str | None, name: str, path: Path) -> str:
    if storage is None:
        raise WrongModelError(
            f"{str(path)!r} is not a whole FLUX.1 transformer.", f"It lacks {name!r}.", "Use a complete file."
        )
    if storage not in storage_names():
        raise InvalidOptionError(
            f"{str(path)!r} cannot be planned for.",
            f"{name!r} is stored as {storage}; what that becomes in memory shows only when it is read.",
            "Plan for FLUX.1-dev with the nearest --storage instead.",
        )
    return storage
