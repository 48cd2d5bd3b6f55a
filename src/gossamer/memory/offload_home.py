"""Where a block's bytes are while they are not on the device.

    Pinned      one buffer in host memory that the device reads directly
    Scattered   as they were loaded: views of a mapped file, or ordinary memory; they go through a pinned buffer

A mapped file is read with `pread`, not looked at: looking at a page that is gone kills the process without a word.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from gossamer.errors import FileDamagedError, FileMissingError
from gossamer.memory.offload_host import host_bytes
from gossamer.memory.offload_layout import Layout, Piece


class MappedFile(Protocol):
    """A file whose bytes are in memory as a tensor of all of them, uint8."""

    @property
    def path(self) -> Path:
        """Where it is."""

    @property
    def data(self) -> torch.Tensor:
        """All of its bytes."""


@dataclass(frozen=True, eq=False)
class Pinned:
    """All bytes of a layout in one buffer."""

    memory: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Length."""
        return self.memory.numel()


@dataclass(frozen=True, eq=False)
class Scattered:
    """Bytes that are read from where they are."""

    pieces: tuple[MemoryPiece | FilePiece, ...]
    nbytes: int

    def read(self, start: int, stop: int, into: torch.Tensor) -> None:
        """Bytes `start` to `stop` of the layout into a uint8 tensor; gaps stay unwritten."""
        for piece in self.pieces:
            first, last = max(start, piece.offset), min(stop, piece.offset + piece.nbytes)
            if first < last:
                piece.read(first - piece.offset, into[first - start : last - start])


Home = Pinned | Scattered


def pinned_home(layout: Layout, device: torch.device) -> Pinned:
    """A copy of all bytes, for copies to that device."""
    memory = host_bytes(layout.nbytes, device)
    layout.gather(memory)
    return Pinned(memory)


def scattered_home(layout: Layout, files: Sequence[OpenFile] = ()) -> Scattered:
    """The bytes where they are; those in one of the files are read from it."""
    return Scattered(tuple(_source(piece, files) for piece in layout.pieces), layout.nbytes)


class OpenFile:
    """A file that stays open: it can be read to its end when its name is gone, and any change of it is noticed."""

    def __init__(self, mapped: MappedFile) -> None:
        self.path = mapped.path
        self.start = mapped.data.data_ptr()
        self.stop = self.start + mapped.data.numel()
        try:
            self._file = self.path.open("rb", buffering=0)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        self._version = self._now()

    def read(self, start: int, into: torch.Tensor) -> None:
        """Bytes from `start` on into a contiguous uint8 tensor, all of them."""
        if self._now() != self._version:
            raise FileDamagedError(
                f"{str(self.path)!r} changed while its weights were streamed from it.",
                "Its size or its time of change is no longer what it was when the model was loaded.",
                "Leave the file alone while a model runs from it, and load the model again.",
            )
        memory = memoryview(into.numpy())  # type: ignore[arg-type]
        done = 0
        while done < len(memory):
            done += self._some(start + done, memory[done:])

    def close(self) -> None:
        """No more is read."""
        self._file.close()

    def _some(self, start: int, memory: memoryview) -> int:
        try:
            count = os.preadv(self._file.fileno(), [memory], start)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if count == 0:
            raise _unreadable(self.path, f"it ends before byte {start + len(memory)}")
        return count

    def _now(self) -> tuple[int, int]:
        try:
            status = os.fstat(self._file.fileno())
        except OSError as error:
            raise _unreadable(self.path, error) from error
        return status.st_size, status.st_mtime_ns


@dataclass(frozen=True, eq=False)
class MemoryPiece:
    """Bytes in memory, a tensor's."""

    offset: int
    source: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Length."""
        return self.source.numel()

    def read(self, start: int, into: torch.Tensor) -> None:
        """Bytes from `start` on."""
        into.copy_(self.source[start : start + into.numel()])


@dataclass(frozen=True, eq=False)
class FilePiece:
    """Bytes in a file, `nbytes` from byte `start` on."""

    offset: int
    file: OpenFile
    start: int
    nbytes: int

    def read(self, start: int, into: torch.Tensor) -> None:
        """Bytes from `start` on."""
        self.file.read(self.start + start, into)


def file_of(source: torch.Tensor, files: Sequence[OpenFile]) -> OpenFile | None:
    """The file that these bytes are mapped from."""
    start, stop = source.data_ptr(), source.data_ptr() + source.numel()
    return next((file for file in files if file.start <= start and stop <= file.stop), None)


def _source(piece: Piece, files: Sequence[OpenFile]) -> MemoryPiece | FilePiece:
    file = file_of(piece.source, files)
    if file is None:
        return MemoryPiece(piece.offset, piece.source)
    return FilePiece(piece.offset, file, piece.source.data_ptr() - file.start, piece.nbytes)


def _unreadable(path: Path, why: OSError | str) -> FileMissingError:
    return FileMissingError(
        f"{str(path)!r} cannot be read any more while its weights are streamed from it.",
        f"The system says: {why}.",
        "Put the file back on a disk that stays, and load the model again; with enough host memory, use pinned=True.",
    )
