"""Which control pictures pass for edge maps when nobody says how to read them."""

from __future__ import annotations

import io

import pytest
from PIL import Image, ImageDraw

from gossamer.errors import InvalidOptionError
from gossamer.pipeline.control import control_map, describe_control

SIDE = 128


def scene() -> Image.Image:
    """Three shaded and coloured shapes before a pale wall."""
    picture = Image.linear_gradient("L").resize((SIDE, SIDE)).point(lambda level: 150 + level // 4).convert("RGB")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((16, 40, 60, 90), fill=(180, 40, 30))
    draw.rectangle((64, 64, 110, 118), fill=(30, 60, 160))
    draw.polygon(((70, 60), (90, 10), (110, 60)), fill=(20, 120, 50))
    return picture


def edges() -> Image.Image:
    return control_map(scene(), "picture", SIDE, SIDE)


def as_jpeg(picture: Image.Image) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=50)
    return Image.open(file)


@pytest.mark.parametrize(
    "change",
    [
        lambda picture: picture,
        lambda picture: picture.convert("1"),
        lambda picture: picture.resize((SIDE // 2, SIDE // 2), Image.Resampling.LANCZOS),
        lambda picture: picture.resize((200, 200), Image.Resampling.BICUBIC),
        as_jpeg,
        lambda picture: Image.new("RGB", picture.size),  # nothing to see: no edges
    ],
    ids=["as it is", "one bit", "smaller", "larger", "jpeg", "black"],
)
def test_edge_maps_pass(change):
    assert describe_control(change(edges()), "auto").kind == "map"


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (scene(), "are grey or coloured"),
        (as_jpeg(scene()), "are grey or coloured"),
        (Image.new("L", (SIDE, SIDE), 128), "100% are grey or coloured"),
        (Image.new("RGB", (SIDE, SIDE), (255, 0, 0)), "100% are grey or coloured"),
        (edges().point(lambda level: 255 - level), "are white"),
    ],
    ids=["scene", "jpeg", "grey", "red", "black on white"],
)
def test_what_is_plainly_no_edge_map_is_refused(picture, words):
    with pytest.raises(InvalidOptionError, match="is no edge map") as caught:
        describe_control(picture, "auto")
    assert words in caught.value.why
    assert "--control-kind picture" in caught.value.next_step
    for kind in ("map", "picture"):
        assert describe_control(picture, kind).kind == kind


def test_the_refused_file_is_named(tmp_path):
    scene().save(tmp_path / "photo.png")
    with pytest.raises(InvalidOptionError, match=r"photo\.png"):
        describe_control(tmp_path / "photo.png", "auto")
