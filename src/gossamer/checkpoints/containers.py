"""Containers as sources of tensors: safetensors and GGUF files, and models that are spread over several of them.

    open_source(path)            the container that the first bytes say; a shard, or the index of shards, opens all
    open_folder_source(folder)   the weights of a component folder as diffusers and transformers write it

Headers are checked when a container is opened; no tensor is read before it is asked for. `entries` are in the order of
the file. A GGUF file's dtypes are its block types, and `read` shows the blocks of a matrix as bytes (rows, bytes of a
row).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from gossamer.checkpoints import gguf_file, mapped_file
from gossamer.checkpoints.safetensors_file import TensorEntry, damage, read_header, require_file
from gossamer.checkpoints.source import MappedBytes, MappedSource
from gossamer.errors import FileDamagedError, FileMissingError, InvalidOptionError
from gossamer.formats import Packed

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

INDEX_ENDING = ".safetensors.index.json"
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<ending>\.safetensors|\.gguf)")
MAX_INDEX_BYTES = 32 << 20
MAX_SHARDS = 1000
SINGLE_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")


class SafetensorsSource:
    """One safetensors file."""

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        self.files = (path,)
        self.entries: Mapping[str, TensorEntry] = _in_order(header.tensors)
        self.metadata: Mapping[str, str] = header.metadata
        self._mapping = mapped_file.map_file(path)
        self._data = mapped_file.bytes_of(self._mapping)
        self.mapped = (MappedBytes(path, self._data),)
        # the header was checked to cover the rest of the file exactly
        self._start = len(self._mapping) - max((entry.stop for entry in header.tensors.values()), default=0)

    def read(self, name: str) -> torch.Tensor:
        """A view of the mapped file."""
        entry = self.entries[name]
        if entry.dtype not in TORCH_DTYPES:
            raise InvalidOptionError(
                f"{name!r} in {str(self.files[0])!r} is stored as {entry.dtype}.",
                f"Gossamer reads {', '.join(TORCH_DTYPES)}.",
                "Use a version of the model in one of these types.",
            )
        dtype = TORCH_DTYPES[entry.dtype]
        if entry.stop == entry.start:
            return torch.empty(entry.shape, dtype=dtype)
        data = self._data[self._start + entry.start : self._start + entry.stop]
        # old writers did not pad the header; torch looks at numbers only where they are aligned
        aligned = data if data.storage_offset() % dtype.itemsize == 0 else mapped_file.own_copy(data)
        return aligned.view(dtype).view(entry.shape)

    def prefetch(self, name: str) -> None:
        """Have a tensor read ahead."""
        entry = self.entries[name]
        mapped_file.prefetch(self._mapping, self._start + entry.start, self._start + entry.stop)

    def release(self, name: str) -> None:
        """Forget the pages of a tensor."""
        entry = self.entries[name]
        mapped_file.release(self._mapping, self._start + entry.start, self._start + entry.stop)


class GgufSource:
    """One GGUF file."""

    def __init__(self, path: Path) -> None:
        self._file = gguf_file.open_file(path)
        header = self._file.header
        self.files = (path,)
        self.mapped = (MappedBytes(path, self._file.data),)
        self.entries: Mapping[str, TensorEntry] = _in_order(
            {
                name: TensorEntry(each.type_name, each.shape, each.start, each.stop)
                for name, each in header.tensors.items()
            }
        )
        texts = {key: value for key, value in header.metadata.items() if isinstance(value, str)}
        self.metadata: Mapping[str, str] = texts

    def read(self, name: str) -> torch.Tensor:
        """Plain values, or the blocks of a matrix as bytes; what is no matrix is decoded to float32."""
        tensor = gguf_file.read_tensor(self._file, name)
        return tensor.tensors["blocks"] if isinstance(tensor, Packed) else tensor

    def prefetch(self, name: str) -> None:
        """Have a tensor read ahead."""
        entry = self.entries[name]
        mapped_file.prefetch(self._file.mapping, entry.start, entry.stop)

    def release(self, name: str) -> None:
        """Forget the pages of a tensor."""
        gguf_file.release(self._file, name)


class ShardedSource:
    """Several files as one; no name may be in two of them."""

    def __init__(self, shards: Iterable[MappedSource]) -> None:
        self._shards = tuple(shards)
        self.files = tuple(file for shard in self._shards for file in shard.files)
        self.mapped = tuple(file for shard in self._shards for file in shard.mapped)
        self.metadata: Mapping[str, str] = {
            key: value for shard in self._shards for key, value in shard.metadata.items()
        }
        self._place: dict[str, MappedSource] = {}
        for shard in self._shards:
            for name in shard.entries:
                if name in self._place:
                    raise damage(shard.files[0], f"It holds {name[:80]!r}, which another shard holds too.", "shard")
                self._place[name] = shard
        self.entries: Mapping[str, TensorEntry] = {
            name: shard.entries[name] for shard in self._shards for name in shard.entries
        }

    def read(self, name: str) -> torch.Tensor:
        """A view of the shard that holds it."""
        return self._place[name].read(name)

    def prefetch(self, name: str) -> None:
        """Have a tensor read ahead."""
        self._place[name].prefetch(name)

    def release(self, name: str) -> None:
        """Forget the pages of a tensor."""
        self._place[name].release(name)


def open_source(path: Path | str) -> MappedSource:
    """The container at a path; one of several shards opens all of them."""
    path = Path(path)
    if path.name.endswith(INDEX_ENDING):
        return _open_all([path.parent / name for name in _indexed(path)])
    match = SHARD.fullmatch(path.name)
    if match is None:
        return _open_one(path)
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count <= MAX_SHARDS:
        raise damage(path, f"Its name says that it is part {match['number']} of {match['count']}.", "shard")
    names = (f"{match['stem']}-{number:05}-of-{count:05}{match['ending']}" for number in range(1, count + 1))
    return _open_all([path.parent / name for name in names])


def open_folder_source(folder: Path) -> MappedSource:
    """The weights in a component folder: what its index lists, or its single file."""
    index = next(iter(sorted(folder.glob(f"*{INDEX_ENDING}"))), None)
    if index is not None:
        return open_source(index)
    single = next((folder / name for name in SINGLE_NAMES if (folder / name).is_file()), None)
    if single is None:
        raise FileMissingError(
            f"The model lacks the weights of {str(folder)!r}.",
            f"It holds no .safetensors file of the names {', '.join(SINGLE_NAMES)}, and no index of shards.",
            "Download the model again, or check that the folder is complete.",
        )
    return _open_one(single)


def _in_order(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """As the tensors lie in the file, so that reading them one after the other reads it from front to back."""
    return dict(sorted(entries.items(), key=lambda item: item[1].start))


def _open_one(path: Path) -> MappedSource:
    require_file(path)
    with path.open("rb") as file:
        is_gguf = file.read(4) == b"GGUF" or path.suffix.lower() == ".gguf"
    return GgufSource(path) if is_gguf else SafetensorsSource(path)


def _open_all(paths: list[Path]) -> MappedSource:
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FileMissingError(
            f"The model in {str(paths[0].parent)!r} is not complete.",
            f"{len(missing)} of its {len(paths)} shards are missing: {', '.join(missing[:5])}.",
            "Put all shards into the same folder, under the names that they were published with.",
        )
    opened = [_open_one(path) for path in paths]
    return opened[0] if len(opened) == 1 else ShardedSource(opened)


def _indexed(index: Path) -> list[str]:
    """The files that an index lists, in order; none may lie outside of its folder."""
    if require_file(index) > MAX_INDEX_BYTES:
        raise _bad_index(index, f"It has more than {MAX_INDEX_BYTES} bytes.")
    try:
        content = json.loads(index.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _bad_index(index, f"It is not valid JSON: {error}.") from error
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise _bad_index(index, "It has no weight_map from tensor to file.")
    names = sorted(set(shards.values()))
    outside = [name for name in names if Path(name).name != name or name in (".", "..")]
    if outside or len(names) > MAX_SHARDS:
        raise _bad_index(
            index,
            f"It names {outside[0][:80]!r}, which is no file of its folder." if outside else "It lists too many files.",
        )
    return names


def _bad_index(index: Path, why: str) -> FileDamagedError:
    return FileDamagedError(f"{str(index)!r} cannot be used.", why, "Download the model again.")
