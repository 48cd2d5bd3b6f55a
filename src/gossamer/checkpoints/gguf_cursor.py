"""A place in a GGUF header that moves only inside the file: every step is checked before it is made."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from gossamer.checkpoints import safetensors_file
from gossamer.errors import FileDamagedError

MAX_HEADER_BYTES = 64 << 20
MAX_NAME_BYTES = 256  # ggml itself stops at 63, keys that carry a tensor name need more

U32, U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass
class Cursor:
    """A place in the header; every step is checked against the size of the file before it is made."""

    path: Path
    data: mmap.mmap
    size: int
    position: int

    @property
    def limit(self) -> int:
        """Where the header has to end."""
        return min(self.size, MAX_HEADER_BYTES)

    def need(self, count: int, what: str) -> None:
        """Check that `count` bytes are left."""
        if count <= self.limit - self.position:
            return
        if count > self.size - self.position:
            left = self.size - self.position
            damaged(self.path, f"It is cut off: {what} should take {count} bytes, {left} are left.")
        damaged(self.path, f"Its header takes more than {MAX_HEADER_BYTES} bytes.")

    def check_count(self, count: int, least_bytes: int, most: int, what: str) -> None:
        """Check a claimed number of things before any of them is read."""
        if count * least_bytes > self.size - self.position:
            left = self.size - self.position
            damaged(self.path, f"It claims {count} {what}, which cannot fit into the {left} bytes that are left.")
        if count > most:
            damaged(self.path, f"It claims {count} {what}; the most that is allowed is {most}.")

    def take(self, layout: struct.Struct, what: str) -> tuple[Any, ...]:
        """Numbers, little-endian."""
        self.need(layout.size, what)
        values = layout.unpack_from(self.data, self.position)
        self.position += layout.size
        return values

    def take_bytes(self, count: int, what: str) -> bytes:
        """That many bytes."""
        self.need(count, what)
        self.position += count
        return self.data[self.position - count : self.position]

    def take_name(self, what: str) -> str:
        """The name of a key or tensor."""
        (length,) = self.take(U64, f"the length of {what}")
        if not 0 < length <= MAX_NAME_BYTES:
            damaged(self.path, f"The length of {what} is {length} bytes; 1 to {MAX_NAME_BYTES} are allowed.")
        try:
            return self.take_bytes(length, what).decode()
        except UnicodeDecodeError as error:
            raise damage(self.path, f"A byte of {what} is not UTF-8: {error.reason}.") from error


def damage(path: Path, why: str) -> FileDamagedError:
    """The error for a file that is not what it says."""
    return safetensors_file.damage(path, why, "GGUF file that Gossamer reads")


def damaged(path: Path, why: str) -> NoReturn:
    """Raise that error."""
    raise damage(path, why)
