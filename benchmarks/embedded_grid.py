"""The grid of pictures that `embedded_model.py --grid` wrote, with the captions under the pictures, as one small JPEG.

    python benchmarks/embedded_grid.py grid.png --out docs/images/embedded-model.jpg

The captions come from the JSON file beside the grid.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from PIL import Image, ImageDraw, ImageFont

COLUMNS = 6
TEXT_SIZE, LINE_HEIGHT, LINES, CHARACTERS, MARGIN = 12, 15, 5, 40, 8  # pixels; lines and characters a caption
GAP = 4  # pixels between tiles
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "embedded-model.jpg"
QUALITY = 85
MOST_BYTES = 400_000


def label(about: Mapping[str, Any]) -> str:
    """What stands under one tile."""
    if about["shows"] == "control map":
        return "edge map for the picture to the right"
    adapter = f"[{about['adapter']}] " if about["adapter"] else ""
    return f"{adapter}{about['caption']}"


def with_captions(grid: Image.Image, texts: Sequence[Mapping[str, Any]]) -> Image.Image:
    """The tiles in rows, each with its caption below."""
    side = grid.width // COLUMNS
    rows = grid.height // side
    if len(texts) != rows * COLUMNS:
        raise ValueError(f"the grid has {rows * COLUMNS} tiles, and there are captions for {len(texts)}")
    wide, high = side + GAP, side + LINES * LINE_HEIGHT + 2 * MARGIN
    sheet = Image.new("RGB", (COLUMNS * wide - GAP, rows * high), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(TEXT_SIZE)
    for place, about in enumerate(texts):
        row, column = divmod(place, COLUMNS)
        left, top = column * wide, row * high
        tile = grid.crop((column * side, row * side, (column + 1) * side, (row + 1) * side))
        sheet.paste(tile, (left, top))
        for number, line in enumerate(wrap(label(about), CHARACTERS)[:LINES]):
            where = (left + MARGIN, top + side + MARGIN + number * LINE_HEIGHT)
            draw.text(where, line, "black", font)
    return sheet


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument("--out", type=Path, default=PICTURE)
    options = parser.parse_args(argv)
    texts = json.loads(options.grid.with_suffix(".json").read_text("utf-8"))
    with Image.open(options.grid) as grid:
        sheet = with_captions(grid.convert("RGB"), texts)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(options.out, quality=QUALITY, optimize=True, progressive=True)
    size = options.out.stat().st_size
    print(f"{options.out}: {sheet.width}x{sheet.height}, {size / 1000:.0f} kB")
    if size > MOST_BYTES:
        sys.exit(f"More than {MOST_BYTES / 1000:.0f} kB: lower QUALITY.")


if __name__ == "__main__":
    main(sys.argv[1:])
