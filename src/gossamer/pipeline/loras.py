"""An adapter as a user names it: a bundled name, a file or a hub id, a scale, and the part of a run in which it acts.

    pencil    pencil:0.8    styles/ink.safetensors    C:\\styles\\ink.safetensors:0.5    owner/name/ink.safetensors
    pencil@0.2-0.9    pencil:0.8@0.2-0.9

What follows the last colon is a scale, and what follows the last @ a window (see `schedule`), unless the whole text is
an existing file, or what follows reads as the rest of a path, so that a drive letter is never mistaken for a name.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from gossamer.demo.embedded import adapter_paths
from gossamer.errors import AdapterError, FileMissingError, InvalidOptionError
from gossamer.pipeline.schedule import Schedule

CONTROL_LORA = "edges"  # the bundled Control LoRA
WHOLE_RUN = Schedule()
NUMBER = r"(\d+\.?\d*|\.\d+)"
WINDOW = re.compile(rf"{NUMBER}-{NUMBER}")


@dataclass(frozen=True)
class LoraChoice:
    """An adapter by bundled name, path or hub id, how strongly it acts, and in which steps."""

    source: str
    scale: float = 1.0
    schedule: Schedule = WHOLE_RUN

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
    """NAME_OR_FILE[:SCALE][@START-END]."""
    if os.path.exists(text):
        return LoraChoice(text)
    head, at, tail = text.rpartition("@")
    window = WINDOW.fullmatch(tail) if at else None
    if window is None:
        _require_no_window(text)
        return _with_scale(text)
    start, end = map(float, window.groups())
    return replace(_with_scale(head), schedule=Schedule(start, end))


def choose_lora(
    lora: str | Path | LoraChoice, scale: float | None = None, start: float | None = None, end: float | None = None
) -> LoraChoice:
    """A text with scale and window in it; or, where one of them is given as a number, a source alone. So is a path."""
    if scale is start is end is None and isinstance(lora, str):
        return parse_lora(lora)
    choice = lora if isinstance(lora, LoraChoice) else LoraChoice(str(lora))
    window = Schedule(choice.schedule.start if start is None else start, choice.schedule.end if end is None else end)
    return replace(choice, scale=choice.scale if scale is None else scale, schedule=window)


def _with_scale(text: str) -> LoraChoice:
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


def _require_no_window(text: str) -> None:
    """What follows an @ that begins no window belongs to a file's name, with or without a scale behind it."""
    name, at, tail = text.rpartition("@")
    without_scale = text.rpartition(":")[0]
    if not at or os.path.exists(without_scale) or _is_path(tail) or _is_path(tail.rpartition(":")[0]):
        return
    raise InvalidOptionError(
        f"The steps in which adapter {name!r} acts cannot be read: {tail!r}.",
        "Behind the last @ stands START-END, two shares of the run between 0 and 1, and nothing after them; "
        f"and there is no file {text!r}.",
        f"Write it like {name.partition(':')[0] or 'pencil'}:0.8@0.2-0.9, or leave the @ out for the whole run.",
    )


def _is_path(tail: str) -> bool:
    """Whether what follows a mark belongs to a path that has the mark in it."""
    return "/" in tail or "\\" in tail or tail.lower().endswith(".safetensors")


def find_local(choice: LoraChoice) -> Path | None:
    """The file of an adapter on this machine, if there is one; a bundled name comes before a file of the same name."""
    bundled = adapter_paths()
    if choice.source in bundled:
        return bundled[choice.source]
    return Path(choice.source) if os.path.isfile(choice.source) else None


def find_lora(choice: LoraChoice) -> Path:
    """As `find_local`, where there has to be one."""
    found = find_local(choice)
    if found is not None:
        return found
    path = Path(choice.source)
    if os.path.isdir(path) or path.suffix or len(path.parts) > 1 or "\\" in choice.source:
        raise FileMissingError(
            f"There is no adapter file {choice.source!r}.",
            "It is a folder." if os.path.isdir(path) else "The path does not exist, seen from the current folder.",
            f"Give the path of a .safetensors file, or a bundled name: {_bundled_names()}.",
        )
    bundled = adapter_paths()
    nearest = get_close_matches(choice.source, bundled, n=1)
    raise AdapterError(
        f"There is no adapter called {choice.source!r}.",
        f"Bundled adapters: {_bundled_names()}.",
        f"Did you mean {nearest[0]!r}?" if nearest else "Use one of these names, or the path of a .safetensors file.",
    )


def _bundled_names() -> str:
    return ", ".join(adapter_paths()) or "none"
