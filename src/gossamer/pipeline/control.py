"""Control pictures: read, identified by SHA-256, brought to size, and made into the edge map a Control LoRA expects.

The kind 'auto' becomes 'map' for what may be an edge map and an error for what plainly is none. An edge map is white
lines on black. Of 256 levels, a pixel is black where every channel is below 64 and white where every channel is at
least 192, which leaves room for soft lines and for JPEG; other pixels are grey or coloured.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

from gossamer.checkpoints.safetensors_file import sha256_file
from gossamer.errors import FileDamagedError, FileMissingError, InvalidOptionError
from gossamer.pipeline.options import UNDECIDED
from gossamer.pipeline.recipe import ControlUse

CONTROL_NEXT = "Give a picture file such as a PNG or JPEG."
BLACK, WHITE = 64, 192
MOST_GREY = 1 / 3  # share of the pixels of an edge map that may be grey or coloured
MOST_WHITE = 1 / 2


def describe_control(control: Any, kind: str) -> ControlUse:
    """What a recipe records of a control picture, after making sure that it can be read; never the kind 'auto'."""
    picture = _open(control)
    if kind == UNDECIDED:
        _require_edge_map(picture, control)
        kind = "map"
    if isinstance(control, Image.Image):
        return ControlUse(kind, None, hashlib.sha256(picture.tobytes()).hexdigest())
    return ControlUse(kind, str(control), sha256_file(control))


def control_map(control: Any, kind: str, width: int, height: int) -> Image.Image:
    """The control picture at its final size, as the Control LoRA reads it."""
    picture = _open(control).resize((width, height), Image.Resampling.LANCZOS)
    return _MAPS[kind](picture)


def _require_edge_map(picture: Image.Image, control: Any) -> None:
    grey, white = _shares(picture)
    if grey <= MOST_GREY and white <= MOST_WHITE:
        return
    named = "" if isinstance(control, Image.Image) else f" {str(control)!r}"
    found = f"{white:.0%} are white" if grey <= MOST_GREY else f"{grey:.0%} are grey or coloured"
    raise InvalidOptionError(
        f"The control picture{named} is no edge map.",
        f"An edge map is white lines on black; of this picture's pixels {found}.",
        "Give --control-kind picture (in Python: control_kind='picture') to have its edges found, or "
        "--control-kind map to use it as it is.",
    )


def _shares(picture: Image.Image) -> tuple[float, float]:
    """Shares of an RGB picture's pixels that are grey or coloured, and that are white."""
    red, green, blue = picture.split()
    lightest = ImageChops.lighter(ImageChops.lighter(red, green), blue).histogram()
    darkest = ImageChops.darker(ImageChops.darker(red, green), blue).histogram()
    pixels = picture.width * picture.height
    black, white = sum(lightest[:BLACK]) / pixels, sum(darkest[WHITE:]) / pixels
    return 1 - black - white, white


def _as_it_is(picture: Image.Image) -> Image.Image:
    return picture


def _edges(picture: Image.Image) -> Image.Image:
    import numpy as np
    import torch

    from gossamer.demo.edges import edge_map

    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255  # (1, 3, H, W)
    edges = edge_map(pixels)[0].permute(1, 2, 0).mul(255).round().to(torch.uint8)
    return Image.fromarray(edges.numpy())


_MAPS: Mapping[str, Callable[[Image.Image], Image.Image]] = {"map": _as_it_is, "picture": _edges}


def _open(control: Any) -> Image.Image:
    """RGB pixels of a picture object or of a file."""
    if isinstance(control, Image.Image):
        return control.convert("RGB")
    if not isinstance(control, str | Path):
        raise InvalidOptionError(
            "The control picture is of no usable type.",
            f"It is a {type(control).__name__}.",
            "Give a PIL image or the path of a picture file.",
        )
    if not os.path.isfile(control):
        raise FileMissingError(
            f"There is no control picture {str(control)!r}.",
            "The path does not exist, seen from the current folder, or is not a file.",
            CONTROL_NEXT,
        )
    try:
        with Image.open(control) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise FileDamagedError(
            f"The control picture {str(control)!r} cannot be read.", f"The picture reader says: {error}.", CONTROL_NEXT
        ) from error
