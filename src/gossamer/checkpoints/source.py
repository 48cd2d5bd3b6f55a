"""An opened checkpoint, whatever its container: tensors by name, and each of them only when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from gossamer.checkpoints.safetensors_file import TensorEntry


class TensorSource(Protocol):
    """What a container offers to those who read weights from it."""

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Every tensor by name: dtype, shape and offsets."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """Free-form texts of the header."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor, memory-mapped where possible."""


@dataclass(frozen=True, eq=False)
class MappedBytes:
    """A file, and all of its bytes as they are mapped: uint8."""

    path: Path
    data: torch.Tensor


class MappedSource(TensorSource, Protocol):
    """A source whose tensors are views of mapped files, whose pages can be given back one tensor at a time."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the tensors are in."""

    @property
    def mapped(self) -> tuple[MappedBytes, ...]:
        """The same with their bytes, of which tensors are views."""

    def prefetch(self, name: str) -> None:
        """Have the system read a tensor ahead, without waiting for it."""

    def release(self, name: str) -> None:
        """Forget the pages behind a tensor that was copied elsewhere."""
