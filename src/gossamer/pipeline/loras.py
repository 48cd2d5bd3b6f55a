"""An adapter as a user names it: a bundled name or a file, and a scale.

    pencil    pencil:0.8    styles/ink.safetensors    C:\\styles\\ink.safetensors:0.5

What follows the last colon is a scale, unless the whole text is an existing file, or what follows reads as the rest of
a path, so that a drive letter is never mistaken for a name.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from gossamer.demo.embedded import adapter_paths
from gossamer.errors import AdapterError, FileMissingError, InvalidOptionError

CONTROL_LORA = "edges"  # the bundled Control LoRA


@dataclass(frozen=True)
class LoraChoice:
    """An adapter by bundled name or path, and how strongly it acts."""

    source: str
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise InvalidOptionError(
                "An adapter has an empty name.",
                "A bundled name or the path of a .safetensors file is needed.",
                f"Bundled adapters: {_bundled_names()}.",
            )
        if not math.isfinite(self.scale):
            raise InvalidOptionError(
                f"The scale of adapter {self.source!r} is {self.scale}.",
                "A scale that is not a finite number makes every weight unusable.",
                "Give a number such as 0.8.",
            )

    @property
    def stem(self) -> str:
        """A short name: the bundled name, or the file's name without its ending."""
        return Path(self.source.replace("\\", "/")).name.removesuffix(".safetensors")


def parse_lora(text: str) -> LoraChoice:
    """NAME_OR_FILE[:SCALE]."""
    name, colon, tail = text.rpartition(":")
    if not colon or os.path.exists(text):
        return LoraChoice(text)
    try:
        return LoraChoice(name, float(tail))
    except ValueError as error:
        if _is_path(tail):
            return LoraChoice(text)
        raise InvalidOptionError(
            f"The scale of adapter {name!r} is not a number: {tail!r}.",
            f"What follows the colon multiplies the adapter's effect, and there is no file {text!r}.",
            f"Write it like {name}:0.8, or leave the colon out for 1.",
        ) from error


def _is_path(tail: str) -> bool:
    """Whether what follows a colon belongs to a path that has the colon in it."""
    return "/" in tail or "\\" in tail or tail.lower().endswith(".safetensors")


def find_lora(choice: LoraChoice) -> Path:
    """The file of an adapter; a bundled name comes before a file of the same name."""
    bundled = adapter_paths()
    if choice.source in bundled:
        return bundled[choice.source]
    path = Path(choice.source)
    if os.path.isfile(path):
        return path
    if os.path.isdir(path) or path.suffix or len(path.parts) > 1 or "\\" in choice.source:
        raise FileMissingError(
            f"There is no adapter file {choice.source!r}.",
            "It is a folder." if os.path.isdir(path) else "The path does not exist, seen from the current folder.",
            f"Give the path of a .safetensors file, or a bundled name: {_bundled_names()}.",
        )
    nearest = get_close_matches(choice.source, bundled, n=1)
    raise AdapterError(
        f"There is no adapter called {choice.source!r}.",
        f"Bundled adapters: {_bundled_names()}.",
        f"Did you mean {nearest[0]!r}?" if nearest else "Use one of these names, or the path of a .safetensors file.",
    )


def _bundled_names() -> str:
    return ", ".join(adapter_paths()) or "none"
