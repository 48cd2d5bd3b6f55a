"""Checkpoints for these tests: in memory, and as safetensors files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gossamer.checkpoints.safetensors_file import TensorEntry, read_header

DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
}


class MemorySource:
    """Tensors of a dictionary; `reads` are the names that were asked for."""

    def __init__(self, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
        self.tensors = tensors
        self.metadata = metadata or {}
        self.entries = {
            name: TensorEntry(DTYPES[tensor.dtype], tuple(tensor.shape), 0, tensor.numel() * tensor.element_size())
            for name, tensor in tensors.items()
        }
        self.reads: list[str] = []

    def read(self, name: str) -> torch.Tensor:
        self.reads.append(name)
        return self.tensors[name]


class FileSource:
    """A safetensors file, its header checked by us and its tensors mapped by the library that defines the format."""

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        self.entries, self.metadata = header.tensors, header.metadata
        self._file = safe_open(path, "pt")

    def read(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name)


def saved(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> FileSource:
    save_file(tensors, path, metadata)
    return FileSource(path)


def json_tensor(content: object) -> torch.Tensor:
    """The bytes of a JSON text, as ComfyUI and bitsandbytes put them into a file."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return torch.tensor(list(text), dtype=torch.uint8)
