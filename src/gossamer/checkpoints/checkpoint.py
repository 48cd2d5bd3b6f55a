"""An opened checkpoint: canonical names of its components, and their weights as a stream.

    open_checkpoint(path)              a file, or a model in shards
    open_component(folder, component)  one component folder of a diffusers model
    checkpoint.components[name]        what it holds of "transformer", "text_encoder", "text_encoder_2", "vae"
    component.stream()                 (canonical name, tensor or Packed), in the order of the file
    component.shape(name), .storage()  sizes and formats, before anything is loaded
    checkpoint.require_known()         an error that names what nothing reads

Canonical names are those of diffusers and transformers. A weight that is stored as a format of Gossamer comes as
`Packed` around the bytes of the file, cut by rows where one tensor holds several linears; everything else comes as a
plain tensor. Both are views of the mapped file, and valid until the next item is asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import torch

from gossamer.checkpoints.containers import open_folder_source, open_source
from gossamer.checkpoints.encodings import EncodedWeight, find_encoded, markers, read_encoded
from gossamer.checkpoints.flux_names import Part
from gossamer.checkpoints.layouts import TRANSFORMER, VAE, Layout, find_layout, find_naming
from gossamer.checkpoints.part_names import canonical_names, why_unneeded
from gossamer.checkpoints.rows import take_rows
from gossamer.checkpoints.safetensors_file import damage
from gossamer.checkpoints.single_tensor import FP8, SINGLE_TENSOR
from gossamer.checkpoints.source import MappedSource
from gossamer.checkpoints.transformer_names import transformer_parts
from gossamer.errors import FileDamagedError
from gossamer.formats import Packed

READ_AHEAD_BYTES = 256 << 20  # what the system is asked to read while earlier weights are copied
PLAIN: Mapping[str, str] = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}


@dataclass(frozen=True)
class Origin:
    """Where weights come from: a tensor of the file, how it is encoded if it is, and whose rows it holds.

    Rows of the parts are counted in `units` equal shares of the rows that are there.
    """

    weight: str
    encoded: EncodedWeight | None
    parts: tuple[Part, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        """All tensors of the file that belong to it."""
        return (self.weight,) if self.encoded is None else self.encoded.tensors

    @property
    def units(self) -> int:
        """Shares that the rows consist of; 1 where they are one part."""
        return max((stop for part in self.parts for _, stop in part.rows), default=1)

    def ranges(self, part: Part, rows: int) -> list[tuple[int, int]]:
        """The rows of a part in a tensor of so many rows."""
        if rows % self.units:
            raise FileDamagedError(
                f"{self.weight!r} has {rows} rows.",
                f"It holds {len(self.parts)} layers in {self.units} equal shares, which {rows} rows do not make.",
                "Download the file again, or use another version of the model.",
            )
        each = rows // self.units
        return [(start * each, stop * each) for start, stop in part.rows]


@dataclass(frozen=True, eq=False)
class Component:
    """One component of a checkpoint."""

    name: str
    source: MappedSource
    origins: Mapping[str, Origin]

    @property
    def names(self) -> frozenset[str]:
        """Canonical names of everything that it holds."""
        return frozenset(self._holders)

    def stream(self) -> Iterator[tuple[str, Packed | torch.Tensor]]:
        """Every weight once. The pages of a tensor are given back when the next one is asked for."""
        for origin in self._read_ahead():
            value = self._read(origin)
            for part in origin.parts:
                yield part.name, self._cut(origin, part, value)
            del value
            for name in origin.tensors:
                self.source.release(name)

    def _read_ahead(self) -> Iterator[Origin]:
        """The weights in the order of the file, while the system already reads those that come next."""
        entries = self.source.entries
        coming = deque(self.origins[name] for name in entries if name in self.origins)
        asked: deque[tuple[Origin, int]] = deque()
        ahead = 0
        while coming or asked:
            while coming and (ahead < READ_AHEAD_BYTES or not asked):
                origin = coming.popleft()
                size = sum(entries[name].stop - entries[name].start for name in origin.tensors)
                for name in origin.tensors:
                    self.source.prefetch(name)
                asked.append((origin, size))
                ahead += size
            origin, size = asked.popleft()
            yield origin
            ahead -= size

    def _read(self, origin: Origin) -> Packed | torch.Tensor:
        if origin.encoded is not None:
            return read_encoded(self.source, origin.encoded)
        tensor = self.source.read(origin.weight)
        # 1x1 convolutions in the autoencoder's attention are linears in diffusers
        is_pointwise = self.name == VAE and ".attentions." in origin.parts[0].name and tensor.dim() == 4
        return tensor.flatten(1) if is_pointwise and tensor.shape[2:] == (1, 1) else tensor

    def _cut(self, origin: Origin, part: Part, value: Packed | torch.Tensor) -> Packed | torch.Tensor:
        return take_rows(value, origin.ranges(part, value.shape[0])) if part.rows else value

    # without the stream ----------------------------------------------------------------------------------------------

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor by canonical name; where an encoding hides it from the header, the tensor is read."""
        origin, part = self._holders[name]
        hidden = origin.encoded is not None and origin.encoded.encoding not in SINGLE_TENSOR
        whole = tuple(self._read(origin).shape) if hidden else self.source.entries[origin.weight].shape
        return _shape_of_part(origin, part, whole)

    def header_shape(self, name: str) -> tuple[int, ...]:
        """The same from the header alone. Codes of two values in a byte are told by the bias beside them."""
        origin, part = self._holders[name]
        return _shape_of_part(origin, part, self._stated_shape(origin))

    @property
    def parameters(self) -> int:
        """Number of values, however they are packed, from the header alone."""
        return sum(prod(self._stated_shape(origin)) for origin in self.origins.values())

    def _stated_shape(self, origin: Origin) -> tuple[int, ...]:
        entry = self.source.entries[origin.weight]
        bias = self.source.entries.get(f"{origin.weight.removesuffix('weight')}bias")
        rows = bias.shape[0] if bias is not None and len(bias.shape) == 1 else 0
        is_packed = entry.dtype == "U8" or (rows and entry.shape[:1] != (rows,))
        if origin.encoded is None or not is_packed:
            return entry.shape
        values = 2 * (entry.stop - entry.start)
        return (rows, values // rows) if rows else (values,)

    def storage(self) -> dict[str, str]:
        """How every tensor is stored, by canonical name: a storage format, or the name of an encoding."""
        return {part.name: self._storage(origin) for origin in self.origins.values() for part in origin.parts}

    def _storage(self, origin: Origin) -> str:
        dtype = self.source.entries[origin.weight].dtype
        if origin.encoded is None:
            return PLAIN.get(dtype, dtype)
        return FP8.get(dtype, dtype) if origin.encoded.encoding in SINGLE_TENSOR else origin.encoded.encoding.name

    @cached_property
    def _holders(self) -> dict[str, tuple[Origin, Part]]:
        return {part.name: (origin, part) for origin in self.origins.values() for part in origin.parts}


def _shape_of_part(origin: Origin, part: Part, whole: tuple[int, ...]) -> tuple[int, ...]:
    if not part.rows or not whole:
        return whole
    return (sum(stop - start for start, stop in origin.ranges(part, whole[0])), *whole[1:])


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened file with its components; `unknown` names are read by nothing, `unneeded` ones with a reason."""

    source: MappedSource
    layout: Layout
    components: Mapping[str, Component]
    unknown: tuple[str, ...]
    unneeded: Mapping[str, str]
    encodings: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The file, or the first of its shards."""
        return self.source.files[0]

    def require_known(self) -> None:
        """Refuse tensors that nothing reads: what they say would be lost."""
        if self.unknown:
            named = ", ".join(map(repr, self.unknown[:5])) + (", ..." if len(self.unknown) > 5 else "")
            raise FileDamagedError(
                f"{len(self.unknown)} of the {len(self.source.entries)} tensors of {str(self.path)!r} have no place in "
                f"a FLUX.1 model: {named}.",
                "A checkpoint that is loaded in part is another model.",
                "Use another version of the model, or report the file if others load it.",
            )


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a file, or all shards of a model; headers are read, and nothing else."""
    return _open(open_source(path), find_layout)


def open_component(folder: Path, component: str) -> Checkpoint:
    """Open one component folder of a diffusers model."""

    def layout(names: Iterable[str]) -> Layout:
        own = {name: name for name in names}
        return Layout({component: own}, (), find_naming(own) if component == TRANSFORMER else None, "")

    return _open(open_folder_source(folder), layout)


def _open(source: MappedSource, layout_of: Callable[[Iterable[str]], Layout]) -> Checkpoint:
    encoded = _find_encoded(source)
    sides = {name for weight in encoded.values() for name in weight.tensors[1:]}.union(markers(source.entries.keys()))
    weights = [name for name in source.entries if name not in sides]
    unneeded = {name: reason for name in weights if (reason := why_unneeded(name)) is not None}
    layout = layout_of(name for name in weights if name not in unneeded)
    components, unknown = {}, list(layout.other)
    for name, names in layout.components.items():
        parts = _parts(name, names, layout.naming)
        unknown += [full for full, bare in names.items() if bare not in parts]
        origins = {full: Origin(full, encoded.get(full), parts[bare]) for full, bare in names.items() if bare in parts}
        _require_unique(source, origins)
        components[name] = Component(name, source, origins)
    used = dict.fromkeys(weight.encoding.name for weight in encoded.values())
    return Checkpoint(source, layout, components, tuple(unknown), unneeded, tuple(used))


def _find_encoded(source: MappedSource) -> dict[str, EncodedWeight]:
    """Weights that are no plain tensors. Those of several tensors are found first."""
    encoded = find_encoded(source, source.entries)
    taken = {name for weight in encoded.values() for name in weight.tensors}
    left = dict.fromkeys(name for name in source.entries if name not in taken)
    for encoding in SINGLE_TENSOR:
        found = encoding.find(source, left.keys())
        encoded |= {name: EncodedWeight(name, encoding, tensors) for name, tensors in found.items()}
    return encoded


def _parts(component: str, names: Mapping[str, str], naming: str | None) -> dict[str, tuple[Part, ...]]:
    """Canonical parts by name without prefix."""
    if component == TRANSFORMER:
        return transformer_parts(naming, names.values())
    return {bare: (Part(name),) for bare, name in canonical_names(component, names.values()).items()}


def _require_unique(source: MappedSource, origins: Mapping[str, Origin]) -> None:
    holders: dict[str, str] = {}
    for origin in origins.values():
        for part in origin.parts:
            if part.name in holders:
                why = f"{holders[part.name]!r} and {origin.weight!r} are the same weight, {part.name!r}."
                raise damage(source.files[0], why, "checkpoint")
            holders[part.name] = origin.weight
